"""AOTInductor's engine: its runners, and the device that its kernels are launched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.package.package

from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.inductor_engine import InductorEngine
from slide2vec.stream.batch_encoder import IN_FLIGHT


def test_runners_for_every_batch_in_flight_on_its_own_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    current = ["cuda:0"]
    journal: list[tuple[Any, ...]] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    def compiled(pixels: torch.Tensor) -> torch.Tensor:
        journal.append(("run", len(pixels), current[-1]))
        return pixels.flatten(1)

    def load_package(path: str, *, num_runners: int, device_index: int) -> Any:
        journal.append(("load", num_runners, device_index, current[-1]))
        return compiled

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._inductor.package.package, "load_package", load_package)
    engine = InductorEngine(
        tmp_path / "encoder.pt2",
        device=torch.device("cuda:1"),
        precision="bf16",
        feature_dim=12,
        layout="float32_nchw",
        profile=BatchProfile(1, 4, 4),
    )
    assert engine.run(torch.zeros(6, 3, 2, 2)).shape == (6, 12)
    assert journal == [("load", IN_FLIGHT, 1, "cuda:1"), ("run", 4, "cuda:1"), ("run", 2, "cuda:1")]
