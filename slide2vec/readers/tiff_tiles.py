"""The compressed tiles of a TIFF: found, read in file order, JPEGs made decodable by themselves."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError
from slide2vec.readers import codecs
from slide2vec.readers.known_headers import KnownHeaders
from slide2vec.readers.probe import Probe, TiffLevel
from slide2vec.readers.tile_table import Fail, Parts, TileFormat, TilePlace, TileTable, tile_places

__all__ = [
    "RGB_MARKER",
    "TiffTiles",
    "colour_conflict",
    "read_pieces",
    "spliced",
    "tile_format",
    "why_no_jpeg",
    "why_not",
]

_VENDORS = ("aperio", "generic", "ome")
#: Reading on through a hole of so many bytes costs less than another request, on a network drive above all.
_GAP = 16 << 10
#: Bytes of one request at most.
_SPAN = 8 << 20
#: An Adobe marker (T.872, 6.5.3) with transform 0: the components are RGB.
RGB_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
#: Where the markers of a JPEG are.
_HEAD = 2048
_ADOBE, _JFIF = b"\xff\xee\x00\x0eAdobe", b"JFIF\x00"
#: A JFIF marker (T.871, 10): the components are YCbCr.
_JFIF_MARKER = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
#: Decoded bytes of the largest tile or strip that is read: it is kept whole while its rows are needed.
_MOST_BYTES = 256 << 20
#: Bytes of the strips that raw pixels are cut into.
_RAW_STRIP = 1 << 20
#: ExtraSamples (TIFF 6.0, section 18). What is unspecified is taken as libtiff does.
_ALPHA: dict[int, Literal["premultiplied", "straight"]] = {
    0: "premultiplied",
    1: "premultiplied",
    2: "straight",
}


def why_no_jpeg(probe: Probe) -> str | None:
    """Why the tiles of a file cannot be decoded as JPEGs by themselves, None when they can."""
    if reason := _why_not_plain(probe):
        return reason
    for level in probe.levels:
        if level.tile is None or level.compression != "JPEG":
            return f"it is stored in {level.compression} {'strips' if level.tile is None else 'tiles'}"
        if (level.samples, level.bits, level.planar) != (3, 8, False):
            return f"it has {level.samples} channels of {level.bits} bits, not interleaved 8-bit RGB"
    return None


def why_not(probe: Probe) -> str | None:
    """Why the tiles of a file cannot be read and decoded by themselves, None when they can."""
    if reason := _why_not_plain(probe):
        return reason
    for level in map(_in_rows, probe.levels):
        form = tile_format(level, probe.vendor)
        if level.bits != 8:
            return f"it has {level.bits} bits per channel and only 8 are read"
        if reason := codecs.why_not(form):
            return reason
        size = form.width * form.height * form.samples
        if size > _MOST_BYTES:
            return f"it has {'strips' if form.is_strip else 'tiles'} of {size >> 20} MB"
    return None


def _why_not_plain(probe: Probe) -> str | None:
    if probe.kind != "tiff" or probe.vendor not in _VENDORS:
        return f"its tiles are not those of a plain TIFF ({probe.vendor or probe.kind})"
    return None


def tile_format(level: TiffLevel, vendor: str) -> TileFormat:
    """How the tiles or strips of a level are coded."""
    # Aperio's 33003 is YCbCr whatever the tag says, unless the codestream was told to convert.
    ycc = vendor == "aperio" and level.compression == "APERIO_JP2000_YCBC"
    photometric = "YCBCR" if ycc else level.photometric
    width, height = level.tile or (level.width, min(level.rows_per_strip, level.height))
    return TileFormat(
        width=width,
        height=height,
        compression=level.compression,
        photometric=photometric,
        samples=level.samples,
        planar=level.planar,
        predictor=level.predictor,
        alpha=_ALPHA.get(level.extra_samples[0]) if level.extra_samples else None,
        colormap=None if level.colormap is None else (level.colormap.T >> 8).astype(np.uint8),
        is_subsampled=photometric == "YCBCR" and level.subsampling != (1, 1),
        reversed_bits=level.fill_order == 2,
        is_strip=level.tile is None,
        rgb=photometric == "RGB",
    )


def _planes(form: TileFormat) -> int:
    return form.samples if form.planar else 1


def _in_rows(level: TiffLevel) -> TiffLevel:
    """Strips of raw pixels cut into many, of one height, since any row of theirs can be read by itself; as
    they are where one is left out or shorter than its rows."""
    if level.tile is not None or level.compression != "NONE" or level.planar:
        return level
    row, whole = level.width * level.samples, level.rows_per_strip
    rows = max(1, _RAW_STRIP // row)
    if whole < level.height:
        rows = next(count for count in range(min(rows, whole), 0, -1) if whole % count == 0)
    starts = np.arange(0, level.height, whole)
    is_short = level.counts < np.minimum(whole, level.height - starts) * row
    if rows >= whole or is_short.any():
        return level
    tops = np.arange(0, level.height, rows)
    strips, inside = np.divmod(tops, whole)
    counts = np.minimum(rows, level.height - tops) * row
    return replace(level, rows_per_strip=rows, offsets=level.offsets[strips] + inside * row, counts=counts)


def spliced(level: TiffLevel, data: bytes, marker: bytes) -> bytes:
    """A JPEG tile with the tables that the level's tiles share, and with a marker that says its colours."""
    tables = level.jpeg_tables[2:-2] if level.jpeg_tables else b""
    return data[:2] + marker + tables + data[2:] if tables or marker else data


