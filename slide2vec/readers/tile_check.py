"""Find the compressed tiles that a file leaves out or holds damaged, before their pixels are trusted.

No library but simplejpeg reports all that libjpeg notices. In the place of a JPEG tile that it cannot
decode cuCIM returns whatever the memory held before; cuCIM, OpenSlide and libvips return what
libjpeg makes up where it only warns (of 2,385 damaged tiles that a strict decoder refused, Pillow
took 1,465). Tiles are therefore decoded a second time, strictly, reduced to an eighth a side, which
notices the same and costs half (of 3,000 damaged tiles none was judged differently).

Where that is too dear, for decoding on a GPU, a JPEG tile that begins with a header known to be good
and ends with the end-of-image marker is accepted; any other is decoded once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ExtraMissingError, SlideReadError
from slide2vec.readers.probe import TiffLevel

__all__ = ["TileCheck"]

_HEADER_BYTES = 2048
_END, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"
#: Files whose tiles carry their own Huffman tables have a header per tile: remember only some.
_MOST_HEADERS = 32

#: (level, x, y in level px, what is wrong) -> the error to raise.
Fail = Callable[[int, int, int, object], SlideReadError]


class TileCheck:
    """Checks the tiles of a tiled TIFF, each once. Safe to use from several threads.

    Args:
        strict: decode every tile, rather than look at its beginning and end.

    Raises:
        ExtraMissingError: there are JPEG tiles, and simplejpeg is not installed.
    """

    def __init__(self, path: Path, levels: Sequence[TiffLevel], fail: Fail, *, strict: bool = True) -> None:
        if find_spec("simplejpeg") is None and any(level.compression == "JPEG" for level in levels):
            raise ExtraMissingError(
                "its JPEG tiles cannot be checked for damage: simplejpeg is not installed: "
                "pip install simplejpeg"
            )
        self._levels, self._fail, self._strict = levels, fail, strict
        self._passed = [np.zeros(len(level.counts), bool) for level in levels]
        self._headers: list[list[bytes]] = [[] for _ in levels]
        self._file: int | None = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Release the file. May be called twice."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def __call__(self, level: int, x: int, y: int, width: int, height: int) -> Iterator[tuple[slice, slice]]:
        """Check the tiles under a box (level px); yields the (rows, columns) of the box left out of the file.

        Raises:
            SlideReadError: a tile is damaged.
        """
        spec = self._levels[level]
        assert spec.tile is not None  # readers of untiled files do not check tiles
        tile_w, tile_h = spec.tile
        columns = np.arange(x // tile_w, (x + width - 1) // tile_w + 1)
        rows = np.arange(y // tile_h, (y + height - 1) // tile_h + 1)
        across = -(-spec.width // tile_w)
        tiles = (rows[:, None] * across + columns).ravel()
        if spec.compression == "JPEG":
            self._check(level, tiles[~self._passed[level][tiles]], across)
        return self._left_out(spec, tiles[spec.counts[tiles] == 0], across, (x, y, width, height))

    def _check(self, level: int, tiles: NDArray[np.intp], across: int) -> None:
        spec = self._levels[level]
        assert spec.tile is not None
        for tile in tiles.tolist():
            offset, count = int(spec.offsets[tile]), int(spec.counts[tile])
            wrong = self._wrong(level, offset, count) if count else None
            if wrong:
                raise self._fail(level, tile % across * spec.tile[0], tile // across * spec.tile[1], wrong)
        self._passed[level][tiles] = True

    def _wrong(self, level: int, offset: int, count: int) -> str | None:
        """What is wrong with a JPEG tile, None when nothing is."""
        if self._strict:
            return self._decode(level, self._read(offset, count))
        head = self._read(offset, min(count, _HEADER_BYTES))
        tail = self._read(offset + count - 4, 4) if count > 4 else head
        return None if self._is_known(level, head, tail) else self._decode(level, self._read(offset, count))

    def wrong(self, level: int, data: bytes, least: tuple[int, int]) -> str | None:
        """What is wrong with a JPEG tile that has been read, None when nothing is.

        Args:
            least: (height, width) of what the level holds of it, px.
        """
        if self._is_known(level, data[:_HEADER_BYTES], data[-4:]):
            return None
        wrong = self._decode(level, data)
        size = None if wrong else _size(data)
        if size is not None and (size[0] < least[0] or size[1] < least[1]):
            return f"damaged JPEG tile ({size[1]}x{size[0]} px instead of {self._levels[level].tile})"
        return wrong

    def unknown(self, level: int, jpegs: Sequence[bytes]) -> list[int]:
        """Which of many `wrong` is to be asked about: the others begin and end as a whole tile that it found
        good."""
        known = tuple(self._headers[level])
        return [
            number
            for number, data in enumerate(jpegs)
            if not (data.startswith(known) and (data[-2:] == _END or _END in data[-4:]))
        ]

    def _is_known(self, level: int, head: bytes, tail: bytes) -> bool:
        return _END in tail and any(head.startswith(header) for header in self._headers[level])

    def _decode(self, level: int, data: bytes) -> str | None:
        spec, known = self._levels[level], self._headers[level]
        tables = spec.jpeg_tables
        jpeg = tables[:-2] + data[2:] if tables and data[:2] == tables[:2] else data
        wrong = _fault(jpeg, spec)
        if self._strict:
            return wrong
        head = data[:_HEADER_BYTES]
        scan = head.find(_START_OF_SCAN)
        if wrong is None and scan > 0 and len(known) < _MOST_HEADERS and _size(jpeg)[::-1] == spec.tile:
            known.append(head[: scan + 2 + int.from_bytes(head[scan + 2 : scan + 4], "big")])
        return wrong

    def _read(self, offset: int, count: int) -> bytes:
        assert self._file is not None, "read after close"
        return os.pread(self._file, count, offset)

    def _left_out(
        self, spec: TiffLevel, tiles: NDArray[np.intp], across: int, box: tuple[int, int, int, int]
    ) -> Iterator[tuple[slice, slice]]:
        assert spec.tile is not None
        (tile_w, tile_h), (x, y, width, height) = spec.tile, box
        for tile in tiles.tolist():
            left, top = tile % across * tile_w - x, tile // across * tile_h - y
            yield (
                slice(max(top, 0), min(top + tile_h, height)),
                slice(max(left, 0), min(left + tile_w, width)),
            )


def _size(jpeg: bytes) -> tuple[int, int]:
    """(height, width) that a good JPEG says it has, px."""
    height, width, *_ = import_module("simplejpeg").decode_jpeg_header(jpeg)
    return height, width


def _fault(jpeg: bytes, level: TiffLevel) -> str | None:
    simplejpeg = import_module("simplejpeg")
    colours = "CMYK" if level.samples == 4 else "GRAY"
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if level.tile and (width > level.tile[0] or height > level.tile[1]):
            return f"damaged JPEG tile ({width}x{height} px instead of {level.tile})"
        simplejpeg.decode_jpeg(jpeg, colorspace=colours, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        return f"damaged JPEG tile ({error})"
    return None
