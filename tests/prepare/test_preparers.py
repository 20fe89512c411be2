"""DALI's and Triton's preparers against torchvision on PIL images and against PyTorch's."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import transforms

from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.prepare import choose, choose_preparer, dali_preparer, triton_preparer
from slide2vec.prepare.dali_preparer import DaliPreparer
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.prepare.triton_preparer import TritonPreparer
from slide2vec.recipes import Transform
from slide2vec.runtime.base import Layout

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: One grey level of normalised pixels, at the smallest standard deviation.
GREY_LEVEL = 1 / 255 / 0.224
#: DALI keeps fractions between the two axes where Pillow rounds: mostly one grey level apart, on noise
#: as here in every fifth pixel. Without antialias it would be 86.
DALI_MOST, DALI_MEAN = 2.01, 0.3
#: A product and a sum in single precision.
FLOAT = 1e-5


def image(side: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1.5)


def batch(side: int, count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.stack([image(side, seed) for seed in range(count)]))


def recipe(resize: int, crop: int, interpolation: str = "bicubic") -> Transform:
    return Transform(resize=resize, crop=crop, interpolation=interpolation, mean=MEAN, std=STD)  # type: ignore[arg-type]


def torchvisions(tiles: torch.Tensor, transform: Transform) -> torch.Tensor:
    mode = transforms.InterpolationMode(transform.interpolation)
    reference = transforms.Compose(
        [
            transforms.Resize(transform.resize, interpolation=mode),
            transforms.CenterCrop(transform.crop),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return torch.stack([reference(Image.fromarray(tile.numpy())) for tile in tiles])


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (slide2vec[cuda])")


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (248, 224), (225, 224), (227, 224)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [224, 256, 448])
def test_dali_equals_torchvision(side: int, interpolation: str, resize: int, crop: int) -> None:
    transform = recipe(resize, crop, interpolation)
    tiles = batch(side)
    expected, found = torchvisions(tiles, transform), DaliPreparer(transform, CPU).prepare(tiles)
    assert found.shape == expected.shape and found.dtype == torch.float32 and found.is_contiguous()
    difference = (found - expected).abs()
    if side == resize:
        assert difference.max() < FLOAT
    else:
        assert difference.max() <= DALI_MOST * GREY_LEVEL and difference.mean() <= DALI_MEAN * GREY_LEVEL


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize(("side", "resize", "crop"), [(224, 224, 224), (256, 248, 224), (248, 248, 223)])
def test_dali_for_engines_that_normalise(side: int, resize: int, crop: int) -> None:
    transform, tiles = recipe(resize, crop), batch(side)
    expected = TorchPreparer(transform, CPU, "uint8_nhwc").prepare(tiles)
    found = DaliPreparer(transform, CPU, "uint8_nhwc").prepare(tiles)
    assert found.shape == expected.shape and found.dtype == torch.uint8 and found.is_contiguous()
    difference = (found.int() - expected.int()).abs()
    if side == resize:
        assert difference.max() == 0
    else:
        assert difference.max() <= DALI_MOST and difference.float().mean() <= DALI_MEAN


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
def test_what_dali_gave_is_not_written_again(layout: Layout) -> None:
    """Batches in flight hold their pixels while the next ones are prepared; the last batch is smaller."""
    preparer = DaliPreparer(recipe(224, 224), CPU, layout)
    given = [batch(224, 4), batch(224, 4).flip(0), batch(224, 2), batch(224, 5)]
    found = [preparer.prepare(tiles.clone()) for tiles in given]
    expected = TorchPreparer(recipe(224, 224), CPU, layout)
    for tiles, pixels in zip(given, found, strict=True):
        assert torch.allclose(pixels.float(), expected.prepare(tiles).float(), atol=FLOAT)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs the kernel on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(importlib.import_module("slide2vec.prepare.triton_kernel"))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
@pytest.mark.parametrize(("side", "crop"), [(64, 64), (70, 64), (65, 64), (67, 64)])
def test_the_triton_kernel(side: int, crop: int, layout: Layout) -> None:
    transform, tiles = recipe(side, crop), batch(side)
    expected = TorchPreparer(transform, CPU, layout).prepare(tiles)
    found = TritonPreparer(transform, CPU, layout).prepare(tiles)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found.float() - expected.float()).abs().max() < FLOAT
    if layout == "float32_nchw":
        assert (found - torchvisions(tiles, transform)).abs().max() < FLOAT


@pytest.mark.usefixtures("triton")
def test_triton_says_that_it_does_not_resize() -> None:
    with pytest.raises(ConfigError, match=r"does not resize.*requested_tile_size_px=248"):
        choose_preparer("triton", recipe(248, 224), CPU, "float32_nchw", 256)


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match='preparer="triton" needs an NVIDIA GPU, and the model is on cpu'):
        choose_preparer("triton", recipe(224, 224), CPU, "float32_nchw", 224)


def test_auto_on_a_cpu_is_pytorch() -> None:
    assert isinstance(choose_preparer("auto", recipe(224, 224), CPU, "float32_nchw", 224), TorchPreparer)


@pytest.mark.usefixtures("dali")
def test_what_is_asked_for_is_given() -> None:
    for name, kind in (("torch", TorchPreparer), ("dali", DaliPreparer)):
        assert isinstance(choose_preparer(name, recipe(224, 224), CPU, "uint8_nhwc", 256), kind)
    with pytest.raises(ConfigError, match="unknown preparer 'dolly'"):
        choose_preparer("dolly", recipe(224, 224), CPU, "float32_nchw", 224)


class Nearest(TorchPreparer):
    """Resizes without an antialias."""

    def _interpolate(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(pixels, (size, size), mode="nearest")


class Smooth(TorchPreparer):
    """Without an antialias, too: smooth patterns alone would hardly tell."""

    def _interpolate(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")


class Fails(TorchPreparer):
    def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
        raise OSError("no C compiler")


@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
@pytest.mark.parametrize("wrong", [Nearest, Smooth])
def test_a_preparer_with_other_pixels_is_told(wrong: Any, layout: Layout) -> None:
    expected = TorchPreparer(recipe(224, 224), CPU, layout)
    assert choose._difference(expected, expected, 300) is None
    assert "grey levels" in str(choose._difference(wrong(recipe(224, 224), CPU, layout), expected, 300))
    if dali_preparer.unavailable() is None:
        assert choose._difference(DaliPreparer(recipe(224, 224), CPU, layout), expected, 300) is None


def test_auto_goes_on_to_the_next(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a word; where none is left but PyTorch, it says why, in one warning."""
    kinds = {"broken": Fails, "wrong": Nearest, "right": TorchPreparer}
    monkeypatch.setattr(choose, "_made", lambda name, *how: kinds[name](*how))
    how: Any = recipe(64, 64), CPU, "float32_nchw", 80
    found = choose._first(["broken", "wrong", "right"], *how)
    assert isinstance(found, TorchPreparer) and not caplog.records
    found = choose._first(["broken", "wrong"], *how)
    assert type(found) is TorchPreparer
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "prepared by PyTorch on cpu" in record.message
    assert "broken: no C compiler; wrong: its pixels differ by" in record.message


