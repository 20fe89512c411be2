"""Check what the directories of a TIFF file claim against the file's length, before a library relies on it.

Damaged headers have made libraries allocate terabytes, which ends the process, and plan slides of a
million pixels a side that have sixteen tiles. Nothing is decoded here, and no table of tiles is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slide2vec.readers.refusal import COPY_AGAIN, Refusal

__all__ = ["Directory", "check_bounds"]

#: Bytes of a value of each TIFF type (TIFF 6.0; 13: Adobe's supplement 1; 16 to 18: BigTIFF).
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
#: In the files of all vendors there are at most a few dozen; stacks of microscopes have thousands.
_MOST_DIRECTORIES = 10_000
#: tifffile's limit.
_MOST_TAGS = 4096
#: A slide of 76 mm at 0.018 µm/px.
_MOST_SIDE_PX = 1 << 22
#: Decoded bytes of a tile: 9,459 px a side in RGB. The largest tiles that are known of slides have 4,096.
_MOST_TILE_BYTES = 1 << 28
#: Values of any tag but the tables of tiles; microscopes' metadata are a few MB.
_MOST_VALUE_BYTES = 1 << 28
#: Decoded bytes that one byte can hold: LZW 1,365 (the longest string in 12 bits), Deflate 1,032, JPEG about
#: 1,000 (6 codes of one bit for 256 RGB px); uncompressed 1. Of others it is not known.
_DENSITY = {1: 1, 5: 1400, 7: 1400, 8: 1400, 32946: 1400}

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PLANAR = 256, 257, 258, 259, 277, 284
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_COUNTS = 273, 278, 279
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_SUB_DIRECTORIES, _NDPI = 330, 65420
_TABLES = {_STRIP_OFFSETS, _STRIP_COUNTS, _TILE_OFFSETS, _TILE_COUNTS}
#: Those without which pixels are not found or not decoded.
_STRUCTURE = _TABLES | {_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PLANAR, _ROWS_PER_STRIP}
_STRUCTURE |= {_TILE_WIDTH, _TILE_LENGTH, _SUB_DIRECTORIES}
#: Tags that hold one whole number, and their names.
_SCALARS = {
    254: "NewSubfileType",
    _WIDTH: "ImageWidth",
    _LENGTH: "ImageLength",
    _COMPRESSION: "Compression",
    262: "PhotometricInterpretation",
    266: "FillOrder",
    274: "Orientation",
    _SAMPLES: "SamplesPerPixel",
    _ROWS_PER_STRIP: "RowsPerStrip",
    _PLANAR: "PlanarConfiguration",
    317: "Predictor",
    _TILE_WIDTH: "TileWidth",
    _TILE_LENGTH: "TileLength",
}
#: Tags that hold one whole number, or one per channel.
_FORMATS = 339
_PER_CHANNEL = {_BITS: "BitsPerSample", _FORMATS: "SampleFormat"}
#: SHORT, LONG, their signed kin, IFD and LONG8. What is stored as bytes libraries do not take for a number.
_WHOLE = {3, 4, 8, 9, 13, 16, 17, 18}


@dataclass(frozen=True)
class _Tag:
    """An entry of a directory: its type, how many values, and where in the file these are."""

    kind: int
    count: int
    at: int

    @property
    def size(self) -> int:
        return self.count * _SIZES.get(self.kind, 0)


@dataclass(frozen=True)
class Directory:
    """What is known of a directory: its name for messages, its compression and the tags that it has."""

    name: str
    compression: int
    tags: frozenset[int]


@dataclass(frozen=True)
class _Layout:
    """How the numbers of a file are stored."""

    order: str
    count: str  # of entries
    offset: str
    ndpi: bool = False

    @property
    def entry(self) -> int:
        return 4 + 2 * struct.calcsize(self.offset)


def check_bounds(path: Path) -> list[Directory]:
    """The directories of a TIFF file, in the order of the file, each followed by its sub-directories.

    Raises:
        Refusal: one of them claims what a file of this length cannot hold, or they form a circle.
        OSError: the file cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        return list(_Walk(file).directories())
    except _Claim as error:
        raise Refusal(f"it is a malformed or truncated TIFF: {error}; {COPY_AGAIN}") from None
    finally:
        os.close(file)


