"""Where the frames of a DICOM file lie: their bytes, and in tiled pictures their places.

Only tags and lengths are read, and each is compared with the file's size before it is believed.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["FrameTable", "frame_table", "unwrapped"]

#: An undefined length: a delimiter ends the value (PS3.5, 7.1.1).
_UNDEFINED = 0xFFFFFFFF
#: Value representations with two reserved bytes and a length of four (PS3.5, 7.1.2).
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PER_FRAME, _EXTENDED_OFFSETS, _PIXELS = 0x52009230, 0x7FE00001, 0x7FE00010
#: Of a frame: its plane position and optical path, which are looked into, and their values.
_INTO = frozenset({0x0048021A, 0x00480207})
_COLUMN, _ROW, _FOCUS, _PATH = 0x0048021E, 0x0048021F, 0x0040074A, 0x00480106
_WANTED = frozenset({_COLUMN, _ROW, _FOCUS, _PATH})
_VALUE_BYTES, _DEEPEST, _ITEM_HEAD = 64, 16, 8
#: More than the largest slides have; bounds what is allocated for a claim.
_MOST_FRAMES = 1 << 22
#: With which a frame of JPEG, JPEG-LS, JPEG 2000 or JPEG XL begins: tells frames in several fragments apart.
_FRAME_STARTS = (b"\xff\xd8", b"\xff\x4f", b"\xff\x0a", b"\0\0\0\x0c")


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """The frames of one file.

    Attributes:
        offsets, counts: (n,) int64 position and bytes of each; of compressed ones with the tags of their
            items, see `unwrapped`.
        corners: (n, 2) int64, the (x, y) of each in the picture; None where they were not asked for.
        planes: how many focal planes and optical paths the frames lie in.
    """

    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    corners: NDArray[np.int64] | None
    planes: int


def frame_table(
    file: BinaryIO, frames: int, *, explicit: bool, frame_bytes: int | None, positions: bool
) -> FrameTable:
    """Find the frames of a file that stands after its shared functional groups.

    Args:
        frames: how many it claims.
        explicit: value representations are stored.
        frame_bytes: of an uncompressed frame; None for compressed ones.
        positions: whether the places of the frames are wanted.

    Raises:
        ValueError: what it says cannot be, with the reason.
    """
    size = os.fstat(file.fileno()).st_size
    if not 0 < frames <= _MOST_FRAMES or frames * (frame_bytes or _ITEM_HEAD) > size:
        raise ValueError(f"it claims {frames} frames, which its {size} bytes cannot hold")
    corners, planes, extended, last = None, 1, np.empty(0, np.int64), 0
    while True:
        tag, representation, length = _element(file, explicit)
        if tag <= last:
            raise ValueError(f"its header is damaged: element {tag:08X} follows {last:08X}")
        last = tag
        if tag == _PIXELS:
            break
        if tag == _PER_FRAME and positions:
            corners, planes = _corners(file, frames, length, explicit)
        elif tag == _EXTENDED_OFFSETS and length == 8 * frames:
            extended = np.frombuffer(file.read(length), "<u8").astype(np.int64)
        elif length != _UNDEFINED:
            file.seek(length, os.SEEK_CUR)
        else:
            deque(_items(file, length, explicit and representation != b"UN"), maxlen=0)
    if positions and corners is None:
        raise ValueError("it is tiled sparsely and does not say where its frames are")
    if frame_bytes:
        offsets, counts = _native(file.tell(), size, frames, frame_bytes, length)
    else:
        offsets, counts = _wrapped(file, frames, length, extended)
    return FrameTable(offsets=offsets, counts=counts, corners=corners, planes=planes)


def unwrapped(data: bytes) -> bytes:
    """A compressed frame without the tags of its items, of which it may have several (fragments).

    Raises:
        ValueError: these are no items, or do not fill the frame's place.
    """
    parts, at = [], 0
    while at < len(data):
        tag, length = _item(data[at : at + _ITEM_HEAD])
        begin = at + _ITEM_HEAD
        at = begin + length
        if tag != _ITEM or at > len(data):
            raise ValueError("its bytes are not where the file says that they are")
        parts.append(data[begin:at])
    return parts[0] if len(parts) == 1 else b"".join(parts)


# elements --------------------------------------------------------------------------------------


def _element(file: BinaryIO, explicit: bool) -> tuple[int, bytes, int]:
    """Tag, value representation and length of an element; the file stands at its value then."""
    head = file.read(8)
    if len(head) < 8:
        raise ValueError("it is truncated: it ends before its pixels do")
    group, number, length = struct.unpack("<HHI", head)
    tag = group << 16 | number
    if group == 0xFFFE or not explicit:
        return tag, b"", length
    representation = head[4:6]
    if representation in _LONG:
        return tag, representation, int.from_bytes(file.read(4), "little")
    return tag, representation, length >> 16


def _items(file: BinaryIO, length: int, explicit: bool, depth: int = 0) -> Iterator[dict[int, bytes]]:
    """The wanted elements of every item of the sequence at the file's position."""
    end = None if length == _UNDEFINED else file.tell() + length
    while end is None or file.tell() < end:
        tag, _, size = _element(file, explicit)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM or depth > _DEEPEST:
            raise ValueError("its functional groups are damaged")
        yield _wanted(file, size, explicit, depth)


