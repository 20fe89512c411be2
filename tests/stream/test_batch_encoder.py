"""Batches in flight: features are not read before they are there, and memory that runs out loses nothing."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from late_streams import LateStream

from slide2vec.errors import EngineError
from slide2vec.stream import batch_encoder
from slide2vec.stream.batch_encoder import IN_FLIGHT, BatchEncoder
from slide2vec.stream.cuda_streams import device_stream
from slide2vec.stream.station_timers import StationTimers

CPU = torch.device("cpu")


class Engine:
    """Means of the pixels; runs out of memory above `limit` tiles, as a GPU does."""

    device, feature_dim = CPU, 3

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.sizes = limit, []  # type: ignore[var-annotated]

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.limit:
            raise torch.OutOfMemoryError(f"{len(pixels)} tiles")
        self.sizes.append(len(pixels))
        return pixels.float().mean(dim=(1, 2))


def made(engine: Any, batch_size: int = 16) -> BatchEncoder:
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    return BatchEncoder(engine, preparer, StationTimers(), batch_size=batch_size)


def tiles(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 15])
def test_batches_that_do_not_fit_are_halved_and_lose_nothing(
    limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(limit)
    work = made(engine)
    for count in (16, 16, 7, 1):
        given = tiles(count)
        with caplog.at_level(logging.WARNING):
            in_flight = work.submit(given, [])
        in_flight.done.synchronize()
        assert torch.equal(in_flight.features, given.float().mean(dim=(1, 2)))
        work.release(in_flight)
    assert max(engine.sizes) <= limit and work.most == max(engine.sizes)
    assert "batch_size=" in caplog.text and len(caplog.records) <= 4


def test_one_tile_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        made(Engine(0)).submit(tiles(4), [])


def test_memory_of_the_failed_attempt_is_let_go() -> None:
    """An exception that is still handled keeps the tensors of its frames."""
    alive: list[Any] = []

    class Watching(Engine):
        def run(self, pixels: torch.Tensor) -> torch.Tensor:
            import sys

            alive.append(sys.exc_info()[0])
            return super().run(pixels)

    made(Watching(4)).submit(tiles(16), [])
    assert alive == [None] * len(alive) and len(alive) > 4


def test_features_come_after_their_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_encoder, "device_stream", LateStream)
    timers = StationTimers()
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    work = BatchEncoder(Engine(), preparer, timers, batch_size=16)
    given = tiles(16)
    in_flight = work.submit(given, [])
    assert not in_flight.done.query() and in_flight.features.isnan().all()
    in_flight.done.synchronize()
    assert torch.equal(in_flight.features, given.float().mean(dim=(1, 2)))


def test_work_begins_after_the_tiles_are_written() -> None:
    waited: list[str] = []
    event: Any = SimpleNamespace(synchronize=lambda: waited.append("written"))
    engine = Engine()
    run = engine.run
    engine.run = lambda pixels: (waited.append("run"), run(pixels))[1]  # type: ignore[method-assign]
    made(engine).submit(tiles(2), [event])
    assert waited == ["written", "run"]


def test_time_on_the_device_is_counted() -> None:
    timers = StationTimers()
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    work = BatchEncoder(Engine(), preparer, timers, batch_size=4)
    in_flight = work.submit(tiles(4), [])
    work.release(in_flight)
    times = {station.name: station.busy_s for station in timers.times({"prepare": 1, "encode": 1})}
    assert 0 < times["encode"] < 10 and 0 < times["prepare"] < 10


def test_lanes_of_a_cpu_are_trivial() -> None:
    tested = device_stream(CPU)
    with tested.current():
        event = tested.record()
    assert event.query() and IN_FLIGHT >= 2


@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (4, 3), (6, 3), (5, 2), (3,), (5, 3, 1)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """One row, or one column, would be written for all tiles without a word."""

    class Odd(Engine):
        def run(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.ones(shape)

    expected = rf"{re.escape(str(shape))} for 5 tiles, not \(5, 3\)"
    with pytest.raises(EngineError, match=expected):
        made(Odd()).submit(tiles(5), [])