class TiffTiles(TileTable):
    """The compressed tiles of a TIFF. See `TileTable`.

    Args:
        is_checked: JPEG tiles are looked at before a decoder gets them that may not notice damage.
    """

    def __init__(self, probe: Probe, fail: Fail, *, is_checked: bool = False) -> None:
        self._levels = [_in_rows(level) for level in probe.levels]
        super().__init__(probe.name, [tile_format(level, probe.vendor) for level in self._levels], fail)
        self._headers = KnownHeaders(self._forms) if is_checked else None
        self._file: int | None = os.open(probe.path, os.O_RDONLY)
        self._markers = [
            _marker(form, _head(self._file, level))
            for form, level in zip(self._forms, self._levels, strict=True)
        ]

    def close(self) -> None:
        """Release the file. May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def tiles_in(self, level: int, x: int, y: int, width: int, height: int) -> list[TilePlace]:
        """See `TileTable.tiles_in`."""
        return self.parted(level, x, y, width, height)[0]

    def parted(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> tuple[list[TilePlace], list[TilePlace]]:
        """As `tiles_in`; and those that the file leaves out."""
        spec, form = self._levels[level], self._forms[level]
        places = tile_places((spec.width, spec.height), (form.width, form.height), (x, y, width, height))
        numbers = [place.tile for place in places]
        if spec.counts[numbers].all():
            return places, []
        stored = np.any(spec.counts.reshape(_planes(form), -1), axis=0).tolist()
        left_out = [place for place in places if not stored[place.tile]]
        return [place for place in places if stored[place.tile]], left_out

    def read(self, level: int, places: Sequence[TilePlace]) -> list[Parts]:
        """See `TileTable.read`: in file order, with as few requests as possible."""
        spec, form = self._levels[level], self._forms[level]
        planes = _planes(form)
        per_plane = len(spec.counts) // planes
        numbers = np.array(
            [[place.tile + n * per_plane for n in range(planes)] for place in places], np.int64
        )
        if self._file is None:
            raise SlideReadError(f"slide {self._name} was closed")
        pieces = read_pieces(self._file, spec.offsets[numbers.ravel()], spec.counts[numbers.ravel()])
        if form.compression in codecs.JPEG:
            pieces = [spliced(spec, piece, self._markers[level]) for piece in pieces]
        tiles = [pieces[start : start + planes] for start in range(0, len(pieces), planes)]
        return list(tiles)

    def file_order(self, level: int, numbers: NDArray[np.int64]) -> NDArray[np.intp]:
        """Which of these tiles come first in the file, without those that it leaves out."""
        spec = self._levels[level]
        order = np.argsort(spec.offsets[numbers], kind="stable")
        return order[spec.counts[numbers[order]] > 0]

    def read_jpegs(self, level: int, numbers: NDArray[np.int64]) -> list[bytes]:
        """JPEG tiles in their order, which is the file's, decodable by themselves and looked at for damage
        (see `KnownHeaders`): the fast way for decoders that take many at once.

        Raises:
            SlideReadError: one of them is damaged, or the slide was closed.
        """
        spec, headers = self._levels[level], self._headers
        assert headers is not None
        if self._file is None:
            raise SlideReadError(f"slide {self._name} was closed")
        tables = self._markers[level] + (spec.jpeg_tables or b"")[2:-2]
        jpegs = _read_spliced(self._file, spec.offsets[numbers], spec.counts[numbers], tables)
        for index in headers.unknown(level, jpegs):
            place = self.place(level, int(numbers[index]))
            try:
                headers.check(level, jpegs[index], (place.height, place.width))
            except codecs.TileError as error:
                raise self.damaged(level, place, error) from error
        return jpegs

    def place(self, level: int, number: int) -> TilePlace:
        """Where a tile lies, as seen from itself."""
        spec, form = self._levels[level], self._forms[level]
        row, column = divmod(number, -(-spec.width // form.width))
        x, y = column * form.width, row * form.height
        size = min(form.width, spec.width - x), min(form.height, spec.height - y)
        (place,) = tile_places((spec.width, spec.height), (form.width, form.height), (x, y, *size))
        return place


def _head(file: int, level: TiffLevel) -> bytes:
    """The beginning of a level's first tile, behind the tables."""
    present = np.flatnonzero(level.counts)
    if not len(present):
        return b""
    start, size = int(level.offsets[present[0]]), int(level.counts[present[0]])
    return (level.jpeg_tables or b"") + os.pread(file, min(_HEAD, size), start)


