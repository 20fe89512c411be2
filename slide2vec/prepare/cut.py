"""From a supertile's pixels to tiles of the requested size, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["cut_tiles"]


def cut_tiles(
    pixels: NDArray[np.uint8],
    offsets: Iterable[Sequence[int]],
    read_tile_size_px: int,
    targets: Iterable[NDArray[np.uint8]],
) -> None:
    """Cut tiles out of a supertile and write each, area-averaged, into its target.

    Args:
        pixels: (h, w, 3) uint8, the supertile.
        offsets: (x, y) of each tile in it, px.
        read_tile_size_px: side of the tiles in it.
        targets: one writable (S, S, 3) uint8 array per tile, S the requested size.

    Area averaging (OpenCV INTER_AREA) is the field's reference for reducing tiles; with S equal to
    the read size it is a copy.
    """
    side = read_tile_size_px
    for (x, y), target in zip(offsets, targets, strict=True):
        tile = pixels[y : y + side, x : x + side]
        if tile.shape == target.shape:
            target[:] = tile
        else:
            cv2.resize(tile, target.shape[1::-1], dst=target, interpolation=cv2.INTER_AREA)