@pytest.mark.usefixtures("triton")
def test_auto_on_a_gpu_takes_triton_where_nothing_is_resized() -> None:
    for side, kind in ((64, TritonPreparer), (80, DaliPreparer)):
        if kind is TritonPreparer or dali_preparer.unavailable() is None:
            found = choose._first(choose._AUTO_ON_GPU, recipe(64, 64), CPU, "float32_nchw", side)
            assert isinstance(found, kind)


def test_triton_launches_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current: launched elsewhere the kernel would be given addresses of another GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    current = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    launched: list[torch.device] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", device)
    preparer = TritonPreparer(recipe(64, 64), torch.device("cuda:1"))
    preparer._kernel = Kernel()
    with FakeTensorMode():
        preparer.prepare(torch.zeros((2, 64, 64, 3), dtype=torch.uint8))
    assert launched == [torch.device("cuda:1")]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_preparer, "unavailable", lambda: 'pip install "slide2vec[cuda]"')
    monkeypatch.setattr(triton_preparer, "find_spec", lambda name: None)
    for name, message in (("dali", r"\[cuda\]"), ("triton", "Triton is not installed")):
        with pytest.raises(ExtraMissingError, match=message):
            choose_preparer(name, recipe(224, 224), CPU, "float32_nchw", 224)
