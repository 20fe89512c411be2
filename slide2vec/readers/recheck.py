"""Tiles and strips that OpenSlide or libvips read of a TIFF, decoded once more by strict decoders.

Neither notices all that can be noticed: of 24 damaged Deflate tiles, which hold a checksum, both gave made-up
pixels for 7, of 24 LZW tiles for 15.
"""

from __future__ import annotations

import logging
from typing import TypeAlias

from slide2vec.errors import ExtraMissingError
from slide2vec.readers.codecs import TileError, decode_tile, unavailable
from slide2vec.readers.probe import Probe
from slide2vec.readers.tiff_tiles import TiffTiles, why_not
from slide2vec.readers.tile_check import Fail, TileCheck

__all__ = ["Check", "Recheck", "check_of"]

logger = logging.getLogger(__name__)


class Recheck:
    """Checks the tiles or strips of a TIFF, each once. Safe to use from several threads."""

    def __init__(self, probe: Probe, fail: Fail) -> None:
        self._tiles = TiffTiles(probe, fail)
        self._sound: set[tuple[int, int]] = set()

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()

    def __call__(self, level: int, x: int, y: int, width: int, height: int) -> None:
        """Check what lies under a box (level px).

        Raises:
            SlideReadError: a tile is damaged.
        """
        places = [
            place
            for place in self._tiles.tiles_in(level, x, y, width, height)
            if (level, place.tile) not in self._sound
        ]
        form = self._tiles.format(level)
        for place in places:
            (parts,) = self._tiles.read(level, [place])
            try:
                decode_tile(parts, form, (place.height, place.width), None)
            except TileError as error:
                raise self._tiles.damaged(level, place, error) from error
            self._sound.add((level, place.tile))


Check: TypeAlias = TileCheck | Recheck


def check_of(probe: Probe, fail: Fail) -> Check | None:
    """What checks a TIFF's tiles before a library reads them; None where nothing can, which is said where it
    is for want of a package."""
    tiled = bool(probe.levels) and all(level.tile for level in probe.levels)
    if not (tiled and all(level.compression == "JPEG" for level in probe.levels)):
        if unavailable() is None and why_not(probe) is None:
            return Recheck(probe, fail)
        if not tiled:
            return None
    try:
        return TileCheck(probe.path, probe.levels, fail)
    except ExtraMissingError as error:
        logger.warning("slide %s: %s", probe.name, error)
        return None
