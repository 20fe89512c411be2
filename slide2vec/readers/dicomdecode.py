"""A DICOM frame's bytes to RGB, strictly: what a codec does not take as a whole is an error."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

import cv2
import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from slide2vec.readers.dicomhead import uid_name
from slide2vec.readers.dicomlevels import DicomLevel
from slide2vec.readers.jpegtiles import _RGB_MARKER

__all__ = ["decoded", "why_not_decoded"]

_Pixels: TypeAlias = NDArray[np.uint8]

#: Lossless, near-lossless.
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
#: Lossless, any; of high throughput: lossless, lossless in the order of resolutions, any.
_JPEG_2000 = (
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
)
#: Lossless, of JPEG frames, any.
_JPEG_XL = ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112")
#: Baseline, extended (of 8 bits), lossless (any predictor, the first).
_JPEG = (
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
)
_END = b"\xff\xd9"
#: Bytes of a JPEG 2000 main header in which the coding style is looked for.
_J2K_HEAD = 512


def why_not_decoded(level: DicomLevel) -> str | None:
    """Why the frames of a level cannot be decoded, None when they can."""
    if level.syntax not in _DECODERS:
        return (
            f"frames in {uid_name(level.syntax)} (transfer syntax {level.syntax}) are not read; convert them "
            "to JPEG, JPEG-LS, JPEG 2000 or uncompressed ones"
        )
    allowed = _DECODERS[level.syntax][1]
    if level.photometric not in allowed:
        return f"colours {level.photometric} do not go with its transfer syntax {level.syntax}"
    return None


def decoded(level: DicomLevel, data: bytes) -> _Pixels:
    """(height, width, 3) uint8 RGB of one frame of a level.

    What the frame's own markers say of its colours (JFIF, Adobe) goes before what DICOM says: libraries that
    write the frames know better than those that wrap them.

    Raises:
        ValueError: it is damaged, or not what the level's fields say.
        RuntimeError: a codec does not take it.
    """
    pixels = _DECODERS[level.syntax][0](level, data)
    columns, rows = level.tile
    if pixels.shape[:2] != (rows, columns) or pixels.dtype != np.uint8:
        raise ValueError(
            f"it has {pixels.shape[1]}x{pixels.shape[0]} px of {pixels.dtype}, not {columns}x{rows}"
        )
    if level.samples == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
    return pixels


def _jpeg(level: DicomLevel, data: bytes) -> _Pixels:
    if level.photometric == "RGB":
        # libjpeg believes a JFIF marker, or another of Adobe, more than this one: only what is not said is.
        data = data[:2] + _RGB_MARKER + data[2:]
    gray = level.samples == 1
    return simplejpeg.decode_jpeg(data, "GRAY" if gray else "RGB", buffer=_empty(level))  # type: ignore[no-any-return]


def _jpeg_2000(level: DicomLevel, data: bytes) -> _Pixels:
    transformed = _is_transformed(data)
    if level.photometric in ("YBR_ICT", "YBR_RCT") and not transformed:
        raise ValueError(
            f"DICOM says {level.photometric}, and the JPEG 2000 codestream has no such transform"
        )
    pixels = _empty(level)
    imagecodecs.jpeg2k_decode(data, out=pixels)
    return _rgb(level, pixels) if not transformed else pixels


def _is_transformed(data: bytes) -> bool:
    """Whether a JPEG 2000 codestream has a multiple component transform (T.800, A.6.1)."""
    at = data.find(b"\xff\x52", 0, _J2K_HEAD)
    return at >= 0 and data[at + 8 : at + 9] == b"\1"


def _jpeg_ls(level: DicomLevel, data: bytes) -> _Pixels:
    # asked first: CharLS may count to 2^31 before it finds that data are cut (imagecodecs 2026.3)
    if data.rstrip(b"\0")[-2:] != _END:
        raise ValueError("it does not end as JPEG-LS does")
    pixels = _empty(level)
    imagecodecs.jpegls_decode(data, out=pixels)
    return _rgb(level, pixels)


def _jpeg_xl(level: DicomLevel, data: bytes) -> _Pixels:
    pixels = _empty(level)
    imagecodecs.jpegxl_decode(data, numthreads=1, out=pixels)
    return pixels


def _rle(level: DicomLevel, data: bytes) -> _Pixels:
    return _native(level, bytes(imagecodecs.dicomrle_decode(data, np.uint8)), planar=True)


def _deflated(level: DicomLevel, data: bytes) -> _Pixels:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        pixels = inflate.decompress(data, level.tile[0] * level.tile[1] * level.samples + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflate.eof:
        raise ValueError("its deflated bytes end too early, or are more than a frame's")
    return _native(level, pixels)


def _native(level: DicomLevel, data: bytes, planar: bool | None = None) -> _Pixels:
    columns, rows = level.tile
    values = np.frombuffer(data, np.uint8)
    if level.photometric == "YBR_FULL_422" and len(values) == rows * columns * 2:
        pairs = values.reshape(rows, columns // 2, 4)
        colours = np.repeat(pairs[..., 2:], 2, axis=1)
        values = np.concatenate([pairs[..., :2].reshape(rows, columns, 1), colours], axis=-1).ravel()
    if len(values) != rows * columns * level.samples:
        raise ValueError(f"it has {len(values)} bytes, not {rows * columns * level.samples}")
    if level.samples > 1 and (level.planar if planar is None else planar):
        return _rgb(level, np.moveaxis(values.reshape(level.samples, rows, columns), 0, -1))
    return _rgb(level, values.reshape(rows, columns, level.samples))


def _empty(level: DicomLevel) -> _Pixels:
    """What a codec decodes into: it allocates nothing for what a damaged header claims."""
    columns, rows = level.tile
    return np.empty((rows, columns, 3) if level.samples == 3 else (rows, columns), np.uint8)


def _rgb(level: DicomLevel, pixels: _Pixels) -> _Pixels:
    if level.photometric in ("RGB", "MONOCHROME2"):
        return pixels
    # OpenCV's order is Y, Cr, Cb; in full range, as PS3.3, C.7.6.3.1.2 has it
    return cv2.cvtColor(np.ascontiguousarray(pixels[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)  # type: ignore[return-value]


_PLAIN = ("RGB", "YBR_FULL", "MONOCHROME2")
_JPEG_COLOURS = (*_PLAIN, "YBR_FULL_422")
#: Transfer syntax -> (what decodes its frames, the photometric interpretations it may have).
_DECODERS: Mapping[str, tuple[Callable[[DicomLevel, bytes], _Pixels], tuple[str, ...]]] = {
    "1.2.840.10008.1.2": (_native, _JPEG_COLOURS),
    "1.2.840.10008.1.2.1": (_native, _JPEG_COLOURS),
    "1.2.840.10008.1.2.8.1": (_deflated, _PLAIN),
    "1.2.840.10008.1.2.5": (_rle, _PLAIN),
    **dict.fromkeys(_JPEG, (_jpeg, _JPEG_COLOURS)),
    **dict.fromkeys(_JPEG_LS, (_jpeg_ls, _PLAIN)),
    **dict.fromkeys(_JPEG_2000, (_jpeg_2000, (*_PLAIN, "YBR_ICT", "YBR_RCT"))),
    **dict.fromkeys(_JPEG_XL, (_jpeg_xl, _JPEG_COLOURS)),
}
