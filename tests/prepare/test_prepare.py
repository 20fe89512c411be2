"""Cutting against OpenCV tile by tile, the transform against torchvision on PIL images."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from slide2vec.prepare import cut_tiles
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import Transform

#: Both resizes round twice (once per axis), in fixed point of different widths: most pixels agree,
#: a few differ by one grey level, and a handful in a million by two. In units of the smallest std.
GREY_LEVEL = 1.01 / 255 / 0.224


@cache
def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour with texture, as tissue has."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 1.5)
    blurred.flags.writeable = False  # it is every test's
    return blurred


@pytest.mark.parametrize("read", [448, 224, 301, 672, 896])
@pytest.mark.parametrize("offsets", [[(0, 0), (336, 672), (456, 84)], [(0, 0), (333, 77), (451, 600)]])
def test_cut_equals_area_averaging_of_each_tile(read: int, offsets: list[tuple[int, int]]) -> None:
    """Offsets that are multiples of every ratio, so that blocks are reduced as a whole; and others."""
    pixels = image(1568, 1356)
    targets = np.zeros((3, 224, 224, 3), np.uint8)
    cut_tiles(pixels, np.array(offsets), read, list(targets))
    for (x, y), target in zip(offsets, targets, strict=True):
        tile = np.ascontiguousarray(pixels[y : y + read, x : x + read])
        assert np.array_equal(target, cv2.resize(tile, (224, 224), interpolation=cv2.INTER_AREA))


EVEN, ODD, BY_THREE = [(0, 0), (16, 32), (34, 2)], [(0, 0), (16, 32), (34, 3)], [(0, 0), (33, 3), (9, 45)]


@pytest.mark.parametrize(
    ("read", "offsets", "resized"),
    [
        (8, EVEN, []),
        (16, EVEN, [((70, 60), (30, 35))]),
        (24, BY_THREE, [((69, 60), (20, 23))]),
        (16, ODD, [((16, 16), (8, 8))] * 3),
        (24, EVEN, [((24, 24), (8, 8))] * 3),
        (12, EVEN, [((12, 12), (8, 8))] * 3),
        (4, EVEN, [((4, 4), (8, 8))] * 3),
    ],
)
def test_cut_reduces_a_block_at_once_where_the_pixels_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
    read: int,
    offsets: list[tuple[int, int]],
    resized: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    """Tiles of 8 px out of 61 x 70 px: what OpenCV is asked to resize, (rows, columns) -> (width, height)."""
    pixels, resize, calls = image(70, 61), cv2.resize, []

    def recorded(given: np.ndarray, size: tuple[int, int], **more: object) -> np.ndarray:
        calls.append((given.shape[:2], tuple(size)))
        return resize(given, size, **more)  # type: ignore[no-any-return,call-overload]

    targets = np.zeros((3, 8, 8, 3), np.uint8)
    monkeypatch.setattr(cv2, "resize", recorded)
    cut_tiles(pixels, np.array(offsets), read, list(targets))
    assert calls == resized
    for (x, y), target in zip(offsets, targets, strict=True):
        tile = np.ascontiguousarray(pixels[y : y + read, x : x + read])
        assert np.array_equal(target, resize(tile, (8, 8), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("read", [8, 16])
def test_cut_has_a_target_for_each_tile(read: int) -> None:
    pixels, targets = image(70, 61), np.zeros((1, 8, 8, 3), np.uint8)
    cut_tiles(pixels, np.array(EVEN[1:2]), read, list(targets))
    tile = np.ascontiguousarray(pixels[32 : 32 + read, 16 : 16 + read])
    assert np.array_equal(targets[0], cv2.resize(tile, (8, 8), interpolation=cv2.INTER_AREA))
    with pytest.raises(ValueError, match="shorter"):
        cut_tiles(pixels, np.array(EVEN), read, list(targets))


@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (248, 224), (256, 224)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [224, 256, 300])
def test_transform_equals_torchvision(resize: int, crop: int, interpolation: str, side: int) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    recipe = Transform(resize=resize, crop=crop, interpolation=interpolation, mean=mean, std=std)  # type: ignore[arg-type]
    tiles = np.stack([image(side, side, seed) for seed in range(3)])
    reference = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    expected = torch.stack([reference(Image.fromarray(tile)) for tile in tiles])
    found = TorchPreparer(recipe, torch.device("cpu")).prepare(torch.from_numpy(tiles))
    assert found.shape == expected.shape and found.dtype == torch.float32
    difference = (found - expected).abs()
    if side == resize:
        assert difference.max() < 1e-5
    else:
        assert difference.max() <= 2 * GREY_LEVEL
        assert (difference > GREY_LEVEL).float().mean() < 1e-4
        assert difference.mean() < 0.05 * GREY_LEVEL  # one pixel in twenty off by one


@pytest.mark.parametrize(("side", "resize", "crop"), [(224, 224, 224), (256, 248, 224)])
def test_pixels_for_engines_that_normalise(side: int, resize: int, crop: int) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    recipe = Transform(resize=resize, crop=crop, mean=mean, std=std)
    tiles = torch.from_numpy(np.stack([image(side, side, seed) for seed in range(3)]))
    plain = TorchPreparer(recipe, torch.device("cpu")).prepare(tiles)
    found = TorchPreparer(recipe, torch.device("cpu"), "uint8_nhwc").prepare(tiles)
    assert found.shape == (3, crop, crop, 3) and found.dtype == torch.uint8 and found.is_contiguous()
    normalised = (found.permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert torch.allclose(normalised, plain, atol=1e-5)
