"""Where patches and windows of a picture lie, and how overlapping windows are blended: pure arithmetic.

Sizes are (height, width) in px. Windows begin at patches; the last of a row or column ends with the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from slide2vec.errors import ConfigError

__all__ = ["DenseEncodeGeometry", "Windows", "blended", "dense_geometry", "padded", "windows_of"]


@dataclass(frozen=True)
class DenseEncodeGeometry:
    """How a picture is padded and divided into patches.

    Attributes:
        target_size: of the picture.
        patch_size: of a patch.
        encoded_size: of the picture once it is padded, below and to the right, to whole patches.
        grid_shape: patches: rows, columns.
        pad: px below, px to the right.
        crop_box: (left, top, right, bottom) of the picture in what is encoded.
    """

    target_size: tuple[int, int]
    patch_size: tuple[int, int]
    encoded_size: tuple[int, int]
    grid_shape: tuple[int, int]
    pad: tuple[int, int]
    crop_box: tuple[int, int, int, int]


def dense_geometry(target_size: tuple[int, int], patch_size: tuple[int, int]) -> DenseEncodeGeometry:
    """The geometry of pictures of a size."""
    (height, width), (patch_height, patch_width) = target_size, patch_size
    rows, columns = -(-height // patch_height), -(-width // patch_width)
    encoded = rows * patch_height, columns * patch_width
    return DenseEncodeGeometry(
        target_size=target_size,
        patch_size=patch_size,
        encoded_size=encoded,
        grid_shape=(rows, columns),
        pad=(encoded[0] - height, encoded[1] - width),
        crop_box=(0, 0, width, height),
    )


def padded(pixels: Tensor, geometry: DenseEncodeGeometry, mode: str, value: float | None) -> Tensor:
    """(…, 3, H, W) -> (…, 3, H + pad, W + pad).

    Raises:
        ConfigError: a picture is too small to be continued by its reflection.
    """
    below, right = geometry.pad
    if not below and not right:
        return pixels
    if mode == "reflect" and (below >= geometry.target_size[0] or right >= geometry.target_size[1]):
        raise ConfigError(
            f'pad_mode="reflect" cannot continue {geometry.target_size} px by {geometry.pad} px: choose '
            "another pad_mode, or a larger target_size"
        )
    batch, margins = pixels if pixels.ndim == 4 else pixels[None], (0, right, 0, below)
    if mode in ("constant", "zero"):
        made = functional.pad(batch, margins, mode="constant", value=float(value or 0.0))
    else:
        made = functional.pad(batch, margins, mode=mode)
    return made if pixels.ndim == 4 else made[0]


@dataclass(frozen=True)
class Windows:
    """What the encoder sees one at a time.

    Attributes:
        size: of a window.
        rows, columns: where they begin, px.
    """

    size: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def windows_of(geometry: DenseEncodeGeometry, window_size: int | None, overlap: float) -> Windows:
    """The windows over a padded picture; one over all of it where `window_size` is None or as large."""
    sides, starts = [], []
    for extent, patch in zip(geometry.encoded_size, geometry.patch_size, strict=True):
        side = extent if window_size is None else min(extent, -(-window_size // patch) * patch)
        step = min(side, patch * max(1, round(side * (1.0 - overlap) / patch)))
        regular = range(0, extent - side + 1, step)
        flush = () if regular[-1] + side == extent else (extent - side,)
        sides.append(side)
        starts.append((*regular, *flush))
    return Windows((sides[0], sides[1]), starts[0], starts[1])


def blended(
    batch: Tensor, geometry: DenseEncodeGeometry, windows: Windows, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Encode padded pictures window by window and average the grids, weighted by a raised cosine.

    Args:
        batch: (B, 3, H, W), padded.
        encode: (B, 3, h, w) -> (B, d, h / patch, w / patch).

    Returns:
        (B, d, rows, columns); float32 where there are several windows, else as encoded.
    """
    if len(windows.rows) == len(windows.columns) == 1:
        return encode(batch)
    (height, width), (patch_height, patch_width) = windows.size, geometry.patch_size
    rows, columns = height // patch_height, width // patch_width
    weights = torch.outer(_weights(rows, len(windows.rows)), _weights(columns, len(windows.columns))).to(
        batch.device
    )
    total: Tensor | None = None
    weighed = torch.zeros(geometry.grid_shape, device=batch.device)
    for top, left in product(windows.rows, windows.columns):
        grid = encode(batch[:, :, top : top + height, left : left + width]).float()
        if total is None:
            total = grid.new_zeros((*grid.shape[:2], *geometry.grid_shape))
        row, column = top // patch_height, left // patch_width
        total[:, :, row : row + rows, column : column + columns] += grid * weights
        weighed[row : row + rows, column : column + columns] += weights
    assert total is not None
    return total / weighed


def _weights(count: int, windows: int) -> Tensor:
    """Of the patches of a window along one side: above 0 everywhere; all 1 where there is one window."""
    if windows == 1 or count == 1:
        return torch.ones(count)
    places = torch.arange(1, count + 1, dtype=torch.float32)
    return 0.5 - 0.5 * torch.cos(2.0 * math.pi * places / (count + 1))
