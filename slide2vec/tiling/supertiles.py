"""Supertiles: which neighbouring tiles are read together, so that each compressed byte is decoded once.

Any grouping gives the same pixels: a reader returns the region whose origin in the level is
floor(location / downsample), and each tile is cut at its own floored origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slide2vec.geometry import TileGeometry, floor_to_level

__all__ = ["MAX_SIDE_PX", "Supertile", "plan_supertiles"]

#: Side of the largest block, px of the read level: 31 MB of pixels. Smaller ones decode more of the
#: file twice; larger ones were not faster (measured on a CPU).
MAX_SIDE_PX = 3200
#: Tiles along a side of the largest block, so that blocks of small tiles stay small, too.
MAX_SIDE_TILES = 16
#: What opening a read costs besides its pixels, in pixels.
READ_OVERHEAD_PX = 4096.0

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Supertile:
    """A block to read at once.

    Attributes:
        location_lv0: (x, y) of its top-left corner, level-0 px.
        size: (width, height) at the read level, px.
        tiles: (n,) int64, indices of its tiles in the tiling.
        offsets: (n, 2) int64, (x, y) of each tile in the block, px of the read level.
    """

    location_lv0: tuple[int, int]
    size: tuple[int, int]
    tiles: IntArray
    offsets: IntArray


def plan_supertiles(
    x: IntArray,
    y: IntArray,
    geometry: TileGeometry,
    downsample: float,
    *,
    file_tile: tuple[int, int] | None = None,
    grouped: bool = True,
) -> list[Supertile]:
    """Group tiles into blocks of at most `MAX_SIDE_PX` a side, splitting where reading less is cheaper.

    Args:
        x, y: (N,) int64 level-0 top-left corners of the tiles.
        geometry: of the tiles; `read_tile_size_px` and `read_step_px` are used.
        downsample: of the read level.
        file_tile: (width, height) of the file's own compressed tiles at that level, where known.
        grouped: False gives one supertile per tile.

    Returns:
        Supertiles that hold every tile once, block by block from top to bottom in each column of
        blocks; tiles keep their order within one.
    """
    px, py = floor_to_level(x, downsample), floor_to_level(y, downsample)
    side = geometry.read_tile_size_px
    if grouped:
        columns, rows = px.tolist(), py.tolist()  # plain numbers: of few, NumPy's own are slow
        cost = _Cost(side, file_tile or (256, 256))
        blocks = (_group(block.tolist(), columns, rows) for block in _blocks(px, py, geometry))
        parts = (part for block in blocks for part in _split(block, columns, rows, cost))
        groups = [np.array(part.tiles, np.int64) for part in parts]
    else:
        groups = list(np.arange(len(x), dtype=np.int64)[:, None])
    return [_supertile(group, x, y, px, py, side) for group in groups]


def _supertile(group: IntArray, x: IntArray, y: IntArray, px: IntArray, py: IntArray, side: int) -> Supertile:
    gx, gy = px[group], py[group]
    left, top = int(gx.min()), int(gy.min())
    return Supertile(
        location_lv0=(int(x[group].min()), int(y[group].min())),
        size=(int(gx.max()) - left + side, int(gy.max()) - top + side),
        tiles=group,
        offsets=np.stack([gx - left, gy - top], axis=1),
    )


def _blocks(px: IntArray, py: IntArray, geometry: TileGeometry) -> Iterator[IntArray]:
    """Tiles binned into blocks of as many whole steps as `MAX_SIDE_PX` holds."""
    step = geometry.read_step_px
    per_side = (MAX_SIDE_PX - geometry.read_tile_size_px) // step + 1
    block = min(max(1, per_side), MAX_SIDE_TILES) * step
    if not len(px):
        return
    bx, by = (px - px.min()) // block, (py - py.min()) // block
    key = bx * (by.max() + 1) + by
    order = np.argsort(key, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(key[order])) + 1)


class _Group(NamedTuple):
    """Tiles, and where the first and the last of them begin, px of the read level."""

    tiles: list[int]
    left: int
    right: int
    top: int
    bottom: int


def _group(tiles: list[int], columns: list[int], rows: list[int]) -> _Group:
    xs, ys = [columns[tile] for tile in tiles], [rows[tile] for tile in tiles]
    return _Group(tiles, min(xs), max(xs), min(ys), max(ys))


@dataclass(frozen=True)
class _Cost:
    """Pixels that reading a group's bounding box makes the file decode."""

    side: int
    file_tile: tuple[int, int]

    def of(self, group: _Group) -> float:
        width = self._decoded(group.left, group.right, self.file_tile[0])
        height = self._decoded(group.top, group.bottom, self.file_tile[1])
        return width * height + READ_OVERHEAD_PX

    def _decoded(self, first: int, last: int, tile: int) -> int:
        return ((last + self.side - 1) // tile - first // tile + 1) * tile


def _split(group: _Group, columns: list[int], rows: list[int], cost: _Cost) -> list[_Group]:
    """The group whole, or cut at the middle of its longer side where that decodes less."""
    width, height = group.right - group.left + cost.side, group.bottom - group.top + cost.side
    if len(group.tiles) * cost.side**2 >= 0.98 * width * height:
        return [group]
    along, first, last = (
        (columns, group.left, group.right) if width >= height else (rows, group.top, group.bottom)
    )
    middle = (first + last + 1) / 2
    low = [tile for tile in group.tiles if along[tile] < middle]
    high = [tile for tile in group.tiles if along[tile] >= middle]
    parts = [
        part for half in (low, high) for part in _split(_group(half, columns, rows), columns, rows, cost)
    ]
    return parts if sum(map(cost.of, parts)) < cost.of(group) else [group]
