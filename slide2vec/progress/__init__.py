"""Progress of a run: typed events, and where they go.

A run emits events to the active reporter. Without one installed, a live display is shown in an
interactive terminal or a notebook, and nothing elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

__all__ = [
    "NullReporter",
    "ProgressEvent",
    "ProgressReporter",
    "RunFinished",
    "RunStarted",
    "RunSummary",
    "SlideFailed",
    "SlideFinished",
    "SlidePlanned",
    "StationTime",
    "TilesEncoded",
    "activate_progress_reporter",
    "active_reporter",
    "live_progress",
    "merged",
]


@dataclass(frozen=True)
class StationTime:
    """How one station (plan, read, prepare, encode, collect) spent a run.

    Attributes:
        name: of the station.
        workers: threads that shared its work.
        busy_s: seconds of work, summed over its workers.
        waiting_s: seconds its workers waited for input or for room downstream.
    """

    name: str
    workers: int
    busy_s: float
    waiting_s: float

    def utilisation(self, seconds: float) -> float:
        """Share of `seconds` its workers were busy, 0 to 1."""
        return min(1.0, self.busy_s / (self.workers * seconds)) if seconds > 0 else 0.0


@dataclass(frozen=True)
class RunSummary:
    """What a run did and what held it back.

    Attributes:
        slides, failed: embedded slides and failed ones.
        tiles: encoded tiles of the embedded slides.
        seconds: wall time of the stream.
        stations: in stream order.
        bottleneck: name of the station that was busiest.
        roads: how slides were read (a reader's name, "raw, nvimgcodec on cuda:0", …) -> how many.
    """

    slides: int
    failed: int
    tiles: int
    seconds: float
    stations: tuple[StationTime, ...]
    bottleneck: str
    roads: Mapping[str, int] = field(default_factory=dict)

    @property
    def tiles_per_second(self) -> float:
        """Tiles divided by wall time."""
        return self.tiles / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """One sentence: how much, how fast, and what held it back."""
        slides = f"{self.slides:,} slide{'' if self.slides == 1 else 's'}"
        failed = f" ({self.failed:,} failed)" if self.failed else ""
        done = f"{self.tiles:,} tile{'' if self.tiles == 1 else 's'} of {slides}{failed}"
        rate = self.tiles_per_second
        speed = f"{self.seconds:.1f} s, {rate:,.{0 if rate >= 10 else 1}f} tiles/s"
        return f"{done} in {speed}; bottleneck: {self.bottleneck}{self._bottleneck_share()}{self._read_by()}"

    def _read_by(self) -> str:
        roads = ", ".join(f"{road} ({count:,})" for road, count in self.roads.items())
        return f"; read by {roads}" if roads else ""

    def _bottleneck_share(self) -> str:
        """How busy the bottleneck was, in brackets."""
        for station in self.stations:
            if station.name == self.bottleneck:
                return f" (busy {station.utilisation(self.seconds):.0%})"
        return ""


def merged(summaries: Iterable[RunSummary], seconds: float) -> RunSummary:
    """One summary of several streams that ran side by side for so long."""
    summaries = list(summaries)
    stations: dict[str, StationTime] = {}
    roads: Counter[str] = Counter()
    for summary in summaries:
        roads.update(summary.roads)
        for each in summary.stations:
            so_far = stations.get(each.name, StationTime(each.name, 0, 0.0, 0.0))
            stations[each.name] = StationTime(
                each.name,
                so_far.workers + each.workers,
                so_far.busy_s + each.busy_s,
                so_far.waiting_s + each.waiting_s,
            )
    slowest = max(summaries, key=lambda summary: summary.tiles, default=None)
    return RunSummary(
        slides=sum(summary.slides for summary in summaries),
        failed=sum(summary.failed for summary in summaries),
        tiles=sum(summary.tiles for summary in summaries),
        seconds=seconds,
        stations=tuple(stations.values()),
        bottleneck=slowest.bottleneck if slowest else "",
        roads=dict(roads),  # a Counter does not survive dataclasses.asdict
    )


@dataclass(frozen=True)
class RunStarted:
    """A call begins with `slides` slides."""

    slides: int
    preset: str


@dataclass(frozen=True)
class SlidePlanned:
    """A slide's tiles are known and will be read with `backend`."""

    sample_id: str
    tiles: int
    backend: str


@dataclass(frozen=True)
class TilesEncoded:
    """`count` more tiles have been through the encoder, of one slide where it is named."""

    count: int
    sample_id: str | None = None


@dataclass(frozen=True)
class SlideFinished:
    """All embeddings of a slide are there."""

    sample_id: str
    tiles: int


@dataclass(frozen=True)
class SlideFailed:
    """A slide could not be embedded; the run goes on."""

    sample_id: str
    error: Exception


@dataclass(frozen=True)
class RunFinished:
    """The call is over."""

    summary: RunSummary


ProgressEvent: TypeAlias = (
    RunStarted | SlidePlanned | TilesEncoded | SlideFinished | SlideFailed | RunFinished
)


class ProgressReporter(Protocol):
    """Receives events, from one thread at a time."""

    def emit(self, event: ProgressEvent) -> None:
        """Take note of an event; must not raise and should return at once."""

    def close(self) -> None:
        """The reporter is no longer active."""


class NullReporter:
    """Drops every event."""

    def emit(self, event: ProgressEvent) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


_active: ContextVar[ProgressReporter | None] = ContextVar("slide2vec_progress_reporter", default=None)


def active_reporter() -> ProgressReporter:
    """The installed reporter, or one that drops everything."""
    return _active.get() or NullReporter()


@contextmanager
def activate_progress_reporter(reporter: ProgressReporter) -> Iterator[ProgressReporter]:
    """Send the events of every call made in the block to `reporter`, which is closed at its end."""
    token = _active.set(reporter)
    try:
        yield reporter
    finally:
        # A generator may be resumed in another context than it began in (the next cell of a
        # notebook, say); what it set ended with that context then.
        with suppress(ValueError):
            _active.reset(token)
        reporter.close()


@contextmanager
def live_progress() -> Iterator[None]:
    """Show the progress of the calls made in the block on stderr, if somebody is there to see it.

    That is in an interactive terminal or a notebook. A reporter that is installed already stays
    the only one.
    """
    if _active.get() is not None or not (in_notebook() or in_terminal()):
        yield
        return
    from slide2vec.progress.live import LiveReporter  # here, because only a display needs rich

    with activate_progress_reporter(LiveReporter()):
        yield


def in_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    stream = sys.stderr
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
