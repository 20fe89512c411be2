"""A simulation of the coordinator: its `Scheduler`, and rivals, with workers that are events in a heap.

And a plot of efficiency over the number of workers, drawn with OpenCV: a panel per mix of slides.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from benchmarks.growth_plot import COLOURS, GREY, INK
from slide2vec.pictures import write_picture
from slide2vec.scale.coordinator import DEPTH
from slide2vec.scale.scheduler import Scheduler

__all__ = [
    "BEST",
    "MEAN_TILES",
    "MIXES",
    "POLICIES",
    "Cohort",
    "Setting",
    "Simulation",
    "cohort",
    "scaling_plot",
]

#: Percentages of slides and, of each mix, the file size in MB that so many do not exceed.
PERCENTAGES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
MIXES = {
    # File sizes of the 258 diagnostic slides (DX, SVS) of TCGA colon cancer that a manifest of the GDC
    # lists: github.com/Tony3318/WSI-HSfeatures, gdc_manifest.txt at 209f64e. Each rounded to 3 digits.
    "recorded": (7.6, 8.8, 48, 100, 343, 686, 955, 1507, 1640, 2231, 2763),
    # Made up: many small biopsies, some resections, a few very large ones.
    "made up": (5, 10, 20, 30, 60, 110, 220, 1200, 2400, 5000, 9000),
}
#: Tiles of the mean slide: 1.3 billion of 256 px at 0.5 µm/px from 171,189 slides (Xu et al., "A whole-slide
#: foundation model for digital pathology from real-world data", Nature 2024).
MEAN_TILES = 1.3e9 / 171_189


@dataclass(frozen=True)
class Setting:
    """What workers are like. All of it is assumed but what `cohort` says of sizes.

    Attributes:
        tiles_per_s: of a worker.
        speeds: standard deviation of the workers' speeds, relative.
        start_s: to start a worker and load its model, up to a tenth more.
        plan_s: to open and segment a slide, while those before are encoded.
        planners: slides of a worker that are planned at once; by itself a stream takes one per CPU.
        slide_s: of each slide's time that nothing hides.
        message_s: until what the coordinator gives is there.
        losses_per_h: of a worker.
        sizes_sigma: of the logarithm of tiles per byte; infinite: sizes are not known.
    """

    tiles_per_s: float = 500.0
    speeds: float = 0.05
    start_s: float = 60.0
    plan_s: float = 2.0
    planners: int = 2
    slide_s: float = 0.1
    message_s: float = 0.01
    losses_per_h: float = 0.05
    sizes_sigma: float = 0.3


@dataclass(frozen=True)
class Cohort:
    """Slides by name, in no order: tiles, and bytes as far as known."""

    tiles: dict[str, int]
    sizes: dict[str, float]


def cohort(mix: str, slides: int, sigma: float, seed: int) -> Cohort:
    """Sizes drawn from the mix's quantiles; tiles in proportion to them, but for a log-normal error."""
    draw = np.random.default_rng(seed)
    sizes = np.interp(draw.uniform(0, 100, slides), PERCENTAGES, MIXES[mix])
    known = math.isfinite(sigma)
    tiles = sizes * np.exp(draw.normal(0, sigma if known else 0.3, slides))
    tiles *= MEAN_TILES / tiles.mean()
    names = [f"s{number}" for number in range(slides)]
    return Cohort(
        dict(zip(names, np.maximum(1, tiles).astype(int).tolist(), strict=True)),
        dict(zip(names, sizes.tolist() if known else [0.0] * slides, strict=True)),
    )


class Policy(Protocol):
    """What the simulation asks of `Scheduler`. A worker's name is its place and a number: "3.0"."""

    @property
    def finished(self) -> bool: ...
    def join(self, worker: str) -> None: ...
    def next_task(self, worker: str) -> str | None: ...
    def planned(self, task: str, tiles: int) -> None: ...
    def encoded(self, task: str, tiles: int) -> None: ...
    def done(self, task: str) -> None: ...
    def lost(self, worker: str) -> list[str]: ...


