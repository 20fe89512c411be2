"""A slide's tiles, decoded and assembled by DALI out of its compressed tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slide2vec.geometry import floor_to_level
from slide2vec.prepare.dali_tiles import RATIOS, DaliTiles, Geometry
from slide2vec.prepare.device_cut import cut_tiles_on_device
from slide2vec.prepare.tile_parts import parts_of_boxes
from slide2vec.readers.compressed import CompressedJpegs
from slide2vec.stream.device_sources import neighbours
from slide2vec.stream.tile_sources import SlideSource

__all__ = ["DaliSource"]

IntArray = NDArray[np.int64]


class DaliSource:
    """Tiles of a slide on a device. See `TileSource`.

    Its blocks are those of `source`. Every compressed tile is decoded strictly on the CPU as well, reduced to
    an eighth a side, before DALI gets it: DALI makes up pixels for damage inside of a JPEG.

    Args:
        source: the slide's tiles by another reader.
        reader: of the same slide. It is not closed.
        decoder: does the work.
    """

    def __init__(self, source: SlideSource, reader: CompressedJpegs, decoder: DaliTiles) -> None:
        self.backend, self.blocks = source.backend, source.blocks
        self._reader, self._decoder = reader, decoder
        tiling, geometry = source.tiling, source.tiling.geometry
        self._level = level = geometry.read_level
        self._form = reader.tiles.format(level)
        corners = np.stack([tiling.x, tiling.y], axis=1)
        self._corners = floor_to_level(corners, reader.downsamples[level])
        self._side = geometry.read_tile_size_px
        ratio, rest = divmod(self._side, geometry.requested_tile_size_px)
        self._ratio = ratio if not rest and ratio in RATIOS else 1
        self._bands = _bands(self._side, self._ratio, self._form.width * self._form.height)

    def fetch(self, number: int) -> Tensor:
        """The tiles of a block, (n, S, S, 3) uint8; S is the requested size, or that in the level where DALI
        does not reduce by their ratio.

        Raises:
            SlideReadError: a compressed tile is damaged.
            RuntimeError: DALI cannot decode one.
        """
        return self._decoded(self.blocks[number])

    def place(self, number: int, data: Tensor, targets: Sequence[Any]) -> None:
        """Write what `fetch` gave into targets, (S, S, 3) uint8 each; nothing is waited for."""
        side = data.shape[1]
        if side == targets[0].shape[0]:
            for slots, target in neighbours([torch.as_tensor(target) for target in targets]):
                target.copy_(data[slots], non_blocking=True)
            return
        offsets = np.stack([np.zeros(len(data), np.int64), np.arange(len(data)) * side], axis=1)
        cut_tiles_on_device(data.reshape(-1, side, 3), offsets, side, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        """Fetch and place a single tile."""
        self.place(0, self._decoded(np.array([tile])), [target])

    def close(self) -> None:
        """Nothing: the reader is another's."""

    def _decoded(self, tiles: IntArray) -> Tensor:
        side, bands, level = self._side, self._bands, self._level
        height = side // bands
        corners = self._corners[tiles]
        boxes = np.repeat(corners, bands, axis=0)
        boxes[:, 1] += np.tile(np.arange(bands) * height, len(tiles))
        places = self._places(corners)
        size, form = self._reader.level_dimensions[level], self._form
        parts = parts_of_boxes(
            boxes, (side, height), size, (form.width, form.height), np.array(list(places), np.int64)
        )
        jpegs = self._reader.read_jpegs(level, [places[tile] for tile in parts.tiles.tolist()])
        geometry = Geometry(side, height, self._ratio, form.rgb)
        found = self._decoder.boxes(jpegs, parts, geometry)
        size_px = side // self._ratio
        return found.reshape(len(tiles), size_px, size_px, 3)

    def _places(self, corners: IntArray) -> dict[int, Any]:
        """The compressed tiles around some tiles."""
        right, bottom = self._reader.level_dimensions[self._level]
        (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), (corners.max(axis=0) + self._side).tolist()
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, right), min(y1, bottom)
        if x0 >= x1 or y0 >= y1:
            return {}
        found = self._reader.tiles.tiles_in(self._level, x0, y0, x1 - x0, y1 - y0)
        return {place.tile: place for place in found}


def _bands(side: int, ratio: int, tile_pixels: int) -> int:
    """In how many boxes, one above the other, a tile is assembled: about as many as the compressed tiles that
    it takes, since a batch of DALI's has one of each per sample."""
    most = 1 + side * side // tile_pixels
    size = side // ratio
    return next(bands for bands in range(min(most, size), 0, -1) if not size % bands)
