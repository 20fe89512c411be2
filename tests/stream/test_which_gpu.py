"""Everything that is enqueued for a second GPU is enqueued on that one, whichever is current: on stand-ins
for PyTorch's, which keep track of the current GPU as CUDA does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stream_helpers import StandInDecoder
from torch._subclasses.fake_tensor import FakeTensorMode

from slide2vec.compile.batch_size import bytes_per_tile
from slide2vec.config import PreprocessingConfig
from slide2vec.prepare.gather_tiles import gather_by_torch
from slide2vec.runtime.device import pick_device
from slide2vec.runtime.inductor_engine import InductorEngine
from slide2vec.slides import Slide
from slide2vec.stream import decode_paths, plan_slide
from slide2vec.stream.cuda_streams import HostStream
from slide2vec.stream.decode_paths import DecodePath, DeviceTransfer, jpeg_path
from slide2vec.stream.device_sources import Uploaded

SECOND = torch.device("cuda:1")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The GPUs that are current, the innermost last."""
    devices = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        devices.append(chosen)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


class Stream(HostStream):
    """Of the CPU, in the place of one of the second GPU's: makes that current, as PyTorch does."""

    def __init__(self, current: list[torch.device]) -> None:
        super().__init__(torch.device("cpu"))
        self._devices = current

    @contextlib.contextmanager
    def _made_current(self) -> Iterator[None]:
        self._devices.append(SECOND)
        yield
        self._devices.pop()

    def current(self) -> contextlib.AbstractContextManager[None]:
        return self._made_current()


def test_decoding(
    current: list[torch.device], reference_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creating a decoder, its comparison, blocks, single tiles, what does not fit, and uploads."""
    where: dict[str, set[torch.device]] = {}

    def note(what: str) -> None:
        where.setdefault(what, set()).add(current[-1])

    class Decoder(StandInDecoder):
        full = False

        def decode(self, jpegs: Any, form: Any) -> Any:
            note("decode")
            if self.full and len(jpegs) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().decode(jpegs, form)

    def gather(*how: Any) -> None:
        note("gather")
        gather_by_torch(*how)

    decoder = Decoder()

    def made(device: torch.device) -> DecodePath:
        note("create")
        return jpeg_path(decoder, gather)

    class Copies(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.Tensor.copy_, torch.empty, torch.zeros):
                note(function.__name__)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(decode_paths, "device_stream", lambda device: Stream(current))
    monkeypatch.setattr(decode_paths, "DECODE_PATHS", {"fake": made})
    config = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=224, tissue_threshold=0.1)
    transfer = DeviceTransfer(torch.device("cpu"), "auto", ["fake"])
    plan = plan_slide(Slide(sample_id="s", image_path=reference_slide), config)
    with Copies():
        bound = transfer.bind(plan)
        tiles = transfer.allocate((len(plan.tiling), 224, 224, 3))
        block = list(tiles[bound.source.blocks[0]])
        for decoder.full in (False, True):  # type: ignore[misc]
            bound.source.place(0, bound.source.fetch(0), block)
        bound.source.read_tile(0, tiles[0])
        uploaded = Uploaded(plan.source, transfer.stream)
        uploaded.place(0, uploaded.fetch(0), block)
    assert bound.decode_path == "fake on the device" and len(bound.decoded_by()) >= 1
    assert set(where) == {"create", "decode", "gather", "copy_", "empty", "zeros"}
    assert set().union(*where.values()) == {SECOND}


def test_measuring_what_fits(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("spoils captures in other threads"))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)

    def note(pixels: torch.Tensor) -> torch.Tensor:
        found.append(current[-1])
        return pixels

    with FakeTensorMode():
        bytes_per_tile(SimpleNamespace(device=SECOND, run=note), SimpleNamespace(prepare=note), 8, 16)  # type: ignore[arg-type]
    assert found == [SECOND, SECOND]


def test_a_compiled_package(current: list[torch.device]) -> None:
    engine = InductorEngine.__new__(InductorEngine)
    engine.device, engine._most, found = SECOND, 4, []
    engine._compiled = lambda pixels: found.append(current[-1]) or pixels
    engine.run(torch.from_numpy(np.zeros((6, 3), np.float32)))
    assert found == [SECOND, SECOND]


def test_a_gpu_without_a_number_is_the_one_that_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading threads, where another one may be current, are to use the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: SECOND.index)
    assert pick_device("cuda") == SECOND and pick_device("cuda:0").index == 0
