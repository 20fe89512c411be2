"""Where things lie in a TIFF: a walker of its own, so that the oracle shares no code with the readers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

__all__ = ["Directory", "Tag", "Tiff", "read_tiff"]

#: Bytes of one value, by TIFF type; unknown types count as one byte.
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
_LETTERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SUB_IFDS = 330
_MOST_DIRECTORIES = 64


@dataclass(frozen=True)
class Tag:
    """One tag: its own position, and position and size in bytes of its values."""

    at: int
    tag: int
    kind: int
    count: int
    values_at: int
    size: int


@dataclass(frozen=True)
class Directory:
    """An image directory; `next_at` is where the pointer to the next one lies."""

    at: int
    entries: dict[int, Tag]
    next_at: int


@dataclass
class Tiff:
    """A parsed file. `word` is 4, or 8 in a BigTIFF."""

    data: bytes
    endian: str
    word: int
    directories: list[Directory] = field(default_factory=list)

    def values(self, directory: Directory, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Whole numbers of a tag."""
        entry = directory.entries.get(tag)
        if entry is None or entry.kind not in _LETTERS:
            return default
        return struct.unpack_from(
            f"{self.endian}{entry.count}{_LETTERS[entry.kind]}", self.data, entry.values_at
        )

    def content(self, directory: Directory, tag: int) -> bytes:
        """Bytes of a tag."""
        entry = directory.entries.get(tag)
        return b"" if entry is None else self.data[entry.values_at : entry.values_at + entry.size]

    def pointer(self, at: int) -> int:
        """A position that is stored at a position."""
        return int(struct.unpack_from(self.endian + ("I" if self.word == 4 else "Q"), self.data, at)[0])


def read_tiff(data: bytes) -> Tiff:
    """The directories of a TIFF, those of SubIFDs after the one that names them.

    Raises:
        ValueError, struct.error: it is none, or a directory cannot be read.
    """
    endian = {b"II": "<", b"MM": ">"}.get(data[:2])
    if endian is None:
        raise ValueError("no TIFF")
    version = struct.unpack_from(endian + "H", data, 2)[0]
    if version not in (42, 43):
        raise ValueError(f"TIFF version {version}")
    tiff = Tiff(data, endian, 4 if version == 42 else 8)
    pending, seen = [tiff.pointer(tiff.word)], set[int]()
    while pending:
        at = pending.pop(0)
        if at == 0 or at in seen or len(seen) >= _MOST_DIRECTORIES:
            continue
        seen.add(at)
        directory = _directory(tiff, at)
        tiff.directories.append(directory)
        pending = [*tiff.values(directory, _SUB_IFDS), *pending, tiff.pointer(directory.next_at)]
    return tiff


def _directory(tiff: Tiff, at: int) -> Directory:
    counter, head, letters = ("H", 2, "HHI") if tiff.word == 4 else ("Q", 8, "HHQ")
    (count,) = struct.unpack_from(tiff.endian + counter, tiff.data, at)
    if count > 4096:
        raise ValueError(f"a directory of {count} tags")
    width, fixed = (12, 8) if tiff.word == 4 else (20, 12)
    entries = {}
    for number in range(count):
        here = at + head + number * width
        tag, kind, values = struct.unpack_from(tiff.endian + letters, tiff.data, here)
        size = values * _SIZES.get(kind, 1)
        entries[tag] = Tag(
            here, tag, kind, values, here + fixed if size <= tiff.word else tiff.pointer(here + fixed), size
        )
    return Directory(at, entries, at + head + count * width)
