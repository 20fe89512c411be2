"""cuCIM: the fastest reader of tiled TIFFs, for those that it reads correctly."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.installation import add_extra
from slide2vec.readers.crash_guard import check_in_child
from slide2vec.readers.probe import Probe, TiffLevel
from slide2vec.readers.pyramid import PyramidReader, to_level0
from slide2vec.readers.recheck import Recheck
from slide2vec.readers.tiff_tiles import colour_conflict

__all__ = ["CucimCudaReader", "CucimReader", "configure_cufile", "load_on", "unavailable"]

_VENDORS = ("aperio", "generic", "ome", "philips")
#: Read with the same pixels as OpenSlide's; a damaged tile raises (JPEG ones: see Recheck).
_COMPRESSIONS = ("JPEG", "DEFLATE", "ADOBE_DEFLATE", "NONE", "APERIO_JP2000_RGB")
#: Tag Predictor, and the compressions (by their TIFF numbers) beside which it was measured not to crash cuCIM
#: as it opens the file, whatever its value: none, LZW, JPEG, PackBits, Aperio's and other JPEG 2000, JPEG XL.
#: Beside Deflate, ZSTD, LZMA and WebP it does, in whichever directory, masks and labels included.
_PREDICTOR = 317
_PREDICTOR_IGNORED = {1, 5, 7, 32773, 33005, 34712, 50002}


def unavailable() -> str | None:
    """Why this back end cannot be used here, None when it can."""
    return None if find_spec("cucim") else f"cuCIM is not installed: {add_extra('cucim')} (Linux)"


class CucimReader(PyramidReader):
    """Reads tiled TIFFs through cuCIM; it is handed no file that it would crash on or misread.

    Raises:
        ExtraMissingError: cuCIM is not installed.
        BackendError: it does not read such a file (correctly).
    """

    backend = "cucim"
    _strict = True  # every JPEG tile is decoded a second time, see `Recheck`

    def __init__(self, probe: Probe) -> None:
        reason = _why_not(probe)
        if reason:
            raise BackendError(reason)
        image = _open(probe)
        resolutions = image.resolutions
        super().__init__(probe, resolutions["level_dimensions"])
        self._image: Any | None = image
        self._native_downsamples = tuple(resolutions["level_downsamples"])
        if self.level_dimensions != _expected_dimensions(probe):
            raise BackendError(
                f"cuCIM sees other levels in it {self.level_dimensions} than its tags or OpenSlide"
            )
        self._check = Recheck(probe, self._read_error, jpegs_only=True, strict=self._strict)

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        if self._image is None:
            raise SlideReadError(f"slide {self.name} was closed")
        left_out = self._check(level, x, y, width, height)
        downsample = self._native_downsamples[level]
        location = (to_level0(x, downsample), to_level0(y, downsample))
        try:
            pixels = self._read_native(location, (width, height), level)
        except RuntimeError as error:
            raise self._read_error(level, x, y, error) from error
        for where in left_out:
            pixels[where] = 255
        return pixels

    def _read_native(self, location: tuple[int, int], size: tuple[int, int], level: int) -> Any:
        return np.asarray(self._image.read_region(location, size, level))  # type: ignore[union-attr]

    def close(self) -> None:
        """Release the file. May be called twice."""
        image, self._image = self._image, None
        if image is not None:
            image.close()
            self._check.close()


def _why_not(probe: Probe) -> str | None:
    """Why cuCIM may not have the file (as measured with 26.10), None when it may."""
    if probe.kind != "tiff" or probe.vendor not in _VENDORS:
        return f"cuCIM does not read {probe.vendor or probe.kind} files"
    for directory in probe.directories:
        if _PREDICTOR in directory.tags and directory.compression not in _PREDICTOR_IGNORED:
            return (
                f"cuCIM crashes on files with a Predictor tag beside compression {directory.compression}, "
                f"as in {directory.name}"
            )
    levels = probe.levels[: probe.planning]
    return next((reason for level in levels if (reason := _why_not_level(level))), None) or colour_conflict(
        probe
    )


def _why_not_level(level: TiffLevel) -> str | None:
    if level.tile is None:
        return "cuCIM reads tiled files only and this one is stored in strips"
    if level.predictor != 1 and level.compression != "NONE":
        return f"cuCIM crashes on {level.compression} tiles with predictor {level.predictor}"
    if (level.samples, level.bits, level.planar) != (3, 8, False):
        return f"cuCIM reads interleaved 8-bit RGB, not {level.samples} channels of {level.bits} bits"
    if level.photometric != "RGB" and (level.photometric, level.compression) != ("YCBCR", "JPEG"):
        return f"cuCIM does not read {level.photometric} in {level.compression} tiles, or takes it for RGB"
    if level.compression in _COMPRESSIONS:
        return None
    if level.compression == "LZW":
        return "cuCIM returns wrong pixels without an error where an LZW tile is damaged"
    return f"cuCIM does not read {level.compression} tiles, or not with the same pixels as OpenSlide"


def _open(probe: Probe) -> Any:
    if reason := unavailable():
        raise ExtraMissingError(reason)
    check_in_child(CucimReader, probe)
    configure_cufile()
    library = import_module("cucim")
    try:
        if _opened.is_set():
            return library.CuImage(str(probe.path))
        with _opening:
            image = library.CuImage(str(probe.path))
            _opened.set()
            return image
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"cuCIM cannot open it: {error}") from error


#: cuCIM loads its plugins when it first opens a file, and crashes the process if two threads do so at
#: once (26.10: 4 of 30 processes with 8 threads; none later on).
_opening, _opened = threading.Lock(), threading.Event()


def configure_cufile() -> None:
    """Configure cuFile, which cuCIM opens when it is imported, not to run where GPUDirect Storage is missing.

    Its compatibility mode would open a CUDA context on every visible GPU, spins for ever on a
    machine without one once PyTorch has loaded its own libcufile (1.17), and leaves a cufile.log in
    the working directory. Reads are the same without it. What the user has set stays.
    """
    os.environ.setdefault("CUFILE_ENV_PATH_JSON", str(Path(__file__).with_name("cufile.json")))


def _expected_dimensions(probe: Probe) -> tuple[tuple[int, int], ...]:
    """Level sizes that cuCIM must agree with."""
    if probe.vendor != "philips":
        return tuple((level.width, level.height) for level in probe.levels[: probe.planning])
    import openslide  # Philips pads its levels to whole tiles; OpenSlide knows their true sizes

    with openslide.OpenSlide(probe.path) as handle:
        return tuple(handle.level_dimensions)


class CucimCudaReader(CucimReader):
    """Decodes JPEG tiles on the GPU; gives tensors.

    The pixels are complete when `read_region` returns. They are not always right: cuCIM does not see that the
    components of many Aperio files are RGB, and repeats chroma samples rather than interpolating them; so
    compare some tiles with another reader's. Each call makes an nvJPEG handle, a thread, and a CUDA stream
    that is never given back, and reads the file from the first to the last tile that it touches; where nvJPEG
    refuses a tile, its threads wait for one another for ever (source of 26.10; no GPU has run it yet).

    cuCIM's other plugin, by nvImageCodec (ENABLE_CUSLIDE2=1), is not used: where a tile of a batch of
    locations cannot be decoded it returns what the memory held before, and says so on stderr only; it
    interpolates chroma only if that is nvImageCodec's default; one decoder serves all threads without a lock,
    on the device that was current first; and the switch is one of the process, for reading on the CPU, too,
    where it takes labels for levels.

    Args:
        device: a torch.device, "cuda" or "cuda:0".

    Raises:
        ExtraMissingError: cuCIM is not installed.
        BackendError: it does not read such a file, or not on a GPU, or not on this one.
    """

    _strict = False  # a second decoding on the CPU would cost what the GPU saves

    def __init__(self, probe: Probe, device: Any) -> None:
        if device.index:
            raise BackendError(
                f"cuCIM's threads work on the first GPU of a process, not on {device}: "
                f"CUDA_VISIBLE_DEVICES={device.index} makes it the first"
            )
        others = {level.compression for level in probe.levels} - {"JPEG"}
        if others:
            raise BackendError(f"cuCIM decodes only JPEG on a GPU, not {', '.join(sorted(others))}")
        super().__init__(probe)
        self._torch, self._device = import_module("torch"), device

    def _read_native(self, location: tuple[int, int], size: tuple[int, int], level: int) -> Any:
        torch = self._torch
        with torch.cuda.device(self._device):
            region = self._image.read_region(location, size, level, device="cuda")  # type: ignore[union-attr]
            ours = torch.cuda.current_stream(self._device)
            # It has enqueued the copies that put tiles together on the default stream, and waits for none.
            ours.wait_stream(torch.cuda.default_stream(self._device))
            pixels = torch.as_tensor(region, device=self._device).clone()
            ours.synchronize()  # `region` frees its memory as it goes
            return pixels

    def _canvas(self, height: int, width: int) -> Any:
        return self._torch.full((height, width, 3), 255, dtype=self._torch.uint8, device=self._device)


def load_on(device: Any) -> None:
    """Import cuCIM with its CUDA context on one device, rather than on any that is visible."""
    if unavailable() is None:
        configure_cufile()
        with import_module("torch").cuda.device(device):
            import_module("cucim")