class _Claim(ValueError):
    """What a file of this length cannot hold."""


class _Walk:
    """From directory to directory, each of them once."""

    def __init__(self, file: int) -> None:
        self._file, self._size = file, os.fstat(file).st_size
        self._seen: set[int] = set()
        head = self._read(0, 16, "the header")
        order = "<" if head[:2] == b"II" else ">"
        if head[2:4] in {b"+\0", b"\0+"}:
            self._layout, start = _Layout(order, "Q", "Q"), 8
        else:
            self._layout, start = _Layout(order, "H", "I"), 4
        self._first = self._number(self._layout.offset, head[start:])
        far = self._number("Q", head[4:12])
        if start == 4 and order == "<" and self._is_ndpi(far):
            self._layout, self._first = _Layout(order, "H", "I", ndpi=True), far

    def directories(self) -> Iterator[Directory]:
        at, index = self._first, 0
        if not at:
            raise _Claim("it holds no image directory")
        while at:
            at = yield from self._directory(at, f"directory {index}")
            index += 1

    def _directory(
        self, at: int, name: str, with_those_below: bool = True
    ) -> Generator[Directory, None, int]:
        """A directory and those below it; returns where the next one is (0: nowhere)."""
        if at in self._seen:
            raise _Claim(f"{name} is at byte {at} again: the directories form a circle")
        self._seen.add(at)
        if len(self._seen) > _MOST_DIRECTORIES:
            raise _Claim(f"it has more than {_MOST_DIRECTORIES} directories")
        tags, following = self._tags(at, name)
        for number, tag in tags.items():
            self._check_tag(name, number, tag)
        self._check_image(name, tags)
        yield Directory(name, self._value(tags, _COMPRESSION, 1), frozenset(tags))
        below = tags.get(_SUB_DIRECTORIES) if with_those_below else None
        for index, place in enumerate(self._values(below) if below else ()):
            yield from self._directory(place, f"{name}.{index}", with_those_below=False)
        return following

    def _tags(self, at: int, name: str) -> tuple[dict[int, _Tag], int]:
        """The entries of a directory, and where the next one is (0: nowhere)."""
        layout = self._layout
        width = struct.calcsize(layout.count)
        count = self._number(layout.count, self._read(at, width, name))
        if not 0 < count <= _MOST_TAGS:
            raise _Claim(f"{name} claims {count} tags")
        tail = 8 + 4 * count if layout.ndpi else struct.calcsize(layout.offset)
        start = at + width
        block = self._read(start, count * layout.entry + tail, name)
        tags: dict[int, _Tag] = {}
        for index in range(count):
            number, tag = self._tag(block, index, start, count)
            tags.setdefault(number, tag)
        return tags, self._number("Q" if layout.ndpi else layout.offset, block[count * layout.entry :])

    def _tag(self, block: bytes, index: int, start: int, count: int) -> tuple[int, _Tag]:
        layout, at = self._layout, index * self._layout.entry
        number, kind, values, place = struct.unpack_from(f"{layout.order}HH2{layout.offset}", block, at)
        if values * _SIZES.get(kind, 0) <= struct.calcsize(layout.offset):
            return number, _Tag(kind, values, start + at + layout.entry - struct.calcsize(layout.offset))
        if layout.ndpi:  # the high halves of all offsets follow the next directory's
            place |= self._number("I", block[count * layout.entry + 8 + 4 * index :]) << 32
        return number, _Tag(kind, values, place)

    def _check_tag(self, name: str, number: int, tag: _Tag) -> None:
        most = self._size if number in _TABLES else min(self._size, _MOST_VALUE_BYTES)
        if tag.size > most or (number in _STRUCTURE and tag.at + tag.size > self._size):
            raise _Claim(
                f"{name} claims {tag.size} bytes of tag {number} at byte {tag.at}, the file has {self._size}"
            )

        known = _SCALARS.get(number) or _PER_CHANNEL.get(number)
        if known and (tag.kind not in _WHOLE or not tag.count):
            raise _Claim(f"{known} of {name} is no whole number (TIFF type {tag.kind}, {tag.count} values)")
        if number in _SCALARS and tag.count > 1:
            raise _Claim(f"{known} of {name} has {tag.count} values instead of one")

    def _check_image(self, name: str, tags: Mapping[int, _Tag]) -> None:
        if _WIDTH not in tags or _LENGTH not in tags:
            return
        width, height = self._value(tags, _WIDTH, 0), self._value(tags, _LENGTH, 0)
        if not (0 < width <= _MOST_SIDE_PX and 0 < height <= _MOST_SIDE_PX):
            raise _Claim(f"{name} claims {width}x{height} px, at most {_MOST_SIDE_PX} a side are read")
        self._check_samples(name, tags)
        tiled = _TILE_WIDTH in tags
        tile_w = self._value(tags, _TILE_WIDTH, 0) if tiled else width
        tile_h = self._value(tags, _TILE_LENGTH, 0) if tiled else self._value(tags, _ROWS_PER_STRIP, height)
        tile_h = tile_h if tiled else min(tile_h, height)
        if not tile_w or not tile_h:
            raise _Claim(f"{name} claims {'tiles' if tiled else 'strips'} of {tile_w}x{tile_h} px")
        planes = self._value(tags, _SAMPLES, 1) if self._value(tags, _PLANAR, 1) == 2 else 1
        needed = -(-width // tile_w) * -(-height // tile_h) * planes
        what = f"{name} claims {width}x{height} px in {'tiles' if tiled else 'strips'} of {tile_w}x{tile_h}"
        for table in _TABLES & tags.keys():
            if not needed <= tags[table].count <= 4 * needed + 1024:
                raise _Claim(f"{what}, which are {needed}, and lists {tags[table].count} of them")
        self._check_segment(what, tags, tile_w * tile_h, planes)

    def _check_samples(self, name: str, tags: Mapping[int, _Tag]) -> None:
        if self._value(tags, _SAMPLES, 1) < 1:
            raise _Claim(f"{name} claims 0 channels (SamplesPerPixel)")
        formats = self._values(tags[_FORMATS]) if _FORMATS in tags else ()
        if len(set(formats)) > 1:
            raise _Claim(f"SampleFormat of {name} differs between the channels: {formats}")

    def _check_segment(self, what: str, tags: Mapping[int, _Tag], pixels: int, planes: int) -> None:
        """A tile or strip must be of bearable size, or a strip at least hold what it claims."""
        samples = self._value(tags, _SAMPLES, 1) // planes
        decoded = pixels * max(1, samples) * self._value(tags, _BITS, 1) // 8
        if decoded <= _MOST_TILE_BYTES:
            return
        density = _DENSITY.get(self._value(tags, _COMPRESSION, 1), 0)
        counts = tags.get(_STRIP_COUNTS)
        if _TILE_WIDTH not in tags and counts and decoded <= density * max(self._values(counts)):
            return
        raise _Claim(f"{what}, each of which decodes to {decoded} bytes")

    def _value(self, tags: Mapping[int, _Tag], number: int, default: int) -> int:
        """The first value of a tag."""
        tag = tags.get(number)
        if tag is None or tag.kind not in _INTEGERS or not tag.count:
            return default
        return self._values(_Tag(tag.kind, 1, tag.at))[0]

    def _values(self, tag: _Tag) -> tuple[int, ...]:
        if tag.kind not in _INTEGERS:
            return ()
        data = self._read(tag.at, tag.size, "a tag")
        return struct.unpack(f"{self._layout.order}{tag.count}{_INTEGERS[tag.kind]}", data)

    def _is_ndpi(self, at: int) -> bool:
        """Whether a directory in the layout of Hamamatsu's, with places of 64 bits, is there."""
        if at + 2 > self._size:
            return False
        count = self._number("H", os.pread(self._file, 2, at))
        block = os.pread(self._file, 12 * min(count, _MOST_TAGS), at + 2)
        return any(self._number("H", block[i:]) == _NDPI for i in range(0, len(block) - 11, 12))

    def _number(self, kind: str, data: bytes) -> int:
        return int(struct.unpack_from(self._layout.order + kind, data)[0])

    def _read(self, at: int, count: int, what: str) -> bytes:
        data = os.pread(self._file, count, at) if 0 <= at < self._size else b""
        if len(data) < count:
            raise _Claim(f"{what} lies at byte {at} of {self._size}")
        return data
