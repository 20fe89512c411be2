"""The compressed tiles of a tiled JPEG TIFF: found, read in file order, made decodable by themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError
from slide2vec.readers.probe import Probe, TiffLevel
from slide2vec.readers.tilecheck import Fail, TileCheck

__all__ = ["JpegTiles", "TilePlace", "spliced", "why_not"]

_VENDORS = ("aperio", "generic", "ome")
#: Reading on through a hole of so many bytes costs less than another request, on a network drive above all.
_GAP = 16 << 10
#: Bytes of one request at most.
_SPAN = 8 << 20
#: An Adobe marker (T.872, 6.5.3) with transform 0: the components are RGB.
_RGB_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
#: Where the markers of a JPEG are.
_HEAD = 2048
_ADOBE, _JFIF = b"\xff\xee\x00\x0eAdobe", b"JFIF\x00"


@dataclass(frozen=True)
class TilePlace:
    """A compressed tile under a box.

    Attributes:
        tile: its number in the level, row-major.
        x, y: of its top-left corner, level px.
        in_box, in_tile: (rows, columns) that both share, in each of them.
        is_whole: the box holds all of it, so that no neighbouring box needs it.
    """

    tile: int
    x: int
    y: int
    in_box: tuple[slice, slice]
    in_tile: tuple[slice, slice]
    is_whole: bool


def why_not(probe: Probe) -> str | None:
    """Why the tiles of a file cannot be read by themselves, None when they can."""
    if probe.kind != "tiff" or probe.vendor not in _VENDORS:
        return f"its tiles are not those of a plain TIFF ({probe.vendor or probe.kind})"
    for level in probe.levels:
        if level.tile is None or level.compression != "JPEG":
            return f"it is stored in {level.compression} {'strips' if level.tile is None else 'tiles'}"
        if (level.samples, level.bits, level.planar) != (3, 8, False):
            return f"it has {level.samples} channels of {level.bits} bits, not interleaved 8-bit RGB"
    return None


def spliced(level: TiffLevel, data: bytes) -> bytes:
    """A tile with the tables that the level's tiles share, and with a marker where its colours are RGB."""
    tables = level.jpeg_tables[2:-2] if level.jpeg_tables else b""
    marker = _RGB_MARKER if level.photometric == "RGB" else b""
    return data[:2] + marker + tables + data[2:] if tables or marker else data


class JpegTiles:
    """Reads the compressed tiles of a slide. Safe to use from several threads.

    Args:
        fail: makes the error of a tile that is damaged.
    """

    def __init__(self, probe: Probe, fail: Fail) -> None:
        self._levels, self._fail = probe.levels, fail
        self._check = TileCheck(probe.path, probe.levels, fail, strict=False)
        self._file: int | None = os.open(probe.path, os.O_RDONLY)
        self._name = probe.name

    def close(self) -> None:
        """Release the file. May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
            self._check.close()

    def under(self, level: int, x: int, y: int, width: int, height: int) -> list[TilePlace]:
        """The tiles under a box inside a level (level px), without those that the file leaves out."""
        spec = self._levels[level]
        assert spec.tile is not None  # see `why_not`
        tile_w, tile_h = spec.tile
        across = -(-spec.width // tile_w)
        return [
            _place(row * across + column, (column * tile_w, row * tile_h), spec, (x, y, width, height))
            for row in range(y // tile_h, (y + height - 1) // tile_h + 1)
            for column in range(x // tile_w, (x + width - 1) // tile_w + 1)
            if spec.counts[row * across + column]
        ]

    def read(self, level: int, places: Sequence[TilePlace]) -> list[bytes]:
        """The tiles as JPEGs of their own, read in file order with as few requests as possible.

        Raises:
            SlideReadError: one is damaged, or the slide was closed.
        """
        spec = self._levels[level]
        if self._file is None:
            raise SlideReadError(f"slide {self._name} was closed")
        numbers = np.array([place.tile for place in places], np.int64)
        found: dict[int, bytes] = {}
        for span in _spans(spec.offsets[numbers], spec.counts[numbers]):
            start = int(spec.offsets[numbers[span[0]]])
            end = int((spec.offsets[numbers[span]] + spec.counts[numbers[span]]).max())
            block = os.pread(self._file, end - start, start)
            for index in span.tolist():
                at = int(spec.offsets[numbers[index]]) - start
                found[index] = block[at : at + int(spec.counts[numbers[index]])]
        return [self._sound(level, places[index], found[index]) for index in range(len(places))]

    def _sound(self, level: int, place: TilePlace, data: bytes) -> bytes:
        wrong = self._check.wrong(level, data)
        if wrong:
            raise self._fail(level, place.x, place.y, wrong)
        return spliced(self._levels[level], data)

    def damaged(self, level: int, place: TilePlace, why: str) -> SlideReadError:
        """The error of a tile that a decoder does not take."""
        return self._fail(level, place.x, place.y, why)

    def shape(self, level: int) -> tuple[int, int, int]:
        """(height, width, 3) of a level's tiles."""
        tile = self._levels[level].tile
        assert tile is not None
        return tile[1], tile[0], 3

    def colour_conflict(self, level: int) -> str | None:
        """Why a decoder that only sees the JPEGs would take other colours than the TIFF tells, or None."""
        spec = self._levels[level]
        present = np.flatnonzero(spec.counts)
        if not len(present) or self._file is None:
            return None
        start, size = int(spec.offsets[present[0]]), int(spec.counts[present[0]])
        head = (spec.jpeg_tables or b"") + os.pread(self._file, min(_HEAD, size), start)
        if spec.photometric == "RGB" and _JFIF in head:
            return "its tiles are RGB and carry a JFIF marker, which says YCbCr"
        if spec.photometric == "YCBCR" and _ADOBE in head and _JFIF not in head:
            transform = head[head.index(_ADOBE) + 15]
            return None if transform == 1 else "its tiles are YCbCr and carry a marker that says RGB"
        return None


def _place(tile: int, corner: tuple[int, int], spec: TiffLevel, box: tuple[int, int, int, int]) -> TilePlace:
    assert spec.tile is not None
    (left, top), (x, y, width, height) = corner, box
    x0, y0 = max(left, x), max(top, y)
    x1, y1 = min(left + spec.tile[0], x + width), min(top + spec.tile[1], y + height)
    inside = (x1 - x0, y1 - y0) == (
        min(spec.tile[0], spec.width - left),
        min(spec.tile[1], spec.height - top),
    )
    return TilePlace(
        tile,
        left,
        top,
        in_box=(slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)),
        in_tile=(slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)),
        is_whole=inside,
    )


def _spans(offsets: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Indices in file order, cut where the hole between two tiles or the request would be too large."""
    order = np.argsort(offsets, kind="stable")
    begin = 0
    for index in range(1, len(order) + 1):
        if index < len(order):
            last, here = order[index - 1], order[index]
            near = offsets[here] - (offsets[last] + counts[last]) <= _GAP
            if near and offsets[here] + counts[here] - offsets[order[begin]] <= _SPAN:
                continue
        if begin < index:
            yield order[begin:index]
        begin = index
