"""The events of a run, and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = [
    "ProgressEvent",
    "RunFinished",
    "RunStarted",
    "RunSummary",
    "SlideFailed",
    "SlideFinished",
    "SlidePlanned",
    "StationTime",
    "TilesEncoded",
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
        roads: how tiles were read (a reader's name, "raw + nvimgcodec on the device", …) -> how many.
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
        roads = ", ".join(
            f"{road} ({count:,} tile{'' if count == 1 else 's'})" for road, count in self.roads.items()
        )
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
