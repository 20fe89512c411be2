"""How long each station works and waits."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from slide2vec.progress import StationTime

__all__ = ["Meters", "find_bottleneck"]

#: The encoder is the bottleneck unless it waits for more than this share of a run.
STARVED = 0.15


class Meters:
    """Busy and waiting seconds per station, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._waiting: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def busy(self, station: str) -> Iterator[None]:
        """The block is work of a station."""
        with self._timed(self._busy, station):
            yield

    @contextmanager
    def waiting(self, station: str) -> Iterator[None]:
        """In the block a station waits."""
        with self._timed(self._waiting, station):
            yield

    @contextmanager
    def _timed(self, seconds: defaultdict[str, float], station: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                seconds[station] += time.perf_counter() - start

    def times(self, workers: Mapping[str, int]) -> tuple[StationTime, ...]:
        """One record per station of `workers` (name -> number of threads)."""
        with self._lock:
            return tuple(
                StationTime(name, count, self._busy[name], self._waiting[name])
                for name, count in workers.items()
            )


def find_bottleneck(stations: tuple[StationTime, ...], seconds: float) -> str:
    """The station that held the run back.

    The encoder, unless it was starved; then the planner, if the readers in turn waited for slides
    most of the time, else whichever of read and prepare (they share threads) was busier.
    """
    by_name = {station.name: station for station in stations}
    if seconds <= 0 or by_name["encode"].waiting_s <= STARVED * seconds:
        return "encode"
    read, prepare = by_name["read"], by_name["prepare"]
    if read.waiting_s > 0.5 * read.workers * seconds and by_name["plan"].busy_s > read.busy_s:
        return "plan"
    return max((read, prepare), key=lambda station: station.busy_s).name
