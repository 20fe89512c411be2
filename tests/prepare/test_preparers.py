"""DALI's and Triton's preparers against torchvision on PIL images and against PyTorch's."""

from __future__ import annotations

import importlib
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
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


def test_auto_leaves_a_preparer_with_other_pixels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Nearest(TorchPreparer):
        def _interpolate(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
            return torch.nn.functional.interpolate(pixels, (size, size), mode="nearest")

    expected = TorchPreparer(recipe(224, 224), CPU)
    wrong: Any = Nearest(recipe(224, 224), CPU)
    assert choose._difference(expected, expected, 300) is None
    assert "grey levels" in str(choose._difference(wrong, expected, 300))
    if dali_preparer.unavailable() is None:
        assert choose._difference(DaliPreparer(recipe(224, 224), CPU), expected, 300) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_preparer, "unavailable", lambda: 'pip install "slide2vec[cuda]"')
    monkeypatch.setattr(triton_preparer, "find_spec", lambda name: None)
    for name, message in (("dali", r"slide2vec\[cuda\]"), ("triton", "Triton is not installed")):
        with pytest.raises(ExtraMissingError, match=message):
            choose_preparer(name, recipe(224, 224), CPU, "float32_nchw", 224)