def _wanted(file: BinaryIO, length: int, explicit: bool, depth: int) -> dict[int, bytes]:
    values: dict[int, bytes] = {}
    end, last = None if length == _UNDEFINED else file.tell() + length, 0
    while end is None or file.tell() < end:
        tag, representation, size = _element(file, explicit)
        if tag == _ITEM_END:
            break
        if tag <= last:
            raise ValueError(f"its functional groups are damaged: element {tag:08X} follows {last:08X}")
        last = tag
        if tag in _INTO or size == _UNDEFINED:
            for found in _items(file, size, explicit and representation != b"UN", depth + 1):
                values.update(found if tag in _INTO else {})
        elif tag in _WANTED and size <= _VALUE_BYTES:
            values[tag] = file.read(size)
        else:
            file.seek(size, os.SEEK_CUR)
    return values


def _corners(file: BinaryIO, frames: int, length: int, explicit: bool) -> tuple[NDArray[np.int64], int]:
    """(n, 2) corner of every frame, and the number of focal planes times optical paths."""
    corners, planes = np.empty((frames, 2), np.int64), set[tuple[bytes, bytes]]()
    listed = 0
    for values in _items(file, length, explicit):
        if listed == frames or len(values.get(_COLUMN, b"")) != 4 or len(values.get(_ROW, b"")) != 4:
            raise ValueError(f"it does not give the positions of its {frames} frames")
        corners[listed] = [int.from_bytes(values[tag], "little", signed=True) - 1 for tag in (_COLUMN, _ROW)]
        planes.add((values.get(_FOCUS, b""), values.get(_PATH, b"")))
        listed += 1
    if listed != frames:
        raise ValueError(f"it gives the positions of {listed} of its {frames} frames")
    return corners, len(planes)


# pixels ----------------------------------------------------------------------------------------


def _native(
    start: int, size: int, frames: int, frame_bytes: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    needed = frames * frame_bytes
    if length not in (needed, needed + needed % 2):
        raise ValueError(f"its {frames} frames take {needed} bytes, but its pixels have {length}")
    if start + needed > size:
        raise ValueError(f"it is truncated: its pixels end at byte {start + needed}, and it has {size}")
    return start + np.arange(frames) * frame_bytes, np.full(frames, frame_bytes, np.int64)


def _wrapped(
    file: BinaryIO, frames: int, length: int, extended: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """By the file's table of offsets where it is in order; else by walking from item to item."""
    at = file.tell()
    tag, table_bytes = _item(os.pread(file.fileno(), _ITEM_HEAD, at))
    if length != _UNDEFINED or tag != _ITEM:
        raise ValueError("its pixels are not stored as a compressed picture's, in items")
    at += _ITEM_HEAD
    table = np.empty(0, np.int64)
    if table_bytes == 4 * frames:
        table = np.frombuffer(os.pread(file.fileno(), table_bytes, at), "<u4").astype(np.int64)
    first = at + table_bytes
    starts = first + (extended if len(extended) else table)
    if not len(starts) or starts[0] != first or (np.diff(starts) <= 0).any():
        starts, end = _walked(file, first, frames)
    else:
        end = _last(_fragments(file, int(starts[-1])))
    ends = np.append(starts[1:], end)
    return starts, ends - starts


def _walked(file: BinaryIO, first: int, frames: int) -> tuple[NDArray[np.int64], int]:
    """Where every frame starts, and where the last one ends."""
    found = list(_fragments(file, first))
    starts = [start for start, _, _ in found]
    if len(found) > frames:
        starts = [start for start, _, begin in found if begin.startswith(_FRAME_STARTS)]
    if len(starts) != frames or starts[:1] != [first]:
        raise ValueError(f"its {frames} frames cannot be told apart: it has {len(found)} pieces of pixels")
    return np.array(starts, np.int64), _last(found)


def _last(fragments: Iterable[tuple[int, int, bytes]]) -> int:
    for _, end, _ in deque(fragments, maxlen=1):
        return end
    raise ValueError("its last frame is not where its table of offsets says")


def _fragments(file: BinaryIO, at: int) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, first bytes) of the items from a position on, up to the end of the pixels."""
    while True:
        head = os.pread(file.fileno(), _ITEM_HEAD + 4, at)
        tag, length = _item(head)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ValueError(f"it is truncated or damaged: its pixels break off at byte {at}")
        yield at, at + _ITEM_HEAD + length, head[_ITEM_HEAD:]
        at += _ITEM_HEAD + length


def _item(head: bytes) -> tuple[int, int]:
    """Tag and length of an item; tag 0 where there is none."""
    if len(head) < _ITEM_HEAD:
        return 0, 0
    group, number, length = struct.unpack("<HHI", head[:_ITEM_HEAD])
    return group << 16 | number, length
