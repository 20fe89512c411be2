"""The events of a run, and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

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
    "find_bottleneck",
    "in_turn",
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
        """Share of `seconds` its workers were busy, 0 to 1. It has none where another stream's are told."""
        return min(1.0, self.busy_s / (max(1, self.workers) * seconds)) if seconds > 0 else 0.0


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
        watt_hours: that the run's GPUs and this machine's processors took; None: not measured.
        measured_by: by what, and what of them was not measured; "" where nothing was.
        readings: of several encoders, those that read the slides together ("uni + virchow2"), one group after
            the other.
        from_scratch, decoded_again: slides whose decoded tiles a later group took from the scratch, and those
            that it decoded again; each group counts.
        scratch_bytes: the most that waited there when a group was done.
    """

    slides: int
    failed: int
    tiles: int
    seconds: float
    stations: tuple[StationTime, ...]
    bottleneck: str
    roads: Mapping[str, int] = field(default_factory=dict)
    watt_hours: float | None = None
    measured_by: str = ""
    readings: tuple[str, ...] = ()
    from_scratch: int = 0
    decoded_again: int = 0
    scratch_bytes: int = 0

    @property
    def tiles_per_second(self) -> float:
        """Tiles divided by wall time."""
        return self.tiles / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """One sentence: how much, how fast, and what held it back, if anything was encoded."""
        slides = f"{self.slides:,} slide{'' if self.slides == 1 else 's'}"
        failed = f" ({self.failed:,} failed)" if self.failed else ""
        done = f"{self.tiles:,} tile{'' if self.tiles == 1 else 's'} of {slides}{failed}"
        rate = self.tiles_per_second
        speed = f", {rate:,.{0 if rate >= 10 else 1}f} tiles/s{self._seconds_each()}" if self.tiles else ""
        slowest = f"; bottleneck: {self.bottleneck}{self._bottleneck_share()}" if self.tiles else ""
        took = f"{self.seconds:.1f} s{speed}"
        return f"{done} in {took}; {self._energy()}{slowest}{self._read_by()}{self._readings()}"

    def bill(self) -> dict[str, Any]:
        """Time and energy, JSON-ready: of all, per embedded slide and per 1,000 tiles (None without any); and
        what the scratch was for, where encoders took turns."""
        return {
            "slides": self.slides,
            "failed": self.failed,
            "tiles": self.tiles,
            "seconds": self.seconds,
            "tiles_per_second": self.tiles_per_second,
            "watt_hours": self.watt_hours,
            "measured_by": self.measured_by or "not measured",
            "per_slide": self._per(self.slides),
            "per_1000_tiles": self._per(self.tiles / 1000),
            **(self._turns() if len(self.readings) > 1 else {}),
        }

    def _turns(self) -> dict[str, Any]:
        names = ("readings", "from_scratch", "decoded_again", "scratch_bytes")
        return {name: getattr(self, name) for name in names}

    def _per(self, count: float) -> dict[str, float | None]:
        whole = {"seconds": self.seconds, "watt_hours": self.watt_hours}
        return {name: value / count if count and value is not None else None for name, value in whole.items()}

    def _seconds_each(self) -> str:
        return f", {self.seconds / self.slides:.1f} s a slide" if self.slides > 1 else ""

    def _energy(self) -> str:
        """Watt-hours, and what they are of."""
        if self.watt_hours is None:
            return "energy not measured"
        each = {"a slide": self.slides if self.slides > 1 else 0, "per 1,000 tiles": self.tiles / 1000}
        rates = ", ".join(f"{self.watt_hours / n:.3g} Wh {what}" for what, n in each.items() if n)
        return f"{self.watt_hours:.3g} Wh by {self.measured_by}{': ' if rates else ''}{rates}"

    def _read_by(self) -> str:
        ways = ", ".join(
            f"{name} ({count:,} tile{'' if count == 1 else 's'})" for name, count in self.roads.items()
        )
        return f"; read by {ways}" if ways else ""

    def _readings(self) -> str:
        if len(self.readings) < 2:
            return ""
        how = f"{self.from_scratch:,} from the scratch, {self.decoded_again:,} decoded again"
        groups = ", then for ".join(self.readings)
        room = f", with {self.scratch_bytes / 1e6:,.1f} MB in the scratch" if self.scratch_bytes else ""
        return f"; slides were read {len(self.readings)} times ({how}), for {groups}{room}"

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


def in_turn(summaries: Iterable[RunSummary]) -> RunSummary:
    """One summary of several runs over the same slides, one after the other."""
    summaries = list(summaries)
    watt_hours = [each.watt_hours for each in summaries if each.watt_hours is not None]
    return replace(
        merged(summaries, sum(each.seconds for each in summaries)),
        slides=max((each.slides for each in summaries), default=0),
        failed=max((each.failed for each in summaries), default=0),
        watt_hours=sum(watt_hours) if watt_hours and len(watt_hours) == len(summaries) else None,
        measured_by=", ".join(dict.fromkeys(each.measured_by for each in summaries if each.measured_by)),
    )


def of_encoders(summaries: Mapping[str, RunSummary], seconds: float) -> RunSummary:
    """One summary of several encoders of the same slides, by name, that took so long: what encodes is told by
    encoder, for the busiest holds the others back."""
    whole = merged(
        (
            replace(summary, stations=tuple(_named(station, name) for station in summary.stations))
            for name, summary in summaries.items()
        ),
        seconds,
    )
    busiest = max(whole.stations, key=lambda station: station.utilisation(seconds), default=None)
    return replace(whole, bottleneck=busiest.name) if busiest and len(summaries) > 1 else whole


def _named(station: StationTime, encoder: str) -> StationTime:
    return replace(station, name=f"encode of {encoder}") if station.name == "encode" else station


def find_bottleneck(stations: tuple[StationTime, ...], seconds: float) -> str:
    """The station whose workers were busiest. Read and prepare share threads: the larger of the two
    answers for both."""
    by_name = {station.name: station for station in stations}
    read, prepare = by_name["read"], by_name["prepare"]
    feeding = max((read, prepare), key=lambda station: station.busy_s).name
    busy = {
        "encode": by_name["encode"].utilisation(seconds),
        feeding: read.utilisation(seconds) + prepare.utilisation(seconds),
        "plan": by_name["plan"].utilisation(seconds),
    }
    if "stage" in by_name:
        busy["stage"] = by_name["stage"].utilisation(seconds)
    return max(busy, key=lambda name: busy[name])


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
