"""Compressed tiles to RGB pixels on the CPU, by decoders that raise on any irregularity they can notice.

JPEG by simplejpeg, whose strict mode turns libjpeg's warnings into errors (imagecodecs swallows them); all
else by imagecodecs. What each of them notices of damage was measured: the table is in docs/formats.md.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.readers.tile_table import Parts, TileFormat

__all__ = [
    "TileError",
    "check_jpeg",
    "decode_tile",
    "has_transform",
    "tile_memory",
    "unavailable",
    "why_not",
]

Pixels = NDArray[np.uint8]

_INSTALL = "pip install simplejpeg imagecodecs"
JPEG = frozenset({"JPEG", "ALT_JPEG", "JPEG_LOSSY"})
#: Compressions that give the bytes of the pixels -> imagecodecs' name.
_OF_BYTES = {
    "LZW": "lzw",
    "DEFLATE": "deflate",
    "ADOBE_DEFLATE": "deflate",
    "PACKBITS": "packbits",
    "LZMA": "lzma",
    "ZSTD": "zstd",
    "ZSTD_DEPRECATED": "zstd",
}
#: Compressions that give an image -> imagecodecs' name.
_OF_IMAGES = {
    "JPEG2000": "jpeg2k",
    "JPEG_2000_LOSSY": "jpeg2k",
    "APERIO_JP2000_RGB": "jpeg2k",
    "APERIO_JP2000_YCBC": "jpeg2k",
    "WEBP": "webp",
    "WEBP_DEPRECATED": "webp",
    "JPEGXL": "jpegxl",
    "JPEGXL_DNG": "jpegxl",
    "PNG": "png",
    "LERC": "lerc",
    "JPEGXR": "jpegxr",
    "JPEGLS": "jpegls",
}
#: Begins a JPEG 2000 codestream, ends it, and precedes its coding style (T.800, table A.2).
_SOC, _EOC, _COD = b"\xff\x4f\xff\x51", b"\xff\xd9", b"\xff\x52"
#: A codestream may be padded to a whole word.
_PADDING = 4
#: Bytes behind a multiple of 64 at which pixels begin, see `tile_memory`.
_OFF = 8
_COLOURS = {"RGB": 3, "YCBCR": 3, "MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1}


class TileError(ValueError):
    """A compressed tile that cannot be decoded; says why."""


def unavailable() -> str | None:
    """Why tiles cannot be decoded here, None when they can."""
    missing = [name for name in ("simplejpeg", "imagecodecs") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: {_INSTALL}" if missing else None


def why_not(tiles: TileFormat) -> str | None:
    """Why tiles of a format cannot be decoded, None when they can."""
    name = tiles.compression
    if name == "OJPEG":
        return "it is stored in old-style JPEG (compression 6)"
    if name not in JPEG and name != "NONE":
        codec = _OF_BYTES.get(name) or _OF_IMAGES.get(name)
        if codec is None or not getattr(import_module("imagecodecs"), codec.upper()).available:
            return f"it is stored in {name} tiles, for which imagecodecs has no decoder here"
    colours = _COLOURS.get(tiles.photometric)
    if colours is None:
        return f"its colours are {tiles.photometric}"
    if not colours <= tiles.samples <= colours + (tiles.alpha is not None or name not in JPEG):
        return f"it has {tiles.samples} channels of {tiles.photometric}"
    if name in JPEG and not tiles.planar and tiles.samples not in (1, 3):
        return f"it has JPEG tiles of {tiles.samples} channels"
    if tiles.predictor != 1 and (tiles.predictor != 2 or name not in {*_OF_BYTES, "NONE"}):
        return f"it has {name} tiles with predictor {tiles.predictor}"
    if tiles.photometric == "PALETTE" and tiles.colormap is None:
        return "it has a palette without colours"
    if tiles.is_subsampled and name not in JPEG and name not in _OF_IMAGES:
        return f"it has {name} tiles whose colours have fewer pixels than their brightness"
    return None


def tile_memory(height: int, width: int, channels: int = 3) -> Pixels:
    """Memory for the pixels of a tile, contiguous and not aligned: (height, width, channels) uint8.

    Rows that begin at a multiple of 32 bytes libjpeg-turbo writes past the CPU's cache (vmovntdq in
    jdcolext-avx2.asm), so that whoever reads them next waits for the main memory: to decode and average a
    tile of 256 px took 238 us instead of 199 us.
    """
    size = height * width * channels
    memory = np.empty(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + _OFF
    return memory[start : start + size].reshape(height, width, channels)


def decode_tile(parts: Parts, tiles: TileFormat, shown: tuple[int, int], buffer: Pixels | None) -> Pixels:
    """RGB pixels of a tile.

    Args:
        parts: what is stored of it; a JPEG has its tables.
        shown: (height, width) of what the level holds of it: at its edges some writers store no more.
        buffer: contiguous memory of a whole RGB tile, which the pixels may be written to.

    Returns:
        (h, w, 3) uint8, of at least `shown` px and at most a whole tile.

    Raises:
        TileError: it cannot be decoded.
    """
    try:
        if tiles.compression in JPEG and tiles.samples == 3 and not tiles.planar:
            return _checked(_jpeg(parts[0], "RGB", tiles, buffer), tiles, shown)
        planes = [_samples(part, tiles, shown) for part in parts]
        samples = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        return _as_rgb(samples, tiles, _gives_rgb(parts[0], tiles))
    except TileError:
        raise
    except (ValueError, RuntimeError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise TileError(f"damaged {tiles.compression} tile ({str(error).strip()})") from error


def check_jpeg(data: bytes, tiles: TileFormat, shown: tuple[int, int]) -> tuple[int, int]:
    """Look at a JPEG tile before a decoder gets it that notices less.

    Only its brightness is decoded, reduced to an eighth a side: that finds what decoding all of it would (of
    3,000 damaged tiles none was judged differently), in half the time.

    Returns:
        Its (height, width).

    Raises:
        TileError: `decode_tile` would not decode it.
    """
    jpeg = _simplejpeg()
    try:
        height, width = jpeg.decode_jpeg_header(data, strict=True)[:2]
        _check_size(height, width, tiles, shown)
        colours = "CMYK" if tiles.samples == 4 and not tiles.planar else "GRAY"
        jpeg.decode_jpeg(data, colours, min_height=1, min_width=1, strict=True)
    except TileError:
        raise
    except ValueError as error:
        raise TileError(f"damaged {tiles.compression} tile ({str(error).strip()})") from error
    return height, width


def _jpeg(data: bytes, colours: str, tiles: TileFormat, buffer: Pixels | None) -> Pixels:
    """The buffer bounds what a damaged header can ask for."""
    if buffer is None:
        buffer = tile_memory(tiles.height, tiles.width, len(colours) if colours == "RGB" else 1)
    pixels: Pixels = _simplejpeg().decode_jpeg(data, colours, buffer=buffer, strict=True)
    return pixels


def _samples(data: bytes, tiles: TileFormat, shown: tuple[int, int]) -> Pixels:
    """(h, w, channels) as stored."""
    if tiles.reversed_bits and tiles.compression not in JPEG:
        data = _imagecodecs().bitorder_decode(data)
    channels = 1 if tiles.planar else tiles.samples
    if tiles.compression in JPEG:
        return _checked(_gray_jpeg(data, tiles), tiles, shown)
    if tiles.compression in _OF_IMAGES:
        return _image(data, tiles, channels, shown)
    pixels = _of_bytes(data, tiles, channels, shown)
    if tiles.predictor == 2:
        pixels = _imagecodecs().delta_decode(pixels, axis=-2)
    return pixels


def _gray_jpeg(data: bytes, tiles: TileFormat) -> Pixels:
    colours = _simplejpeg().decode_jpeg_header(data, strict=True)[2]
    if colours != "Gray":
        raise TileError(f"damaged JPEG tile ({colours} instead of grey)")
    return _jpeg(data, "GRAY", tiles, None)


def _of_bytes(data: bytes, tiles: TileFormat, channels: int, shown: tuple[int, int]) -> Pixels:
    """Decoded into a byte more than the tile has: damage often shows as a wrong length only."""
    row = tiles.width * channels
    whole = tiles.height * row
    heights = {tiles.height, shown[0]} if tiles.is_strip else {tiles.height}
    if tiles.compression == "NONE":
        found = max((high for high in heights if high * row <= len(data)), default=0)
        plain: Any = memoryview(data)[: found * row]
    else:
        codec = _OF_BYTES[tiles.compression]
        plain = getattr(_imagecodecs(), f"{codec}_decode")(data, out=whole + (codec != "deflate"))
        found, rest = divmod(len(plain), row)
        found = -1 if rest else found
    if found not in heights or not found:
        size = len(data) if tiles.compression == "NONE" else len(plain)
        raise TileError(f"damaged {tiles.compression} tile ({size} bytes of pixels instead of {whole})")
    return np.frombuffer(plain, np.uint8).reshape(found, tiles.width, channels)


def _image(data: bytes, tiles: TileFormat, channels: int, shown: tuple[int, int]) -> Pixels:
    """Decoded into an array of the size that is expected, which bounds what a damaged header can ask for."""
    codec = _OF_IMAGES[tiles.compression]
    # CharLS, for one, may count to 2^31 before it finds that its data were cut (imagecodecs 2026.3)
    has_end = codec == "jpegls" or (codec == "jpeg2k" and data[:4] == _SOC)
    if has_end and _EOC not in data[-2 - _PADDING :]:
        raise TileError(f"damaged {tiles.compression} tile (it does not end as such data do)")
    more: dict[str, Any] = {"hasalpha": True} if codec == "webp" and channels == 4 else {}
    sizes = [(tiles.height, tiles.width), *([shown] if shown != (tiles.height, tiles.width) else [])]
    for number, (height, width) in enumerate(sizes):
        shape = (height, width, channels) if channels > 1 else (height, width)
        out = np.empty(shape, np.uint8)
        try:
            getattr(_imagecodecs(), f"{codec}_decode")(data, out=out, **more)
        except (ValueError, RuntimeError):
            if number == len(sizes) - 1:
                raise
            continue
        return out.reshape(height, width, channels)
    raise AssertionError("unreachable")


def _checked(pixels: Pixels, tiles: TileFormat, shown: tuple[int, int]) -> Pixels:
    _check_size(pixels.shape[0], pixels.shape[1], tiles, shown)
    return pixels


def _check_size(height: int, width: int, tiles: TileFormat, shown: tuple[int, int]) -> None:
    if not (shown[0] <= height <= tiles.height and shown[1] <= width <= tiles.width):
        raise TileError(
            f"damaged {tiles.compression} tile ({width}x{height} px instead of {tiles.width}x{tiles.height})"
        )


# Colours --------------------------------------------------------------------------------------


def _as_rgb(samples: Pixels, tiles: TileFormat, is_rgb: bool) -> Pixels:
    """(h, w, 3) of what is stored: grey and palettes as colours, whatever is transparent over white."""
    colours = _COLOURS[tiles.photometric]
    shown, alpha = samples[..., :colours], samples[..., colours:]
    if tiles.photometric == "MINISWHITE":
        shown = 255 - shown
    if tiles.photometric == "PALETTE":
        assert tiles.colormap is not None  # see `why_not`
        shown = tiles.colormap[shown[..., 0]]
    if tiles.photometric == "YCBCR" and not is_rgb:
        shown = _from_ycbcr(shown)
    if shown.shape[2] == 1:
        shown = np.repeat(shown, 3, axis=2)
    if tiles.alpha is not None and alpha.shape[2]:
        shown = _over_white(shown, alpha[..., :1], tiles.alpha == "premultiplied")
    return np.ascontiguousarray(shown)


def _gives_rgb(data: bytes, tiles: TileFormat) -> bool:
    """The decoder converts YCbCr by itself; JPEG 2000's where the codestream says so (T.800, table A.15)."""
    codec = _OF_IMAGES.get(tiles.compression)
    return has_transform(data) if codec == "jpeg2k" else codec not in (None, "jpegls")


def has_transform(data: bytes) -> bool:
    """Whether a JPEG 2000 codestream makes RGB of its components itself."""
    style = data.find(_COD)
    return style >= 0 and data[style + 8 : style + 9] == b"\x01"


def _from_ycbcr(samples: Pixels) -> Pixels:
    """Full range, BT.601 (TIFF 6.0, section 21: the defaults)."""
    ycrcb = np.ascontiguousarray(samples[..., [0, 2, 1]])
    rgb: Any = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB)
    return rgb  # type: ignore[no-any-return]


def _over_white(colours: Pixels, alpha: Pixels, premultiplied: bool) -> Pixels:
    opacity = alpha.astype(np.uint16)
    mixed = colours + (255 - opacity) if premultiplied else _mixed(colours, opacity)
    return np.minimum(mixed, 255).astype(np.uint8)


def _mixed(colours: Pixels, opacity: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return (colours * opacity + 255 * (255 - opacity) + np.uint16(127)) // np.uint16(255)


_simplejpeg = cache(partial(import_module, "simplejpeg"))
_imagecodecs = cache(partial(import_module, "imagecodecs"))
