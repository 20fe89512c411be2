"""What the events of a run add up to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from slide2vec.progress.events import (
    ProgressEvent,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
)

__all__ = ["RunState", "failure"]

#: Seconds over which the speed is averaged.
WINDOW_S = 20.0


def failure(event: SlideFailed) -> str:
    """A failed slide and why, in a line."""
    reason = " ".join(str(event.error).split()) or type(event.error).__name__
    prefix = f"slide {event.sample_id}: "
    return f"slide {event.sample_id} failed: {reason.removeprefix(prefix)}"


class RunState:
    """What the events of a run say so far."""

    def __init__(self, slides: int, preset: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.slides, self.preset = slides, preset
        self.finished = self.failed = self.planned = self.tiles = 0
        self._tiles_of: dict[str, int] = {}
        self._known = 0
        self._clock = clock
        self._recent = deque([(clock(), 0)])

    def take(self, event: ProgressEvent) -> None:
        """Count an event in."""
        match event:
            case SlidePlanned(name, tiles, _):
                self.planned += 1
                self._known += tiles
                self._tiles_of[name] = tiles
            case TilesEncoded(count):
                self.tiles += count
                self._note_time()
            case SlideFinished(name, _):
                self.finished += 1
                self._tiles_of.pop(name, None)
            case SlideFailed(name, _):
                self.failed += 1
                self.planned += name not in self._tiles_of
                self._known -= self._tiles_of.pop(name, 0)

    def _note_time(self) -> None:
        now = self._clock()
        self._recent.append((now, self.tiles))
        while len(self._recent) > 2 and now - self._recent[1][0] >= WINDOW_S:
            self._recent.popleft()

    @property
    def known_tiles(self) -> int:
        """Tiles of the slides planned so far."""
        return max(self._known, self.tiles)

    @property
    def all_planned(self) -> bool:
        """Whether the number of tiles is final."""
        return self.planned >= self.slides

    @property
    def stage(self) -> str:
        """What is going on, in a few words."""
        if self.finished + self.failed >= self.slides:
            return "finishing"
        if not self._tiles_of:
            return "finding tissue"
        return f"embedding {next(iter(self._tiles_of))}"

    def tiles_per_second(self) -> float:
        """Speed of late; 0 before the first tiles."""
        since, before = self._recent[0]
        until, now = self._recent[-1]
        return (now - before) / (until - since) if until > since else 0.0

    def seconds_left(self) -> float | None:
        """An estimate that takes slides not planned yet for average ones; None while there is no speed."""
        speed = self.tiles_per_second()
        planned = self.planned - self.failed
        if speed <= 0 or planned <= 0:
            return None
        unplanned = max(0, self.slides - self.planned)
        total = self.known_tiles * (1 + unplanned / planned)
        return max(0.0, total - self.tiles) / speed
