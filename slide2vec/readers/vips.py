"""libvips: reads TIFF files of many compressions that cuCIM does not (WebP, LZW, with predictors, strips)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.installation import add_extra
from slide2vec.readers.crash_guard import check_in_child
from slide2vec.readers.probe import Probe, TiffLevel
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.recheck import check_of
from slide2vec.readers.tiff_tiles import colour_conflict

__all__ = ["VipsReader", "unavailable"]

_VENDORS = ("aperio", "generic", "ome")
#: Of these it gave the pixels that were written, tiled and in strips (8.18.7 as pyvips-binary brings it).
_COMPRESSIONS = ("NONE", "JPEG", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "WEBP")


def _install() -> str:
    return f"{add_extra('vips')} (and libvips, or pip install pyvips-binary)"


def unavailable() -> str | None:
    """Why this back end cannot be used here, None when it can (as far as one can tell without loading it)."""
    return None if find_spec("pyvips") else f"pyvips is not installed: {_install()}"


class VipsReader(PyramidReader):
    """Reads TIFF files through libvips' own loader; other formats are OpenSlide's, which libvips would call.

    Only with fail_on="warning" is a tile that cannot be decoded an error; with "error" it is black.

    Raises:
        ExtraMissingError: pyvips or libvips is not installed.
        BackendError: libvips does not read such a file.
    """

    backend = "vips"

    def __init__(self, probe: Probe) -> None:
        reason = _why_not(probe)
        if reason:
            raise BackendError(reason)
        vips = _library()
        check_in_child(VipsReader, probe)
        levels = probe.levels[: probe.planning]
        super().__init__(probe, [(level.width, level.height) for level in levels])
        self._error: type[Exception] = vips.Error
        try:
            self._images: list[Any] = [
                _as_srgb(vips.Image.tiffload(str(probe.path), page=level.page, fail_on="warning"))
                for level in levels
            ]
        except vips.Error as error:
            raise BackendError(f"libvips cannot open it: {error}") from error
        self._try_decoders(probe)
        self._check = check_of(probe, self._read_error)

    def _try_decoders(self, probe: Probe) -> None:
        """Decode a pixel per level: libvips opens files in compressions that it was built without."""
        for image, level in zip(self._images, probe.levels, strict=False):
            try:
                if level.compression != "JPEG":
                    image.crop(0, 0, 1, 1).write_to_memory()
            except self._error as error:
                raise BackendError(f"libvips cannot decode {level.compression} tiles: {error}") from error

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        if not self._images:
            raise SlideReadError(f"slide {self.name} was closed")
        if self._check is not None:
            self._check(level, x, y, width, height)
        try:
            pixels = self._images[level].crop(x, y, width, height).write_to_memory()
        except self._error as error:
            raise self._read_error(level, x, y, error) from error
        # a bytearray, because an array over bytes would be read-only
        return np.frombuffer(bytearray(pixels), np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._images = []
        if self._check is not None:
            self._check.close()


def _why_not(probe: Probe) -> str | None:
    if probe.kind != "tiff" or probe.vendor not in _VENDORS:
        return f"vips is used for plain TIFF files, not for {probe.vendor or probe.kind} ones"
    if probe.levels[0].planes:
        return "its red, green and blue are three directories, of which libvips would take one"
    if any((level.counts == 0).any() for level in probe.levels):
        return "some tiles are left out of the file, which libvips takes for an error"
    reason = next((reason for level in probe.levels if (reason := _why_not_level(level))), None)
    return reason or colour_conflict(probe)


def _why_not_level(level: TiffLevel) -> str | None:
    if level.bits != 8:
        return f"it has {level.bits} bits per channel and only 8 are read"
    if level.compression not in _COMPRESSIONS:
        return f"libvips was not measured to read {level.compression}; it reads {', '.join(_COMPRESSIONS)}"
    if level.photometric in ("SEPARATED", "CIELAB"):
        return f"libvips gives other colours for {level.photometric} pixels"
    if level.photometric == "YCBCR" and level.compression != "JPEG":
        return f"libvips takes YCbCr in {level.compression} tiles for RGB"
    return None


def _library() -> Any:
    if reason := unavailable():
        raise ExtraMissingError(reason)
    try:
        vips = import_module("pyvips")
    except OSError as error:  # the package is there, the shared library is not
        raise ExtraMissingError(f"pyvips finds no libvips ({error}): {_install()}") from error
    vips.cache_set_max(0)  # it knows files by their names, and gives the old pixels of one that was replaced
    return vips


def _as_srgb(image: Any) -> Any:
    """Three 8-bit bands, whatever is transparent over white."""
    image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=255)
    return image.cast("uchar")
