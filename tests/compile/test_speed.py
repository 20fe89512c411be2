"""How engines are timed: on a clock that only batches move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slide2vec.compile import speed

SECONDS = 0.01


class Clock:
    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1


class Timed:
    def __init__(self, device: str, clock: Clock) -> None:
        self.device, self.clock, self.runs = torch.device(device), clock, 0

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        self.clock.now += SECONDS
        self.runs += 1
        return batch


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", 4), ("cpu", 0)])
def test_no_batch_is_waited_for(monkeypatch: pytest.MonkeyPatch, device: str, waits: int) -> None:
    """Once before and once after a round, and the trial that says how long a round is."""
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    engine: Any = Timed(device, clock)
    assert speed.seconds_per_batch(engine, torch.zeros(4)) == pytest.approx(SECONDS)
    assert clock.waits == waits
    assert engine.runs * SECONDS >= speed.ROUND_S


def test_a_size_has_its_cuda_graph_before_it_is_timed() -> None:
    """It is captured when it comes the second time (`slide2vec.runtime.cuda_graphs`)."""
    engine: Any = Timed("cpu", Clock())
    speed.warm(engine, torch.zeros(4))
    assert engine.runs >= 2
