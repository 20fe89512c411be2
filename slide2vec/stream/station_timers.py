"""How long each station works and waits."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from slide2vec.progress import StationTime

__all__ = ["StationTimers"]


class StationTimers:
    """Busy and waiting seconds per station, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._waiting: defaultdict[str, float] = defaultdict(float)

    def busy(self, station: str) -> AbstractContextManager[None]:
        """The block is work of a station."""
        return self._timed(self._busy, station)

    def waiting(self, station: str) -> AbstractContextManager[None]:
        """In the block a station waits."""
        return self._timed(self._waiting, station)

    @contextmanager
    def _timed(self, seconds: defaultdict[str, float], station: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                seconds[station] += spent

    def add_busy(self, station: str, spent: float) -> None:
        """Seconds of work that a device did for a station."""
        with self._lock:
            self._busy[station] += spent

    def add(self, other: StationTimers) -> None:
        """All that another one has measured."""
        with self._lock, other._lock:
            for mine, theirs in ((self._busy, other._busy), (self._waiting, other._waiting)):
                for station, spent in theirs.items():
                    mine[station] += spent

    def times(self, workers: Mapping[str, int]) -> tuple[StationTime, ...]:
        """One record per station of `workers` (name -> number of threads)."""
        with self._lock:
            return tuple(
                StationTime(name, count, self._busy[name], self._waiting[name])
                for name, count in workers.items()
            )
