"""Progress as lines of text, for output that nobody redraws: batch jobs, pipes, logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from slide2vec.progress.events import ProgressEvent, RunFinished, RunStarted, SlideFailed
from slide2vec.progress.state import RunState, failure

__all__ = ["LineReporter", "in_words"]

#: Seconds between two lines.
EVERY_S = 30.0


class LineReporter:
    """A progress reporter that says how far a run is every half minute, and at once what failed.

    Args:
        say: takes a line.
        clock: seconds, ever growing.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._state: RunState | None = None
        self._said_at = 0.0

    def emit(self, event: ProgressEvent) -> None:
        """See `ProgressReporter.emit`."""
        if isinstance(event, RunStarted):
            self._state, self._said_at = RunState(event.slides, event.preset, self._clock), self._clock()
        elif isinstance(event, RunFinished):
            self._state = None
        elif self._state is not None:
            self._state.take(event)
            if isinstance(event, SlideFailed):
                self._say(failure(event))
            if self._clock() - self._said_at >= EVERY_S:
                self._said_at = self._clock()
                self._say(in_words(self._state))

    def close(self) -> None:
        """Nothing is held."""


def in_words(state: RunState) -> str:
    """How far a run is, in a line."""
    through = state.finished + state.failed
    failed = f" ({state.failed:,} failed)" if state.failed else ""
    tiles = f"{state.tiles:,} of {state.known_tiles:,}{'' if state.all_planned else '+'} tiles"
    speed, left = state.tiles_per_second(), state.seconds_left()
    rest = "" if left is None else f", about {timedelta(seconds=round(left))} left"
    rate = f", {speed:,.{0 if speed >= 10 else 1}f} tiles/s" if speed else ""
    return f"{through:,} of {state.slides:,} slides{failed}, {tiles}{rate}{rest}: {state.stage}"
