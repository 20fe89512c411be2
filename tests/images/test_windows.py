"""Patches, padding and windows, in plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slide2vec.errors import ConfigError
from slide2vec.images.windows import blended, dense_geometry, padded, windows_of


def test_geometry_is_padded_below_and_to_the_right() -> None:
    found = dense_geometry((230, 224), (14, 16))
    assert found.encoded_size == (238, 224) and found.grid_shape == (17, 14) and found.pad == (8, 0)
    assert found.crop_box == (0, 0, 224, 230)


@pytest.mark.parametrize(
    ("size", "window", "overlap", "side", "starts"),
    [
        (448, None, 0.0, 448, (0,)),
        (448, 448, 0.5, 448, (0,)),
        (448, 1000, 0.5, 448, (0,)),
        (448, 224, 0.0, 224, (0, 224)),
        (448, 224, 0.5, 224, (0, 112, 224)),
        (448, 220, 0.25, 224, (0, 168, 224)),  # rounded up to the patch; the last is flush with the edge
        (450, 224, 0.0, 224, (0, 224, 238)),
        (64, 14, 0.99, 14, (0, 14, 28, 42, 56)),  # a step is a patch at least
    ],
)
def test_windows_begin_at_patches(
    size: int, window: int | None, overlap: float, side: int, starts: tuple[int, ...]
) -> None:
    found = windows_of(dense_geometry((size, size), (14, 14)), window, overlap)
    assert found.size == (side, side) and found.rows == found.columns == starts


def test_windows_of_oblong_pictures() -> None:
    found = windows_of(dense_geometry((100, 60), (10, 20)), 40, 0.5)
    assert found.size == (40, 40)
    assert found.rows == (0, 20, 40, 60) and found.columns == (0, 20)


def test_padding_continues_the_picture() -> None:
    geometry = dense_geometry((3, 4), (4, 6))
    pixels = torch.arange(36.0).reshape(3, 3, 4)
    reflected = np.pad(pixels.numpy(), ((0, 0), (0, 1), (0, 2)), mode="reflect")
    repeated = np.pad(pixels.numpy(), ((0, 0), (0, 1), (0, 2)), mode="edge")
    np.testing.assert_array_equal(padded(pixels, geometry, "reflect", None), reflected)
    np.testing.assert_array_equal(padded(pixels[None], geometry, "replicate", None)[0], repeated)
    for mode, value in (("constant", 7.0), ("zero", 0.0)):
        found = padded(pixels, geometry, mode, value)
        assert found.shape == (3, 4, 6) and (found[:, 3] == value).all() and (found[:, :, 4:] == value).all()
        torch.testing.assert_close(found[:, :3, :4], pixels)


def test_a_small_picture_has_no_reflection() -> None:
    with pytest.raises(ConfigError, match=r'pad_mode="reflect" cannot continue \(3, 3\) px by \(4, 4\) px'):
        padded(torch.zeros(3, 3, 3), dense_geometry((3, 3), (7, 7)), "reflect", None)


def test_windows_are_averaged_by_raised_cosines() -> None:
    """Two windows of four patches over six: what each says of a patch counts by its place in the window."""
    geometry = dense_geometry((10, 60), (10, 10))
    windows = windows_of(geometry, 40, 0.5)
    assert windows.size == (10, 40) and windows.rows == (0,) and windows.columns == (0, 20)
    answers = iter([torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 1, 4)])
    found = blended(torch.zeros(1, 3, 10, 60), geometry, windows, lambda _: next(answers))
    weights = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1, 5) / 5)
    shared = weights[:2] / (weights[2:] + weights[:2])
    np.testing.assert_allclose(found[0, 0, 0], [0, 0, *shared, 1, 1], rtol=1e-6)
    torch.testing.assert_close(found[0, 1], found[0, 0])


def test_where_windows_agree_nothing_changes() -> None:
    geometry = dense_geometry((70, 50), (10, 10))
    picture = torch.rand(2, 3, 70, 50)

    def encode(window: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(window, 10)

    found = blended(picture, geometry, windows_of(geometry, 30, 0.4), encode)
    torch.testing.assert_close(found, encode(picture))
