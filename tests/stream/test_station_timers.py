"""Which station holds the others up, from plain times."""

from __future__ import annotations

import pytest

from slide2vec.progress import StationTime
from slide2vec.progress.events import find_bottleneck
from slide2vec.stream.station_timers import StationTimers

SECONDS = 10.0


def stations(**busy: tuple[int, float]) -> tuple[StationTime, ...]:
    """Name -> (threads, busy seconds of all of them together)."""
    given = {"plan": (1, 1.0), "read": (2, 0.0), "prepare": (2, 0.0), "encode": (1, 5.0), **busy}
    return tuple(StationTime(name, workers, spent, 0.0) for name, (workers, spent) in given.items())


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({}, "encode"),
        # Two threads read and prepare, 12 of their 20 s: more than the encoder's 5 of 10.
        ({"read": (2, 6.5), "prepare": (2, 5.5)}, "read"),
        ({"read": (2, 5.5), "prepare": (2, 6.5)}, "prepare"),
        ({"read": (2, 5.0), "prepare": (2, 4.0)}, "encode"),
        ({"read": (4, 11.0), "prepare": (4, 1.0)}, "encode"),
        ({"plan": (2, 11.0)}, "plan"),
        ({"plan": (4, 11.0)}, "encode"),
        ({"stage": (2, 11.0)}, "stage"),
        ({"stage": (4, 11.0)}, "encode"),
    ],
)
def test_the_busiest_station_by_what_its_threads_can_do(
    busy: dict[str, tuple[int, float]], expected: str
) -> None:
    assert find_bottleneck(stations(**busy), SECONDS) == expected


def test_times_are_of_the_stations_asked_for() -> None:
    timers = StationTimers()
    for spent in (1.0, 2.0):
        timers.add_busy("read", spent)
    timers.add_busy("encode", 4.0)
    assert timers.times({"encode": 1, "read": 3, "plan": 2}) == (
        StationTime("encode", 1, 4.0, 0.0),
        StationTime("read", 3, 3.0, 0.0),
        StationTime("plan", 2, 0.0, 0.0),
    )


def test_a_block_is_work_or_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.5, 10.0, 14.0])
    monkeypatch.setattr("slide2vec.stream.station_timers.time.perf_counter", lambda: next(clock))
    timers = StationTimers()
    with timers.busy("read"):
        pass
    with pytest.raises(OSError), timers.waiting("read"):
        raise OSError
    assert timers.times({"read": 1}) == (StationTime("read", 1, 2.5, 4.0),)
