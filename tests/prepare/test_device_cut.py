"""The device's cutting, run on the CPU, against OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from slide2vec.prepare.device_cut import area_taps, cut_tiles_on_device, reduce_whole

OFFSETS = [[(0, 0), (336, 672), (456, 84)], [(0, 0), (333, 77), (451, 600)]]


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def expected(pixels: np.ndarray, x: int, y: int, read: int) -> np.ndarray:
    tile = np.ascontiguousarray(pixels[y : y + read, x : x + read])
    return tile if read == 224 else cv2.resize(tile, (224, 224), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("read", [224, 448, 672, 896])
def test_whole_ratios_equal_opencv(read: int, offsets: list[tuple[int, int]]) -> None:
    pixels = image(1568, 1356)
    targets = torch.zeros((3, 224, 224, 3), dtype=torch.uint8)
    cut_tiles_on_device(torch.from_numpy(pixels), np.array(offsets), read, list(targets))
    for (x, y), target in zip(offsets, targets, strict=True):
        np.testing.assert_array_equal(target.numpy(), expected(pixels, x, y, read))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("read", [225, 256, 301, 336, 447, 500, 700])
def test_fractional_ratios_equal_opencv(
    read: int, offsets: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slide2vec.prepare.device_cut._AT_ONCE", 2 * read * read * 3)
    pixels = image(1568, 1356)
    targets = np.zeros((3, 224, 224, 3), np.uint8)
    cut_tiles_on_device(torch.from_numpy(pixels), np.array(offsets), read, list(targets))
    for (x, y), target in zip(offsets, targets, strict=True):
        np.testing.assert_array_equal(target, expected(pixels, x, y, read))


def test_halves_are_rounded_as_opencv_does() -> None:
    for ratio in (2, 4):
        cells = np.repeat(np.arange(256, dtype=np.uint8), ratio).reshape(1, -1).repeat(ratio, 0)
        cells[: ratio // 2] = np.minimum(cells[: ratio // 2], 254) + 1  # averages that end in a half
        pixels = np.stack([cells] * 3, axis=-1)
        found = reduce_whole(torch.from_numpy(pixels), ratio).numpy()
        np.testing.assert_array_equal(found, cv2.resize(pixels, (256, 1), interpolation=cv2.INTER_AREA))


def test_shares_of_every_pixel_sum_to_one() -> None:
    first, weights = area_taps(301, 224, torch.device("cpu"))
    assert weights.shape == (224, 3)
    assert torch.allclose(weights.sum(1), torch.ones(224), atol=1e-5)
    given = torch.zeros(304).index_add_(0, (first[:, None] + torch.arange(3)).ravel(), weights.ravel())
    assert torch.allclose(given[:301], torch.full((301,), 224 / 301), atol=1e-5) and not given[301:].any()
