"""Headers of tars and JPEGs from untrusted sources: checked before anything is decoded."""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Iterator

__all__ = ["jpeg_fault", "tar_members"]

_UNIT = tarfile.BLOCKSIZE
_PLAIN, _PAX, _PAX_FOR_ALL = (b"0", b"\0"), b"x", b"g"
_KINDS = {b"1": "a link", b"2": "a link", b"5": "a folder", b"L": "a file with a long name"}
#: Bytes of extended headers between two members: far more than any program writes.
_MOST_BETWEEN = 64 * 1024
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,4}) ([^=\n]+)=")

_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_HUFFMAN, _END, _SCAN, _RESTARTS_EVERY = 0xC4, 0xD9, 0xDA, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_FRAMES, _SEQUENTIAL = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, (0xC0, 0xC1)
#: Quantisation and entropy tables, application data, comments.
_SEGMENTS = {_HUFFMAN, 0xCC, 0xDB, _RESTARTS_EVERY, *range(0xE0, 0xF0), 0xFE}


def tar_members(file: int, largest: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size (bytes) of each member of an uncompressed tar, in order.

    `tarfile` cannot keep these bounds (Python 3.11): it reads whatever calls itself a header into memory
    (1 GiB for a pax header that says so), and keeps a record of 440 bytes per member.

    Args:
        file: its descriptor; its position is neither used nor changed.
        largest: bytes that a member may have.

    Raises:
        ValueError: it is damaged, or holds anything but plain files of up to that size.
    """
    length = os.fstat(file).st_size
    at = end = 0
    renamed = None
    while at < length and (header := os.pread(file, _UNIT, at)).strip(b"\0"):
        name, size, kind = _parse_header(header, at)
        start, plain = at + _UNIT, kind in _PLAIN
        if plain:
            name, renamed = renamed or name, None
        elif kind not in (_PAX, _PAX_FOR_ALL):
            what = _KINDS.get(kind, f"of type {kind!r}")
            raise ValueError(f"member {name[:64]!r} is {what}, not a plain file")
        if size > (largest if plain else _MOST_BETWEEN) or start - end > _MOST_BETWEEN:
            raise ValueError(f"member {name[:64]!r} or its header, of {size} bytes, is too large for a tile")
        if start + size > length:
            raise ValueError(f"it is cut short in member {name[:64]!r}")
        if plain:
            end = start + size
            yield name, start, size
        else:
            renamed = _parse_pax(os.pread(file, size, start), kind) or renamed
        at = start + size + -size % _UNIT


def _parse_header(header: bytes, at: int) -> tuple[str, int, bytes]:
    """Name, size in bytes and type of a member."""
    if len(header) < _UNIT or sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
        raise ValueError(f"it is not an uncompressed tar, or is damaged or cut short at byte {at}")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name), _number(header[124:136]), header[156:157]


def _number(field: bytes) -> int:
    """A number of a header, in octal digits or, where it is large, in binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise ValueError(f"it is not an uncompressed tar, or is damaged: {field!r} is no number")
    return int(digits[1] or b"0", 8)


def _parse_pax(records: bytes, kind: bytes) -> str | None:
    """The name that an extended header gives to the member after it, None when it gives none."""
    at, name = 0, None
    while at < len(records):
        found = _PAX_RECORD.match(records, at)
        end = at + int(found[1]) if found else 0
        if found is None or end <= found.end() or records[end - 1 : end] != b"\n":
            raise ValueError("an extended header in it is damaged")
        key = found[2]
        if key == b"size" or key.startswith(b"GNU.sparse") or (key == b"path" and kind != _PAX):
            raise ValueError(f"an extended header in it sets {key[:64]!r}, which no plain small file needs")
        if key == b"path":
            name = os.fsdecode(records[found.end() : end - 1])
        at = end
    return name


def jpeg_fault(jpeg: bytes, side: int) -> str | None:
    """What is wrong with the JPEG of a tile of side x side px, None when nothing is.

    Markers are found as libjpeg finds them. One that does not belong where it stands is the trace
    of damage: there decoders leave the rest of the image grey, and not all of them say so.
    """
    if not jpeg.startswith(b"\xff\xd8"):
        return "it is not a JPEG"
    at, channels, once, restarts, scanning = 2, 0, False, False, False
    allowed = _SEGMENTS | _FRAMES
    while found := _MARKER.search(jpeg, at):
        code, at = jpeg[found.end() - 1], found.end()
        segment = jpeg[at : at + 8]
        if scanning and code == _END:
            return None
        if scanning and restarts and code in _RESTARTS:
            continue
        if code not in allowed or len(segment) < 8:
            break
        if code in _FRAMES:
            depth, height, width, channels = struct.unpack(">xxBHHB", segment)
            if (width, height, depth) != (side, side, 8) or channels not in (1, 3):
                return (
                    f"it is {width}x{height} px, {channels} channels of {depth} bits; "
                    f"{side}x{side} px, RGB or grey, of 8 bits were expected"
                )
            allowed, once = _SEGMENTS | {_SCAN}, code in _SEQUENTIAL
        elif code == _RESTARTS_EVERY:
            restarts = any(segment[2:4])
        elif code == _SCAN:
            scanning = True
            allowed = set() if once and segment[2] == channels else {_SCAN, _HUFFMAN, _RESTARTS_EVERY}
        at += int.from_bytes(segment[:2], "big")
    return "it is a damaged JPEG, or cut short"