def _marker(form: TileFormat, head: bytes) -> bytes:
    """What a JPEG tile needs so that a decoder takes its colours as the TIFF gives them.

    A JFIF marker says YCbCr, and is believed even where the TIFF says RGB: some writers convert all the same.
    """
    if form.compression not in codecs.JPEG or form.samples != 3 or form.planar:
        return b""
    if form.rgb:
        return RGB_MARKER if _JFIF not in head else b""
    return _JFIF_MARKER if _ADOBE in head and _JFIF not in head else b""


def colour_conflict(probe: Probe) -> str | None:
    """Why a decoder that only sees the JPEGs could take other colours than the TIFF gives, or None."""
    if not any(level.compression in codecs.JPEG for level in probe.levels):
        return None
    file = os.open(probe.path, os.O_RDONLY)
    try:
        return next(
            (reason for level in probe.levels if (reason := _conflict(level, _head(file, level)))), None
        )
    finally:
        os.close(file)


def _conflict(level: TiffLevel, head: bytes) -> str | None:
    if level.photometric == "RGB" and _JFIF in head:
        return "its tiles are RGB and carry a JFIF marker, which says YCbCr"
    if level.photometric == "YCBCR" and _ADOBE in head and _JFIF not in head:
        transform = head[head.index(_ADOBE) + 15]
        return None if transform == 1 else "its tiles are YCbCr and carry a marker that says RGB"
    return None


def read_pieces(file: int, offsets: NDArray[np.int64], counts: NDArray[np.int64]) -> list[bytes]:
    """Pieces of an open file, read in its order with as few requests as possible."""
    order = np.argsort(offsets, kind="stable")
    found = [b""] * len(order)
    for index, piece in zip(order.tolist(), _read_spliced(file, offsets[order], counts[order]), strict=True):
        found[index] = piece
    return found


def _read_spliced(
    file: int, offsets: NDArray[np.int64], counts: NDArray[np.int64], tables: bytes = b""
) -> list[bytes]:
    """Pieces in the order of the file, with as few requests as possible; of JPEGs with tables behind their
    first marker."""
    if not len(offsets):
        return []
    ends = offsets + counts
    request = (offsets - offsets[0]) // _SPAN
    apart = (offsets[1:] - ends[:-1] > _GAP) | (request[1:] != request[:-1])
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    cuts = [*first.tolist(), len(offsets)]
    own = np.repeat(offsets[first], np.diff(cuts))
    sizes = (np.maximum.reduceat(ends, first) - offsets[first]).tolist()
    # Plain numbers, and one copy of each while what was read is in the cache: this runs for every tile.
    starts, stops = (offsets - own).tolist(), (ends - own).tolist()
    pieces: list[bytes] = []
    for low, high, base, size in zip(cuts[:-1], cuts[1:], offsets[first].tolist(), sizes, strict=True):
        spans = zip(starts[low:high], stops[low:high], strict=True)
        if tables:
            view = _memory.of(size)
            view = view[: os.preadv(file, [view], base)]
            pieces += [b"".join((view[at : at + 2], tables, view[at + 2 : end])) for at, end in spans]
        else:
            block = os.pread(file, size, base)
            pieces += [block[at:end] for at, end in spans]
    return pieces


class _Memory(threading.local):
    """Memory of each thread that reads: to touch a page for the first time is dear."""

    def __init__(self) -> None:
        self._data = memoryview(b"")

    def of(self, size: int) -> memoryview:
        """So many bytes, whatever is in them."""
        if len(self._data) < size:
            self._data = np.empty(size, np.uint8).data
        return self._data[:size]


_memory = _Memory()
