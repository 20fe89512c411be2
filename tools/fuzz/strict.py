"""Whether a compressed tile is damaged, as the strictest decoder that is at hand sees it.

None of it is the readers' code, and where there is another implementation, it is not their library:
libjpeg's warnings as OpenCV prints them, zlib's and PNG's checksums by the standard library, LZW and
PackBits in Python. For the rest it is imagecodecs, with the length of what comes out.
"""

from __future__ import annotations

import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import imagecodecs
import numpy as np
from PIL import Image

__all__ = ["CODECS", "DICOM_CODECS", "fault"]


def fault(codec: str, data: bytes, size: tuple[int, int, int], tables: bytes = b"") -> str | None:
    """What is wrong with a compressed tile, None where nothing tells.

    Args:
        size: (height, width, samples) that it should have, 8 bits each.
        tables: JPEG tables that it shares.
    """
    try:
        return _CHECKS[codec](data, size, tables)
    except Exception as error:  # decoders raise what they like; any of it tells
        return f"{type(error).__name__}: {error}"[:200]


def _jpeg(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    whole = tables[:-2] + data[2:] if tables else data
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            pixels = cv2.imdecode(
                np.frombuffer(whole, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
            )
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        told = said.read().decode(errors="replace").strip()
    if told or pixels is None:
        return told or "no JPEG"
    return _of_size(pixels, size)


def _of_size(pixels: Any, size: tuple[int, int, int]) -> str | None:
    shape = np.shape(pixels)
    wanted = size if len(shape) == 3 else size[:2]
    return None if shape == wanted else f"it has {shape}, not {wanted}"


def _of_length(data: bytes | bytearray, size: tuple[int, int, int]) -> str | None:
    wanted = size[0] * size[1] * size[2]
    return None if len(data) == wanted else f"{len(data)} bytes come out, not {wanted}"


def _deflate(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    decoder = zlib.decompressobj()
    out = decoder.decompress(data)
    return "it ends early" if not decoder.eof else _of_length(out, size)


def _raw(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    wanted = size[0] * size[1] * size[2]
    return None if len(data) >= wanted else f"{len(data)} bytes, not {wanted}"


def _lzw(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    """TIFF 6.0, section 13: 256 clears, 257 ends; codes grow one early."""
    wanted = size[0] * size[1] * size[2]
    known: list[int] = []  # lengths of what the codes from 258 on stand for
    bits, held, width, at, length, previous = 0, 0, 9, 0, 0, 0
    while True:
        while held < width:
            if at == len(data):
                return None if length == wanted else f"it ends early, after {length} of {wanted} bytes"
            bits, held, at = (bits << 8 | data[at]) & 0xFFFFFFFF, held + 8, at + 1
        code, held = bits >> (held - width) & ((1 << width) - 1), held - width
        if code == 257:
            return None if length == wanted else f"{length} bytes come out, not {wanted}"
        if code == 256:
            known, width, previous = [], 9, 0
            continue
        if code > 257 + len(known) + bool(previous):
            return f"code {code} is not known yet"
        if previous:
            known.append(previous + 1)
        previous = 1 if code < 256 else known[code - 258]
        length += previous
        if length > wanted:
            return f"more than {wanted} bytes come out"
        width = 9 + sum(len(known) + 258 + 1 > limit for limit in (511, 1023, 2047))


def _packbits(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    wanted, at, length = size[0] * size[1] * size[2], 0, 0
    while at < len(data) and length < wanted:
        head = data[at]
        if head < 128:
            length, at = length + head + 1, at + head + 2
        else:
            length, at = length + (257 - head if head > 128 else 0), at + (2 if head > 128 else 1)
    if at > len(data):
        return "it ends early"
    return None if length == wanted else f"{length} bytes come out, not {wanted}"


def _png(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return "the checksum of a chunk differs"
        if data[at + 4 : at + 8] == b"IEND":
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                return _of_size(np.asarray(image), size)
        at = end
    return "it ends early"


def _webp(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        return _of_size(np.asarray(image.convert("RGB")), size)


def _jpeg2000(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    with Image.open(io.BytesIO(data), formats=["JPEG2000"]) as image:
        wrong = _of_size(np.asarray(image), size)
    # Opened strictly, OpenJPEG refuses code-streams whose packets do not add up.
    return wrong or _of_size(imagecodecs.jpeg2k_decode(data), size)


def _rle(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
    count, *starts = np.frombuffer(data[:64], "<u4").tolist()
    if count != size[2]:
        return f"{count} segments, not {size[2]}"
    ends = [*starts[1:count], len(data)]
    plane = (size[0], size[1], 1)
    return next(
        (
            wrong
            for start, end in zip(starts, ends, strict=False)
            if (wrong := _packbits(data[start:end], plane, b""))
        ),
        None,
    )


def _by_imagecodecs(name: str) -> Callable[[bytes, tuple[int, int, int], bytes], str | None]:
    def check(data: bytes, size: tuple[int, int, int], tables: bytes) -> str | None:
        decoded = getattr(imagecodecs, f"{name}_decode")(data)
        return (
            _of_length(decoded, size) if isinstance(decoded, bytes | bytearray) else _of_size(decoded, size)
        )

    return check


_CHECKS: Mapping[str, Callable[[bytes, tuple[int, int, int], bytes], str | None]] = {
    "none": _raw,
    "native": _raw,
    "JPEG": _jpeg,
    "Deflate": _deflate,
    "LZW": _lzw,
    "LZMA": lambda data, size, tables: _of_length(lzma.decompress(data), size),
    "PackBits": _packbits,
    "PNG": _png,
    "WebP": _webp,
    "JPEG 2000": _jpeg2000,
    "RLE": _rle,
    "ZSTD": _by_imagecodecs("zstd"),
    "JPEG XL": _by_imagecodecs("jpegxl"),
    "JPEG-LS": _by_imagecodecs("jpegls"),
    "LERC": _by_imagecodecs("lerc"),
}

#: TIFF compression -> codec.
CODECS: Mapping[int, str] = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "Deflate",
    32773: "PackBits",
    32946: "Deflate",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    34933: "PNG",
    50000: "ZSTD",
    34926: "ZSTD",
    50001: "WebP",
    34927: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}

#: Ends of DICOM transfer syntaxes after 1.2.840.10008.1.2 -> codec.
DICOM_CODECS: Mapping[str, str] = {
    "": "native",
    ".1": "native",
    ".4.50": "JPEG",
    ".4.51": "JPEG",
    ".4.80": "JPEG-LS",
    ".4.81": "JPEG-LS",
    ".4.90": "JPEG 2000",
    ".4.91": "JPEG 2000",
    ".5": "RLE",
}
