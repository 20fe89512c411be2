"""How files are damaged: bytes anywhere, and what a TIFF or DICOM file claims of itself."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random

from tools.fuzz.tiffmap import Directory, Tiff, read_tiff

__all__ = ["Regions", "damage", "damage_bytes", "regions_of"]

#: Kind of place -> (start, end) of its places.
Regions = Mapping[str, Sequence[tuple[int, int]]]

_TEXTS = (270, 305, 306, 700, 65420, 65449)
_OFFSETS, _COUNTS, _TABLES = (273, 324), (279, 325), (347,)
#: Tags whose numbers are replaced by others: sizes, bits, compression, photometric, samples, rows, planes,
#: predictor, tile sizes, sample format, orientation, SubfileType, Subsampling.
_CLAIMS = (254, 256, 257, 258, 259, 262, 274, 277, 278, 284, 317, 322, 323, 339, 530)
_EXTREMES = (0, 1, 2, 3, 7, 255, 256, 4096, 65_535, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
#: DICOM elements of the same kind, (group, element), explicit little endian.
_DICOM_CLAIMS = (
    *((0x28, each) for each in (0x02, 0x04, 0x06, 0x08, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103)),
    *((0x48, each) for each in (0x06, 0x07, 0x08)),
)
_PIXEL_DATA = (b"\xe0\x7f\x10\x00OB", b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00")


def regions_of(data: bytes) -> Regions:
    """The kinds of places of a sound file."""
    if data[128:132] == b"DICM":
        return _dicom_regions(data)
    if data[:2] in (b"II", b"MM"):
        return _tiff_regions(read_tiff(data))
    return {"anywhere": [(0, len(data))]}


def _tiff_regions(tiff: Tiff) -> Regions:
    found: dict[str, list[tuple[int, int]]] = {"header": [(0, 2 * tiff.word)]}

    def add(name: str, start: int, size: int) -> None:
        if size > 0:
            found.setdefault(name, []).append((start, start + size))

    for directory in tiff.directories:
        add("chain", directory.next_at, tiff.word)
        for entry in directory.entries.values():
            add("entries", entry.at, 12 if tiff.word == 4 else 20)
            name = {_OFFSETS: "offsets", _COUNTS: "counts", _TABLES: "tables", _TEXTS: "text"}
            kind = next((name[tags] for tags in name if entry.tag in tags), "numbers")
            if entry.size > tiff.word:
                add(kind, entry.values_at, entry.size)
        for offset, count in _segments(tiff, directory):
            add("data", offset, count)
            add("data heads", offset, min(count, 64))
            add("data tails", offset + max(count - 16, 0), min(count, 16))
    return found


def _segments(tiff: Tiff, directory: Directory) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
        pairs += zip(tiff.values(directory, offsets), tiff.values(directory, counts), strict=False)
    return pairs


def _dicom_regions(data: bytes) -> Regions:
    at = next(data.rfind(tag) for tag in _PIXEL_DATA if tag in data)
    items = [found.start() for found in re.finditer(rb"\xfe\xff\x00\xe0", data[at:])]
    places = {
        "header": [(0, 132)],
        "elements": [(132, at)],
        "pixel header": [(at, at + 12)],
        "data": [(at + 12, len(data))],
    }
    if items:
        places["items"] = [(at + item, at + item + 8) for item in items]
        places["data heads"] = [(at + item + 8, min(at + item + 72, len(data))) for item in items]
    return places


def damage(data: bytes, regions: Regions, rng: Random) -> tuple[bytes, list[str]]:
    """A damaged copy, and what was done, mostly one thing."""
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        structural = rng.random() < 0.3
        changed = _structural(data, rng) if structural else None
        if changed is None:
            name = rng.choice(sorted(regions))
            changed = damage_bytes(data, rng.choice(list(regions[name])), rng, name)
        data, what = changed
        done.append(what)
    return data, done


def damage_bytes(data: bytes, place: tuple[int, int], rng: Random, name: str) -> tuple[bytes, str]:
    """Bytes of a place changed, cut out, overwritten or exchanged; or the file cut off there."""
    start, end = max(place[0], 0), min(place[1], len(data))
    if start >= end:
        start, end = 0, len(data)
    at = rng.randrange(start, end)
    kind = rng.choices(
        ("bit", "bytes", "zeros", "noise", "delete", "swap", "truncate"), (4, 4, 2, 2, 1, 2, 1)
    )[0]
    run = min(rng.choice((1, 4, 16, 64, 256, 2048)), end - at)
    changed = bytearray(data)
    if kind == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(start, end)] = rng.randrange(256)
    elif kind == "zeros":
        changed[at : at + run] = bytes(run)
    elif kind == "noise":
        changed[at : at + run] = rng.randbytes(run)
    elif kind == "delete":
        del changed[at : at + run]
    elif kind == "swap":
        run = min(run, (end - start) // 2)
        other = rng.randrange(start, end - run + 1)
        at = min(at, end - run)
        changed[at : at + run], changed[other : other + run] = data[other : other + run], data[at : at + run]
    else:
        del changed[max(at, 1) :]
    return bytes(changed), f"{kind} in {name} at {at}" + (
        f" ({run} bytes)" if kind in ("zeros", "noise", "delete", "swap") else ""
    )


def _structural(data: bytes, rng: Random) -> tuple[bytes, str] | None:
    if data[128:132] == b"DICM":
        return _dicom_claim(data, rng)
    try:
        tiff = read_tiff(data)
    except (ValueError, struct.error):
        return None
    if not tiff.directories:
        return None
    kinds: tuple[Callable[[Tiff, Directory, Random], tuple[bytes, str] | None], ...] = (
        _claim,
        _claim,
        _claim,
        _count,
        _cycle,
        _swap_tiles,
        _stray_tile,
        _number_in_text,
    )
    return rng.choice(kinds)(tiff, rng.choice(tiff.directories), rng)


def _written(tiff: Tiff, at: int, letter: str, value: int) -> bytes:
    changed = bytearray(tiff.data)
    bits = 8 * struct.calcsize(letter)
    struct.pack_into(tiff.endian + letter, changed, at, value % (1 << bits))
    return bytes(changed)


def _claim(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str] | None:
    entry = directory.entries.get(rng.choice(_CLAIMS))
    if entry is None or entry.kind not in (3, 4) or entry.values_at + entry.size > len(tiff.data):
        return None
    old = tiff.values(directory, entry.tag)[0]
    value = rng.choice((*_EXTREMES, old + 1, old - 1, old * 2, old // 2, old + rng.randint(2, 99)))
    letter = "H" if entry.kind == 3 else "I"
    return _written(tiff, entry.values_at, letter, value), f"tag {entry.tag}: {old} becomes {value}"


def _count(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str]:
    entry = rng.choice(list(directory.entries.values()))
    value = rng.choice((*_EXTREMES, entry.count + 1, max(entry.count - 1, 0)))
    letter = "I" if tiff.word == 4 else "Q"
    return _written(
        tiff, entry.at + 4, letter, value
    ), f"tag {entry.tag}: count {entry.count} becomes {value}"


def _cycle(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str]:
    target = rng.choice([*(each.at for each in tiff.directories), 0, 8, len(tiff.data), 2**32 - 1])
    letter = "I" if tiff.word == 4 else "Q"
    return _written(
        tiff, directory.next_at, letter, target
    ), f"directory at {directory.at} goes on at {target}"


def _tiles(tiff: Tiff, directory: Directory) -> tuple[int, str, int] | None:
    """Position of the offsets of the tiles, their letter, and how many there are."""
    for tag in _OFFSETS:
        entry = directory.entries.get(tag)
        if entry is not None and entry.kind in (4, 16) and entry.values_at + entry.size <= len(tiff.data):
            return entry.values_at, "I" if entry.kind == 4 else "Q", entry.count
    return None


def _swap_tiles(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str] | None:
    """Offset and count of two tiles exchanged: nothing can tell."""
    changed = bytearray(tiff.data)
    for tags in (_OFFSETS, _COUNTS):
        entry = next((directory.entries[tag] for tag in tags if tag in directory.entries), None)
        if entry is None or entry.count < 2 or entry.values_at + entry.size > len(tiff.data):
            return None
        width = entry.size // entry.count
        if tags is _OFFSETS:
            one, two = rng.sample(range(entry.count), 2)
        first, second = (
            slice(entry.values_at + each * width, entry.values_at + (each + 1) * width) for each in (one, two)
        )
        changed[first], changed[second] = changed[second], changed[first]
    return bytes(changed), f"tiles {one} and {two} of the directory at {directory.at} exchanged"


def _stray_tile(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str] | None:
    found = _tiles(tiff, directory)
    if found is None or not found[2]:
        return None
    at, letter, count = found
    tile = rng.randrange(count)
    target = rng.choice(
        (0, 8, len(tiff.data) - 1, len(tiff.data), 2**31, 2**32 - 1, rng.randrange(len(tiff.data)))
    )
    place = at + tile * struct.calcsize(letter)
    return _written(
        tiff, place, letter, target
    ), f"tile {tile} of the directory at {directory.at} at {target}"


def _number_in_text(tiff: Tiff, directory: Directory, rng: Random) -> tuple[bytes, str] | None:
    """A number of the metadata text replaced by one as long."""
    entry = next((directory.entries[tag] for tag in _TEXTS if tag in directory.entries), None)
    numbers = list(re.finditer(rb"\d+", tiff.content(directory, entry.tag))) if entry else []
    if entry is None or not numbers:
        return None
    found = rng.choice(numbers)
    new = "".join(rng.choice("0123456789") for _ in found[0]).encode()
    at = entry.values_at + found.start()
    return tiff.data[:at] + new + tiff.data[at + len(new) :], f"text {found[0]!r} becomes {new!r}"


def _dicom_claim(data: bytes, rng: Random) -> tuple[bytes, str] | None:
    group, element = rng.choice(_DICOM_CLAIMS)
    at = data.find(struct.pack("<HH", group, element), 132)
    if at < 0 or data[at + 4 : at + 6] not in (b"US", b"UL", b"IS"):
        return None
    kind, length = data[at + 4 : at + 6], int.from_bytes(data[at + 6 : at + 8], "little")
    changed = bytearray(data)
    value = rng.choice(_EXTREMES)
    text = (
        str(value).encode()[:length].ljust(length)
        if kind == b"IS"
        else (value % (1 << 8 * length)).to_bytes(length, "little")
    )
    changed[at + 8 : at + 8 + length] = text
    return bytes(changed), f"element ({group:04x},{element:04x}) becomes {value}"
