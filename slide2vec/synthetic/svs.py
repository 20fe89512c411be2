"""A streaming writer of pyramidal Aperio SVS files: JPEG tiles in any order, directories at the end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
from numpy.typing import NDArray

__all__ = ["SvsWriter", "encode_jpeg"]

_HEADER_BYTES = 16  # of a BigTIFF; a classic one needs 8 and leaves the rest unused
_CLASSIC_LIMIT = 2**32
_SHORT, _LONG, _ASCII, _RATIONAL, _LONG8 = 3, 4, 2, 5, 16
_FORMATS = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}
_JPEG, _YCBCR = 7, 6
Tag = tuple[int, int, Any]  # (code, type, value or values)


def encode_jpeg(rgb: NDArray[Any], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB -> a JPEG of its own (YCbCr, 4:2:0)."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].tobytes()


@dataclass
class _Level:
    """Where the tiles of one level lie in the file, row by row."""

    size: tuple[int, int]
    grid: tuple[int, int]  # columns, rows
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class SvsWriter:
    """Writes one SVS; `close` (or leaving the block without an error) writes its directories.

    Tiles may come in any order, each exactly once. A file beyond 4 GB becomes a BigTIFF, as does
    any file when `bigtiff` is true.

    Args:
        levels: (width, height) in px of every level, the full resolution first.
        tile_px: side of the square tiles, a multiple of 16.
        description: of the whole slide, "Aperio ...|AppMag = ...|MPP = ...".
    """

    def __init__(
        self,
        path: Path,
        levels: Sequence[tuple[int, int]],
        tile_px: int,
        description: str,
        *,
        bigtiff: bool = False,
    ) -> None:
        self._tile_px = tile_px
        self._description = description
        self._bigtiff = bigtiff
        self._levels = [_empty_level(size, tile_px) for size in levels]
        self._thumbnail: tuple[tuple[int, int], int, int] | None = None
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        self._file.close()

    def grid(self, level: int) -> tuple[int, int]:
        """(columns, rows) of tiles of a level."""
        return self._levels[level].grid

    def write_tile(self, level: int, column: int, row: int, jpeg: bytes) -> None:
        """Append the JPEG of one whole tile."""
        where = self._levels[level]
        index = row * where.grid[0] + column
        where.offsets[index], where.lengths[index] = self._append(jpeg), len(jpeg)

    def write_thumbnail(self, rgb: NDArray[Any], quality: int) -> None:
        """The overview picture (H, W, 3) uint8 that Aperio keeps as the second page."""
        jpeg = encode_jpeg(rgb, quality)
        self._thumbnail = (rgb.shape[1], rgb.shape[0]), self._append(jpeg), len(jpeg)

    def close(self) -> None:
        """Write directories and header, once."""
        if self._file.closed:
            return
        directories = 8 * sum(len(level.offsets) for level in self._levels) + 4096 * (len(self._levels) + 1)
        self._bigtiff = self._bigtiff or self._file.tell() + directories >= _CLASSIC_LIMIT
        first = self._write_pages()
        self._file.seek(0)
        self._file.write(
            struct.pack("<2sHHHQ", b"II", 43, 8, 0, first)
            if self._bigtiff
            else struct.pack("<2sHI", b"II", 42, first)
        )
        self._file.close()

    def _append(self, data: bytes) -> int:
        offset = self._file.tell()
        self._file.write(data)
        if len(data) % 2:  # TIFF offsets are even
            self._file.write(b"\0")
        return offset

    def _page_tags(self, size: tuple[int, int], description: str) -> list[Tag]:
        return [
            (254, _LONG, 0),
            (256, _LONG, size[0]),
            (257, _LONG, size[1]),
            (258, _SHORT, (8, 8, 8)),
            (259, _SHORT, _JPEG),
            (262, _SHORT, _YCBCR),
            (270, _ASCII, description),
            (277, _SHORT, 3),
            (284, _SHORT, 1),
            (530, _SHORT, (2, 2)),
            (532, _RATIONAL, (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)),
        ]

    def _tile_tags(self, level: _Level) -> list[Tag]:
        width, height = self._levels[0].size
        description = self._description
        if level is not self._levels[0]:
            head, _, tail = description.partition("\r\n")
            description = f"{head}\r\n{width}x{height} -> {level.size[0]}x{level.size[1]} - |{tail}"
        pointer = _LONG8 if self._bigtiff else _LONG
        return [
            *self._page_tags(level.size, description),
            (322, _SHORT, self._tile_px),
            (323, _SHORT, self._tile_px),
            (324, pointer, level.offsets),
            (325, _LONG, level.lengths),
        ]

    def _thumbnail_tags(self, size: tuple[int, int], offset: int, length: int) -> list[Tag]:
        width, height = self._levels[0].size
        head = self._description.partition("\r\n")[0]
        description = f"{head}\r\n{width}x{height} -> {size[0]}x{size[1]} - "
        pointer = _LONG8 if self._bigtiff else _LONG
        strips: list[Tag] = [(273, pointer, offset), (278, _LONG, size[1]), (279, _LONG, length)]
        return self._page_tags(size, description) + strips

    def _write_pages(self) -> int:
        """Write the directories back to front, so that each knows the next; returns the first's offset."""
        pages = [self._tile_tags(level) for level in self._levels]
        if self._thumbnail is not None:
            pages.insert(1, self._thumbnail_tags(*self._thumbnail))
        following = 0
        for tags in reversed(pages):
            following = self._write_page(tags, following)
        return following

    def _write_page(self, tags: list[Tag], following: int) -> int:
        entry, count, word = ("<HHQ", "<Q", "<Q") if self._bigtiff else ("<HHI", "<H", "<I")
        inline = struct.calcsize(word)
        entries = b""
        for code, kind, value in sorted(tags):
            data, items = _packed(kind, value)
            here = data if len(data) <= inline else struct.pack(word, self._append(data))
            entries += struct.pack(entry, code, kind, items) + here.ljust(inline, b"\0")
        return self._append(struct.pack(count, len(tags)) + entries + struct.pack(word, following))


def _empty_level(size: tuple[int, int], tile_px: int) -> _Level:
    columns, rows = -(-size[0] // tile_px), -(-size[1] // tile_px)
    return _Level(size, (columns, rows), [0] * (columns * rows), [0] * (columns * rows))


def _packed(kind: int, value: Any) -> tuple[bytes, int]:
    """The bytes of a tag's value and its number of items."""
    if kind == _ASCII:
        text = value.encode("ascii") + b"\0"
        return text, len(text)
    values = [value] if isinstance(value, int) else list(value)
    if kind == _RATIONAL:
        return struct.pack(f"<{len(values)}I", *values), len(values) // 2
    return struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values), len(values)
