"""Tiles and strips that a library reads of a TIFF, decoded once more by strict decoders.

No library but simplejpeg reports all that libjpeg notices. In the place of a JPEG tile that it cannot
decode cuCIM returns whatever the memory held before; cuCIM, OpenSlide and libvips return what libjpeg makes
up where it only warns (of 2,385 damaged tiles that a strict decoder refused, Pillow took 1,465). Of other
tiles neither OpenSlide nor libvips notices all that can be noticed: of 24 damaged Deflate tiles, which hold
a checksum, both gave made-up pixels for 7, of 24 LZW tiles for 15.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from slide2vec.errors import ExtraMissingError
from slide2vec.readers.codecs import TileError, check_jpeg, decode_tile, unavailable
from slide2vec.readers.probe import Probe
from slide2vec.readers.tiff_tiles import TiffTiles, why_not
from slide2vec.readers.tile_table import Fail, TilePlace

__all__ = ["Recheck", "check_of"]

logger = logging.getLogger(__name__)

#: Tiles that are read at once.
_AT_ONCE = 64


class Recheck:
    """Checks the tiles or strips of a TIFF, each once. Safe to use from several threads.

    Args:
        fail: makes the error of a tile that is damaged.
        jpegs_only: no other tiles are looked at.
        strict: every tile is decoded, rather than each JPEG tile looked at as `KnownHeaders` does.

    Raises:
        ExtraMissingError: JPEG tiles only, of which there are some, and simplejpeg is not installed.
    """

    def __init__(self, probe: Probe, fail: Fail, *, jpegs_only: bool = False, strict: bool = True) -> None:
        has_jpegs = any(level.compression == "JPEG" for level in probe.levels)
        if jpegs_only and has_jpegs and find_spec("simplejpeg") is None:
            raise ExtraMissingError(
                "its JPEG tiles cannot be checked for damage: simplejpeg is not installed: "
                "pip install simplejpeg"
            )
        self._jpegs_only, self._strict = jpegs_only, strict
        self._tiles = TiffTiles(probe, fail, is_checked=not strict)
        forms = map(self._tiles.format, range(len(probe.levels)))
        self._sound = [
            bytearray(-(-level.width // form.width) * -(-level.height // form.height))
            for level, form in zip(probe.levels, forms, strict=True)
        ]

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()

    def __call__(self, level: int, x: int, y: int, width: int, height: int) -> list[tuple[slice, slice]]:
        """Check what lies under a box (level px); gives the (rows, columns) of it that the file leaves out.

        Raises:
            SlideReadError: a tile is damaged.
        """
        stored, left_out = self._tiles.parted(level, x, y, width, height)
        if not self._jpegs_only or self._tiles.format(level).compression == "JPEG":
            unknown = [place for place in stored if not self._sound[level][place.tile]]
            for start in range(0, len(unknown), _AT_ONCE):
                self._check(level, unknown[start : start + _AT_ONCE])
        return [
            (
                slice(max(place.y - y, 0), min(place.y + place.height - y, height)),
                slice(max(place.x - x, 0), min(place.x + place.width - x, width)),
            )
            for place in left_out
        ]

    def _check(self, level: int, places: Sequence[TilePlace]) -> None:
        if self._strict:
            self._decode(level, places)
        else:
            numbers = np.array([place.tile for place in places])
            self._tiles.read_jpegs(level, numbers[self._tiles.file_order(level, numbers)])
        for place in places:
            self._sound[level][place.tile] = True

    def _decode(self, level: int, places: Sequence[TilePlace]) -> None:
        form = self._tiles.format(level)
        for place, parts in zip(places, self._tiles.read(level, places), strict=True):
            shown = place.height, place.width
            try:
                if not self._jpegs_only:
                    decode_tile(parts, form, shown, None)
                    continue
                for part in parts:
                    check_jpeg(part, form, shown)
            except TileError as error:
                raise self._tiles.damaged(level, place, error) from error


def check_of(probe: Probe, fail: Fail) -> Recheck | None:
    """What checks a TIFF's tiles before a library reads them; None where nothing can, which is said where it
    is for want of a package."""
    tiled = bool(probe.levels) and all(level.tile for level in probe.levels)
    if not (tiled and all(level.compression == "JPEG" for level in probe.levels)):
        if unavailable() is None and why_not(probe) is None:
            return Recheck(probe, fail)
        if not tiled:
            return None
    try:
        return Recheck(probe, fail, jpegs_only=True)
    except ExtraMissingError as error:
        logger.warning("slide %s: %s", probe.name, error)
        return None