class _Queues:
    """A rival: each worker takes from the queue of its place, or all from one, at most `depth` at a time."""

    def __init__(self, queues: list[deque[str]], depth: int) -> None:
        self._queues, self._depth = queues, depth
        self._hands: dict[str, list[str]] = {}
        self._holder: dict[str, str] = {}
        self._left = sum(map(len, queues))

    @property
    def finished(self) -> bool:
        return not self._left

    def join(self, worker: str) -> None:
        self._hands[worker] = []

    def next_task(self, worker: str) -> str | None:
        queue, hand = self._queue(worker), self._hands[worker]
        if not queue or len(hand) >= self._depth:
            return None
        task = queue.popleft()
        hand.append(task)
        self._holder[task] = worker
        return task

    def planned(self, task: str, tiles: int) -> None: ...
    def encoded(self, task: str, tiles: int) -> None: ...

    def done(self, task: str) -> None:
        self._left -= 1
        self._hands[self._holder[task]].remove(task)

    def lost(self, worker: str) -> list[str]:
        self._queue(worker).extendleft(reversed(self._hands.pop(worker)))
        return []

    def _queue(self, worker: str) -> deque[str]:
        return self._queues[int(worker.split(".")[0]) % len(self._queues)]


def _balanced(weights: dict[str, float], workers: int) -> list[deque[str]]:
    """Largest first, each to whoever has least."""
    loads = [(0.0, place) for place in range(workers)]
    queues: list[deque[str]] = [deque() for _ in loads]
    for task in sorted(weights, key=weights.__getitem__, reverse=True):
        load, place = heapq.heappop(loads)
        queues[place].append(task)
        heapq.heappush(loads, (load + weights[task], place))
    return queues


POLICIES: dict[str, Callable[[Cohort, int], Policy]] = {
    "Schedule": lambda given, workers: Scheduler(given.sizes, depth=DEPTH, expected=workers),
    "pulled one by one": lambda given, _: _Queues([deque(given.tiles)], 1),
    # As slide2vec 7.1.4, which tiles all slides first: that time is not counted here.
    "split by tiles": lambda given, workers: _Queues(_balanced(dict(given.tiles), workers), 2),
    "split by size": lambda given, workers: _Queues(_balanced(given.sizes, workers), 2),
    "split by count": lambda given, workers: _Queues(
        [deque(list(given.tiles)[place::workers]) for place in range(workers)], 2
    ),
}


@dataclass(eq=False)
class _Worker:
    name: str
    tiles_per_s: float
    ahead: deque[tuple[str, float]] = field(default_factory=deque)
    planners_free: list[float] = field(default_factory=list)
    busy: bool = False


class Simulation:
    """A run of a cohort on so many workers.

    A slide is reported when its stream comes to it, when each quarter of it is encoded, and at its end.
    Batches that hold tiles of two slides are not simulated.
    """

    QUARTERS = 4

    def __init__(self, policy: str, given: Cohort, workers: int, setting: Setting, seed: int) -> None:
        self._policy = POLICIES[policy](given, workers)
        self.tile_model, self._setting = given.tiles, setting
        self._random = random.Random(seed)
        self._speeds = [
            setting.tiles_per_s * max(0.1, self._random.gauss(1, setting.speeds)) for _ in range(workers)
        ]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._now = count(), 0.0
        self._alive: dict[str, _Worker] = {}
        self.lost, self.failed, self.handled = 0, 0, 0
        for place in range(workers):
            self._start(f"{place}.0")

    def run(self) -> float:
        """Seconds until the last slide is done."""
        while not self._policy.finished:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
            self.handled += 1
        return self._now

    @property
    def ideal(self) -> float:
        """Seconds that the tiles take when no worker ever waits; starting is not counted."""
        return sum(self.tile_model.values()) / sum(self._speeds)

    @property
    def longest(self) -> float:
        """Seconds of the largest slide with the fastest worker: no run can be shorter."""
        return max(self.tile_model.values()) / max(self._speeds)

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _start(self, name: str) -> None:
        self._at(self._now + self._setting.start_s * self._random.uniform(1, 1.1), lambda: self._join(name))

    def _join(self, name: str) -> None:
        worker = _Worker(name, self._speeds[int(name.split(".")[0])])
        worker.planners_free = [self._now] * self._setting.planners
        self._alive[name] = worker
        self._policy.join(name)
        if self._setting.losses_per_h:
            lasts = self._random.expovariate(self._setting.losses_per_h / 3600)
            self._at(self._now + lasts, lambda: self._lose(worker))
        self._assign_next(worker)

    def _lose(self, worker: _Worker) -> None:
        del self._alive[worker.name]
        self.lost += 1
        self.failed += len(self._policy.lost(worker.name))
        place, number = worker.name.split(".")
        self._start(f"{place}.{int(number) + 1}")
        for other in self._alive.values():
            self._assign_next(other)

    def _assign_next(self, worker: _Worker) -> None:
        while (task := self._policy.next_task(worker.name)) is not None:
            begun = max(self._now + self._setting.message_s, worker.planners_free[0])
            heapq.heapreplace(worker.planners_free, begun + self._setting.plan_s)
            worker.ahead.append((task, begun + self._setting.plan_s))
        self._go_on(worker)

    def _go_on(self, worker: _Worker) -> None:
        if worker.ahead and not worker.busy:
            worker.busy = True
            task, ready = worker.ahead.popleft()
            self._at(max(self._now, ready), lambda: self._encode(worker, task))

    def _encode(self, worker: _Worker, task: str) -> None:
        if worker.name not in self._alive:
            return
        tiles = self.tile_model[task]
        self._policy.planned(task, tiles)
        self._assign_next(worker)
        seconds = tiles / worker.tiles_per_s + self._setting.slide_s
        for quarter in range(1, self.QUARTERS):
            share = tiles * quarter // self.QUARTERS - tiles * (quarter - 1) // self.QUARTERS
            self._at(
                self._now + seconds * quarter / self.QUARTERS,
                lambda share=share: self._report(worker, task, share),  # type: ignore[misc]
            )
        self._at(self._now + seconds, lambda: self._end(worker, task))

    def _report(self, worker: _Worker, task: str, tiles: int) -> None:
        if worker.name in self._alive:
            self._policy.encoded(task, tiles)
            self._assign_next(worker)

    def _end(self, worker: _Worker, task: str) -> None:
        if worker.name in self._alive:
            worker.busy = False
            self._policy.done(task)
            self._assign_next(worker)


