"""The frames of a DICOM slide as compressed tiles: how they are coded, their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from slide2vec.errors import SlideReadError
from slide2vec.readers import codecs
from slide2vec.readers.dicom_frames import unwrapped
from slide2vec.readers.dicom_head import uid_name
from slide2vec.readers.dicom_levels import DicomLevel
from slide2vec.readers.tiff_tiles import RGB_MARKER, read_pieces
from slide2vec.readers.tile_table import Fail, Parts, TileFormat, TilePlace, TileTable, tile_places

__all__ = ["DicomTiles", "why_not"]

#: Transfer syntax -> compression, as `TileFormat` names it.
_COMPRESSIONS = {
    "1.2.840.10008.1.2": "NONE",  # implicit VR
    "1.2.840.10008.1.2.1": "NONE",  # explicit VR
    "1.2.840.10008.1.2.5": "PACKBITS",  # RLE: channel by channel
    "1.2.840.10008.1.2.4.50": "JPEG",  # baseline
    "1.2.840.10008.1.2.4.51": "JPEG",  # extended
    "1.2.840.10008.1.2.4.57": "JPEG",  # lossless, any predictor
    "1.2.840.10008.1.2.4.70": "JPEG",  # lossless, the first
    "1.2.840.10008.1.2.4.80": "JPEGLS",  # lossless
    "1.2.840.10008.1.2.4.81": "JPEGLS",  # near-lossless
    "1.2.840.10008.1.2.4.90": "JPEG2000",  # lossless
    "1.2.840.10008.1.2.4.91": "JPEG2000",  # any
    "1.2.840.10008.1.2.4.201": "JPEG2000",  # of high throughput: lossless
    "1.2.840.10008.1.2.4.202": "JPEG2000",  # lossless, in the order of resolutions
    "1.2.840.10008.1.2.4.203": "JPEG2000",  # any
    "1.2.840.10008.1.2.4.110": "JPEGXL",  # lossless
    "1.2.840.10008.1.2.4.111": "JPEGXL",  # of JPEGs
    "1.2.840.10008.1.2.4.112": "JPEGXL",  # any
}
#: Compression -> photometric interpretations that may go with it (PS3.5, 8.2). What is transformed inside a
#: codestream is RGB once it is decoded.
_COLOURS = {
    "NONE": {"RGB", "YBR_FULL", "MONOCHROME2"},
    "PACKBITS": {"RGB", "YBR_FULL", "MONOCHROME2"},
    "JPEG": {"RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2"},
    "JPEGLS": {"RGB", "YBR_FULL", "MONOCHROME2"},
    "JPEG2000": {"RGB", "YBR_FULL", "YBR_ICT", "YBR_RCT", "MONOCHROME2"},
    "JPEGXL": {"RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2"},
}
#: Of JPEG 2000: its multiple component transform makes RGB of it.
_TRANSFORMED = ("YBR_ICT", "YBR_RCT")
_RLE_HEAD = 64


def why_not(level: DicomLevel) -> str | None:
    """Why the frames of a level cannot be decoded, None when they can."""
    compression = _COMPRESSIONS.get(level.syntax)
    if compression is None:
        return (
            f"frames in {uid_name(level.syntax)} (transfer syntax {level.syntax}) are not read; convert them "
            "to JPEG, JPEG-LS, JPEG 2000 or uncompressed ones"
        )
    if level.photometric not in _COLOURS[compression]:
        return f"colours {level.photometric} are not read of {uid_name(level.syntax)} frames"
    return codecs.why_not(_form(level))


def _form(level: DicomLevel) -> TileFormat:
    compression, grey = _COMPRESSIONS[level.syntax], level.samples == 1
    planar = not grey and (compression == "PACKBITS" or (compression == "NONE" and level.planar))
    return TileFormat(
        width=level.tile[0],
        height=level.tile[1],
        compression=compression,
        photometric="MINISBLACK" if grey else "RGB" if level.photometric == "RGB" else "YCBCR",
        samples=level.samples,
        planar=planar,
        rgb=level.photometric == "RGB",
    )


class DicomTiles(TileTable):
    """The frames of a DICOM slide. See `TileTable`.

    What a JPEG frame's own markers say of its colours (JFIF, Adobe) goes before what DICOM says: who writes
    frames knows better than who wraps them.
    """

    def __init__(self, levels: Sequence[DicomLevel], name: str, fail: Fail) -> None:
        super().__init__(name, [_form(level) for level in levels], fail)
        self._levels = levels
        self._files: dict[tuple[int, int], int] | None = {}
        for number, level in enumerate(levels):
            for index, path in enumerate(level.files):
                self._files[number, index] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Release the files. May be called twice."""
        files, self._files = self._files, None
        for file in (files or {}).values():
            os.close(file)

    def tiles_in(self, level: int, x: int, y: int, width: int, height: int) -> list[TilePlace]:
        """See `TileTable.tiles_in`."""
        spec = self._levels[level]
        places = tile_places((spec.width, spec.height), spec.tile, (x, y, width, height))
        return [place for place in places if spec.counts[place.tile]]

    def read(self, level: int, places: Sequence[TilePlace]) -> list[Parts]:
        """See `TileTable.read`: in file order, with as few requests as possible."""
        if self._files is None:
            raise SlideReadError(f"slide {self._name} was closed")
        spec = self._levels[level]
        numbers = np.array([place.tile for place in places], np.int64)
        found = [b""] * len(places)
        for index in np.unique(spec.file[numbers]).tolist():
            (here,) = np.nonzero(spec.file[numbers] == index)
            stored = numbers[here]
            data = read_pieces(self._files[level, index], spec.offsets[stored], spec.counts[stored])
            for place, frame in zip(here.tolist(), data, strict=True):
                found[place] = frame
        return [self._parts(level, place, frame) for place, frame in zip(places, found, strict=True)]

    def _parts(self, level: int, place: TilePlace, data: bytes) -> Parts:
        spec, form = self._levels[level], self._forms[level]
        if form.compression == "NONE":
            return _channels(data) if form.planar else [data]
        try:
            frame = unwrapped(data)
            if form.compression == "PACKBITS":
                return _segments(frame, form.samples)
            if spec.photometric in _TRANSFORMED and not codecs.has_transform(frame):
                raise ValueError(f"DICOM says {spec.photometric}, and it has no such transform")
        except ValueError as error:
            raise self.damaged(level, place, f"damaged frame ({error})") from error
        if form.compression == "JPEG" and form.rgb:
            # libjpeg believes a JFIF marker, or a later one of Adobe, more: only what is not said is added
            return [frame[:2] + RGB_MARKER + frame[2:]]
        return [frame]


def _channels(data: bytes) -> Parts:
    third = len(data) // 3
    return [data[:third], data[third : 2 * third], data[2 * third :]]


def _segments(frame: bytes, channels: int) -> Parts:
    """The channels of an RLE frame (PS3.5, G.5).

    Raises:
        ValueError: its header has others.
    """
    head = np.frombuffer(frame[:_RLE_HEAD].ljust(_RLE_HEAD, b"\0"), "<u4").astype(np.int64)
    starts = head[1 : 1 + channels]
    if (
        head[0] != channels
        or starts[0] != _RLE_HEAD
        or (np.diff(starts) <= 0).any()
        or starts[-1] >= len(frame)
    ):
        raise ValueError(f"its header has other than {channels} RLE segments")
    ends = [*starts[1:].tolist(), len(frame)]
    return [frame[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]
