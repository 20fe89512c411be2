"""Which parts of a level's compressed tiles make up boxes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["TileParts", "parts_of_boxes"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TileParts:
    """Boxes of a level as parts of compressed tiles, pasted one after the other: where two overlap, they hold
    the same pixels or the later one has the last word. Places are (y, x), px.

    Attributes:
        tiles: (t,) int64, numbers of the tiles that are needed, ascending.
        tile: (n, k) int32, per box and part: index in `tiles`; len(tiles) is a white tile as large as a box.
        at: (n, k, 2) int32, where the part begins in the tile.
        shape: (n, k, 2) int32, its size.
        to: (n, k, 2) int32, where it begins in the box.
        is_white: whether there are white parts.
    """

    tiles: IntArray
    tile: NDArray[np.int32]
    at: NDArray[np.int32]
    shape: NDArray[np.int32]
    to: NDArray[np.int32]
    is_white: bool


def parts_of_boxes(
    corners: IntArray,
    box: tuple[int, int],
    level_size: tuple[int, int],
    tile_size: tuple[int, int],
    stored: IntArray,
) -> TileParts:
    """What to paste: white where the level or the file holds no pixels.

    Args:
        corners: (n, 2) int64, (x, y) of each box, level px; boxes may reach over the level's edges.
        box, level_size, tile_size: (width, height), px.
        stored: numbers, row by row, of the tiles under the boxes that the file holds.
    """
    tile_shape, level_shape = np.array(tile_size[::-1]), np.array(level_size[::-1])
    column, row = (_touched(corners[:, axis], box[axis], tile_size[axis]) for axis in (0, 1))
    cell = np.stack(np.broadcast_arrays(row[:, :, None], column[:, None, :]), axis=-1)
    cell = cell.reshape(len(corners), -1, 2)
    corner = corners[:, None, ::-1]
    begin = np.maximum(cell * tile_shape, corner)
    end = np.minimum((cell + 1) * tile_shape, corner + box[::-1])
    number = cell[..., 0] * -(-level_size[0] // tile_size[0]) + cell[..., 1]
    first, last = np.maximum(begin, 0), np.minimum(end, level_shape)
    held = (first < last).all(axis=-1) & np.isin(number, stored)
    first, last = np.where(held[..., None], first, begin), np.where(held[..., None], last, end)
    tiles, index = np.unique(number[held], return_inverse=True)
    tile = np.full(number.shape, len(tiles))
    tile[held] = index
    at = np.where(held[..., None], first - cell * tile_shape, 0)
    parts = [tile, at, last - first, first - corner]
    is_white = not held.all() or bool((first != begin).any() or (last != end).any())
    if is_white:  # below all else
        whole = [len(tiles), (0, 0), box[::-1], (0, 0)]
        parts = [
            np.concatenate([np.broadcast_to(np.array(below), (len(part), 1, *part.shape[2:])), part], axis=1)
            for below, part in zip(whole, parts, strict=True)
        ]
    tile, at, shape, to = (part.astype(np.int32) for part in parts)
    return TileParts(tiles, tile, at, shape, to, is_white)


def _touched(start: IntArray, length: int, tile: int) -> IntArray:
    """(n, k) rows or columns of tiles that boxes touch; one that touches fewer has its last one again."""
    most = (length - 2) // tile + 2
    last = (start[:, None] + length - 1) // tile
    return np.asarray(np.minimum(start[:, None] // tile + np.arange(most), last), np.int64)
