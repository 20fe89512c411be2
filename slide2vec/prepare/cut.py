"""From a supertile's pixels to tiles of the requested size, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["cut_tiles"]

Pixels = NDArray[np.uint8]


def cut_tiles(
    pixels: Pixels, offsets: NDArray[np.int64], read_tile_size_px: int, targets: Sequence[Pixels]
) -> None:
    """Cut tiles out of a supertile and write each, area-averaged, into its target.

    Args:
        pixels: (h, w, 3) uint8, the supertile.
        offsets: (n, 2) int64, (x, y) of each tile in it, px.
        read_tile_size_px: side of the tiles in it.
        targets: n writable (S, S, 3) uint8 arrays, S the requested size.

    Area averaging (OpenCV INTER_AREA) is the field's reference for reducing tiles; with S equal to
    the read size it is a copy.
    """
    size = targets[0].shape[0]
    ratio, rest = divmod(read_tile_size_px, size)
    if rest or ratio < 2 or (offsets % ratio).any():
        for (x, y), target in zip(offsets.tolist(), targets, strict=True):
            _reduce(pixels[y : y + read_tile_size_px, x : x + read_tile_size_px], target)
        return
    # A whole ratio: every target pixel averages the same cell whether the tile is reduced by itself
    # or with the block, and the block at once is faster.
    height, width = pixels.shape[0] // ratio, pixels.shape[1] // ratio
    whole = pixels[: height * ratio, : width * ratio]
    reduced = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    for (x, y), target in zip((offsets // ratio).tolist(), targets, strict=True):
        target[:] = reduced[y : y + size, x : x + size]


def _reduce(tile: Pixels, target: Pixels) -> None:
    if tile.shape == target.shape:
        target[:] = tile
    else:
        cv2.resize(tile, target.shape[1::-1], dst=target, interpolation=cv2.INTER_AREA)
