"""How long encoders take: on this machine, by a trial, and on known hardware."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError
from slide2vec.progress import (
    NullReporter,
    ProgressEvent,
    RunFinished,
    RunStarted,
    TilesEncoded,
    activate_progress_reporter,
)
from slide2vec.slides import Slide

if TYPE_CHECKING:
    from slide2vec.compile.gain import Gain
    from slide2vec.model import Model

__all__ = [
    "HARDWARE",
    "LEAST_GFLOPS",
    "Hardware",
    "Trial",
    "on_hardware",
    "seconds_for",
    "tried",
    "with_build",
]

#: What is told of another slide within this share of the time until the first tiles is of their batch.
_ONE_BATCH = 0.25


class _Enough(Exception):
    """The trial has run for long enough."""


@dataclass(frozen=True)
class Trial:
    """How an encoder goes on this machine.

    Attributes:
        tiles_per_s: once it is under way, of all workers together.
        start_s: until it is: libraries and weights are loaded, the first slide is planned and read.
        build_s: of an engine, before that; 0 where none is built.
    """

    tiles_per_s: float
    start_s: float = 0.0
    build_s: float = 0.0


class _Stopwatch(NullReporter):
    """Counts the tiles after the first batch, while which caches and clocks settle; ends the trial by raising
    from where it is told of them: workers end with it, which would go on waiting for the next call.

    Args:
        workers: that are to be under way, each with a slide of its own, when it begins to count.
    """

    def __init__(
        self, seconds: float, clock: Callable[[], float] = time.perf_counter, workers: int = 1
    ) -> None:
        self._seconds, self._clock, self._workers = seconds, clock, workers
        self._started = 0.0
        self.began: float | None = None
        self.ended = 0.0
        self.tiles = self._first = 0
        self._slides: set[str | None] = set()

    def emit(self, event: ProgressEvent) -> None:
        if isinstance(event, RunStarted):
            self._started = self._clock()
        if isinstance(event, RunFinished):
            raise _Enough
        if not isinstance(event, TilesEncoded):
            return
        self.ended = self._clock()
        waits = self.began is None or len(self._slides) < self._workers
        if waits or (not self.tiles and self._is_of_first_batch(event)):
            self.began, self._first = self.ended, self._first + event.count
            self._slides.add(event.sample_id)
            return
        self.tiles += event.count
        if self.began is not None and self.ended - self.began >= self._seconds:
            raise _Enough

    def _is_of_first_batch(self, event: TilesEncoded) -> bool:
        """A batch is told slide by slide."""
        assert self.began is not None
        soon = self.ended - self.began < _ONE_BATCH * (self.began - self._started)
        return soon and event.sample_id not in self._slides

    @property
    def found(self) -> Trial | None:
        """None before the second batch."""
        if self.began is None or not self.tiles:
            return None
        speed = self.tiles / (self.ended - self.began)
        return Trial(speed, max(0.0, self.began - self._started - self._first / speed))


def tried(
    model: Model,
    slides: Sequence[Slide],
    preprocessing: PreprocessingConfig,
    execution: ExecutionOptions,
    seconds: float,
) -> Trial | None:
    """How a model goes on this machine, from embedding the first slides for some seconds, without building an
    engine; None where they have too few tiles (two batches) to tell.

    Several workers are tried together; where there are fewer slides, they come again under other names.
    """
    workers = len(model.devices_here(execution))
    if 0 < len(slides) < workers:
        again = range(-(-workers // len(slides)))
        slides = [replace(each, sample_id=f"{each.sample_id}-{turn}") for turn in again for each in slides]
    watch = _Stopwatch(seconds, workers=workers)
    alone = execution.updated(output_dir=None, build_engine="never")  # nothing is left behind
    with (
        activate_progress_reporter(watch),
        suppress(_Enough),
        closing(model.iter_slides(slides, preprocessing, alone)) as outcomes,
    ):
        for _ in outcomes:  # a slide that fails is the run's business
            pass
    return watch.found


def with_build(trial: Trial, gain: Gain | None, tiles: int) -> Trial:
    """As a run of so many tiles goes, which builds an engine first where that pays.

    Args:
        gain: `Model.gain_of_build`.
    """
    if gain is None or not gain.pays(tiles, trial.tiles_per_s):
        return trial
    seconds = gain.build_seconds(trial.tiles_per_s)
    return replace(trial, tiles_per_s=trial.tiles_per_s * gain.times, build_s=seconds)


def seconds_for(
    tiles: Mapping[str, int],
    trials: Mapping[str, Trial],
    devices: Mapping[str, str],
    groups: Sequence[Sequence[str]] = (),
    unevenness: float = 1.0,
) -> float:
    """Seconds of encoders that embed together: engines are built one after the other, starts go together,
    those of one device take turns, devices work side by side. Groups come one after the other.

    Args:
        tiles: to be encoded, by encoder.
        trials: of each encoder.
        devices: of each encoder.
        groups: names of encoders that are in memory together; none: all are.
        unevenness: of how slides are shared out among workers.

    Raises:
        ConfigError: a speed is not above 0.
    """
    seconds = sum(trials[name].build_s for name in tiles)
    for group in groups or [list(tiles)]:
        busy: dict[str, float] = {}
        for name in group:
            if (speed := trials[name].tiles_per_s) <= 0:
                raise ConfigError(f"the speed of {name} must be above 0 tiles/s, and is {speed:g}")
            busy[devices[name]] = busy.get(devices[name], 0.0) + tiles[name] / speed
        seconds += max((trials[name].start_s for name in group), default=0.0)
        seconds += max(busy.values(), default=0.0) * unevenness
    return seconds


# known hardware ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """A GPU, by what others have measured on it.

    Attributes:
        tflops: that its encoders reach, TFLOP/s: measured images/s times GFLOP of that encoder.
        watts: its board power, by NVIDIA's data sheet.
        source: of the figure.
    """

    name: str
    tflops: float
    watts: float
    source: str


#: GFLOP (2 x MAC) of timm's vit_huge_patch14_224, whose speed is published for many GPUs.
VIT_HUGE_GFLOP = 334.6
#: GFLOP of the smallest encoder whose speed is taken from that one's: of smaller ones launches and memory
#: decide (ViT-S/16 has 9, ResNet-50 8).
LEAST_GFLOPS = 4.0
_TIMM = "timm's published inference benchmark, ViT-H/14 at 224 px, compiled: {} images/s"
HARDWARE = (
    Hardware("RTX 4090", 398 * VIT_HUGE_GFLOP / 1000, 450, _TIMM.format(398)),
    Hardware("RTX 5090", 505 * VIT_HUGE_GFLOP / 1000, 575, _TIMM.format(505)),
    Hardware("RTX PRO 6000", 598 * VIT_HUGE_GFLOP / 1000, 600, _TIMM.format(598)),
)


def on_hardware(hardware: Hardware, tiles: Mapping[str, int], gflops: Mapping[str, float]) -> float:
    """Seconds of encoding on a GPU at the speed that it reaches; reading may take longer.

    Args:
        tiles, gflops: of each encoder, GFLOP per tile.
    """
    return sum(count * gflops[name] for name, count in tiles.items()) / (1000 * hardware.tflops)