# the plot -----------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, SIZE, NEXT = 1500, 720, 90, 130, (590, 480), 720
BEST, AIM = "at best", 0.97
LINES = (*COLOURS, (150, 110, 60))
#: Workers, median, lowest and highest efficiency.
Point = tuple[int, float, float, float]


def scaling_plot(mixes: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Write the picture: a line per policy, its range as a bar; `BEST` is grey."""
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    names = [name for name in next(iter(mixes.values())) if name != BEST]
    colours = dict(zip(names, LINES, strict=True)) | {BEST: (150, 150, 150)}
    for number, (name, colour) in enumerate(colours.items()):
        x = LEFT + number * 235
        cv2.line(canvas, (x, 36), (x + 34, 36), colour, 3, cv2.LINE_AA)
        _text(canvas, name, (x + 42, 42))
    for number, (title, lines) in enumerate(mixes.items()):
        _panel(canvas, LEFT + number * NEXT, title, lines, colours)
    write_picture(path, canvas)


def _panel(
    canvas: Any,
    left: int,
    title: str,
    lines: dict[str, list[Point]],
    colours: dict[str, tuple[int, int, int]],
) -> None:
    most = math.log(max(point[0] for points in lines.values() for point in points))

    def at(workers: float, efficiency: float) -> tuple[int, int]:
        return left + round(math.log(workers) / most * SIZE[0]), TOP + round((1 - efficiency) * SIZE[1])

    _axes(canvas, at, next(iter(lines.values())))
    _text(canvas, title, (left, TOP - 18))
    for name, points in reversed(lines.items()):
        for one, other in pairwise(points):
            cv2.line(canvas, at(*one[:2]), at(*other[:2]), colours[name], 3, cv2.LINE_AA)
        for workers, _, low, high in points if name != BEST else []:
            cv2.line(canvas, at(workers, low), at(workers, high), colours[name], 2, cv2.LINE_AA)


def _axes(canvas: Any, at: Any, points: list[Point]) -> None:
    first, last = points[0][0], points[-1][0]
    for tenth in range(0, 11, 2):
        low, high = at(first, tenth / 10), at(last, tenth / 10)
        cv2.line(canvas, low, high, GREY, 1)
        _text(canvas, f"{tenth / 10:.1f}", (low[0] - 42, low[1] + 6))
    for workers, *_ in points:
        low, high = at(workers, 0), at(workers, 1)
        cv2.line(canvas, low, high, GREY, 1)
        _text(canvas, f"{workers:,}", (low[0] - 8 * len(str(workers)), low[1] + 26))
    for x in range(at(first, AIM)[0], at(last, AIM)[0], 12):
        cv2.line(canvas, (x, at(first, AIM)[1]), (x + 5, at(first, AIM)[1]), INK, 1)
    _text(canvas, "workers", ((at(first, 0)[0] + at(last, 0)[0]) // 2 - 35, at(first, 0)[1] + 58))


def _text(canvas: Any, text: str, place: tuple[int, int]) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, INK, 1, cv2.LINE_AA)
