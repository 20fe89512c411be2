"""Tiles of a slide that are cut straight out of its decoded JPEG tiles. See `TileSource`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.geometry import floor_to_level
from slide2vec.prepare.gather_tiles import Gather
from slide2vec.readers.jpeg_tiles import DecodedTiles, JpegTileReader
from slide2vec.stream.tile_sources import SlideSource

__all__ = ["GatheredTiles"]

_Corners: TypeAlias = NDArray[np.int64]


class GatheredTiles:
    """The tiles of a slide by a `JpegTileReader`. Closing it closes the reader, not the source.

    Args:
        source: whose tiles they are.
        gather: cuts them out of what the reader decodes.
    """

    def __init__(self, source: SlideSource, reader: JpegTileReader, gather: Gather) -> None:
        self._reader, self._gather = reader, gather
        geometry = source.tiling.geometry
        self._level, self._side = geometry.read_level, geometry.read_tile_size_px
        self.backend, self.blocks = source.backend, source.blocks
        tiling, downsample = source.tiling, source.reader.downsamples[self._level]
        self._corners: _Corners = np.stack(
            [floor_to_level(at, downsample) for at in (tiling.x, tiling.y)], axis=1
        )

    def fetch(self, number: int) -> tuple[_Corners, DecodedTiles]:
        """The decoded tiles of a block, and where its tiles begin."""
        return self._fetch(self.blocks[number])

    def _fetch(self, tiles: NDArray[np.int64]) -> tuple[_Corners, DecodedTiles]:
        corners = self._corners[tiles]
        return corners, self._reader.decode(self._level, corners, (self._side, self._side))

    def place(self, number: int, data: tuple[_Corners, DecodedTiles], targets: Sequence[Any]) -> None:
        """Cut the tiles of a block out of what was decoded."""
        corners, decoded = data
        try:
            self._gather(decoded, corners, self._side, targets)
        finally:
            self._reader.release(decoded)

    def read_tile(self, tile: int, target: Any) -> None:
        """Decode what a tile needs, and cut it out."""
        self.place(0, self._fetch(np.array([tile])), [target])

    def close(self) -> None:
        """Close the slide."""
        self._reader.close()
