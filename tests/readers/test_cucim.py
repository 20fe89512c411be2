"""cuCIM's decoding on a GPU, on a stand-in whose copies happen when they are waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.errors import BackendError
from slide2vec.readers import cucim
from slide2vec.readers.cucim import CucimCudaReader
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide

pytestmark = pytest.mark.skipif(cucim.unavailable() is not None, reason="cuCIM is not installed")

GARBAGE = 77


class LateStream:
    """A CUDA stream: its work is done when it, or one that waits for it, is waited for on the host."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def wait_stream(self, other: LateStream) -> None:
        self.work.append(other.synchronize)

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


class Region:
    """What cuCIM gives: it puts tiles together on the default stream, and frees its memory as it goes."""

    def __init__(self, pixels: np.ndarray, default: LateStream) -> None:
        self.memory = torch.full(pixels.shape, GARBAGE, dtype=torch.uint8)
        memory = self.memory
        default.work.append(partial(memory.copy_, torch.from_numpy(pixels)))

    def __del__(self) -> None:
        self.memory.fill_(GARBAGE)


class LateTensor:
    def __init__(self, memory: torch.Tensor, stream: LateStream) -> None:
        self._memory, self._stream = memory, stream

    def clone(self) -> torch.Tensor:
        memory, copy = self._memory, torch.full_like(self._memory, GARBAGE)
        self._stream.work.append(partial(copy.copy_, memory))
        return copy


class Cuda:
    """`torch.cuda`, as far as it is used."""

    def __init__(self) -> None:
        self.default, self.ours, self.devices = LateStream(), LateStream(), [torch.device("cuda", 7)]

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.pop()

    def current_stream(self, device: torch.device) -> LateStream:
        assert device == self.devices[-1]
        return self.ours

    def default_stream(self, device: torch.device) -> LateStream:
        assert device == self.devices[-1]
        return self.default


@pytest.fixture
def reader(reference_slide: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CucimCudaReader]:
    """One whose GPU is the stand-in."""
    found = CucimCudaReader(probe(Slide(sample_id="s", image_path=reference_slide)), torch.device("cuda:0"))
    cuda, image = Cuda(), found._image

    class Image:
        def read_region(self, location: Any, size: Any, level: int, device: str) -> Region:
            assert device == "cuda" and cuda.devices[-1] == torch.device("cuda:0")
            return Region(np.asarray(image.read_region(location, size, level)), cuda.default)  # type: ignore[union-attr]

        def close(self) -> None:
            image.close()  # type: ignore[union-attr]

    class Torch:
        def __init__(self) -> None:
            self.cuda = cuda

        def as_tensor(self, region: Region, device: torch.device) -> LateTensor:
            return LateTensor(region.memory, cuda.ours)

    found._image, found._torch = Image(), Torch()  # type: ignore[assignment]
    yield found
    found.close()


def test_pixels_are_complete_and_our_own(reader: CucimCudaReader) -> None:
    """Copied after cuCIM's copies on the default stream, and before it frees its memory."""
    with cucim.CucimReader(reader.probe) as host:
        for location in ((0, 0), (1000, 700)):
            found = reader.read_region(location, 0, (300, 200))
            np.testing.assert_array_equal(found, host.read_region(location, 0, (300, 200)))


def test_only_the_first_gpu_of_a_process(reference_slide: Path) -> None:
    """cuCIM's threads copy on device 0, which nothing here could wait for on another device's streams."""
    opened = probe(Slide(sample_id="s", image_path=reference_slide))
    with pytest.raises(BackendError, match="not on cuda:1: CUDA_VISIBLE_DEVICES=1 makes it the first"):
        CucimCudaReader(opened, torch.device("cuda:1"))
    CucimCudaReader(opened, torch.device("cuda")).close()


def test_only_jpeg(real_slide: Callable[[str], Path]) -> None:
    opened = probe(Slide(sample_id="s", image_path=real_slide("generic-lzw-pyramid.tiff")))
    with pytest.raises(BackendError, match="decodes only JPEG on a GPU, not LZW"):
        CucimCudaReader(opened, torch.device("cuda:0"))
