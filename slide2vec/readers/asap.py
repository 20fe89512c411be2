"""ASAP: its `multiresolutionimageinterface` module, for installations that have it."""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.readers.crash_guard import check_in_child
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader, to_level0
from slide2vec.readers.spacing import choose_spacing

__all__ = ["AsapReader", "unavailable"]

_MODULE = "multiresolutionimageinterface"
_INSTALL = (
    "it is not on PyPI; install ASAP (https://github.com/computationalpathologygroup/ASAP/releases) "
    'and put its "bin" folder on PYTHONPATH'
)


def unavailable() -> str | None:
    """Why this back end cannot be used here, None when it can."""
    return None if find_spec(_MODULE) else f"ASAP's module {_MODULE} is not installed: {_INSTALL}"


class AsapReader(PyramidReader):
    """Reads what ASAP opens, one region at a time.

    Raises:
        ExtraMissingError: ASAP is not installed.
        BackendError: ASAP does not open the file.
    """

    backend = "asap"

    def __init__(self, probe: Probe) -> None:
        if reason := unavailable():
            raise ExtraMissingError(reason)
        check_in_child(AsapReader, probe)
        try:
            self._image: Any | None = (
                import_module(_MODULE).MultiResolutionImageReader().open(str(probe.path))
            )
        except ImportError as error:
            raise ExtraMissingError(
                f"ASAP's module {_MODULE} cannot be loaded ({error}): {_INSTALL}"
            ) from error
        image = self._image
        if image is None:
            raise BackendError("ASAP cannot open it")
        if probe.levels and (probe.levels[0].planes or probe.levels[0].page):
            raise BackendError("ASAP would take its first directory for the slide")
        levels = range(image.getNumberOfLevels())
        super().__init__(probe, [tuple(image.getLevelDimensions(level)) for level in levels])
        self._native_downsamples = [float(image.getLevelDownsample(level)) for level in levels]
        self._lock = threading.Lock()
        if self.spacing_um is None:
            spacing = [float(um) for um in image.getSpacing() or ()]
            self.claims = (("mpp", spacing[0], spacing[1]),) if len(spacing) > 1 else ()
            self.spacing_um, self.spacing_source = choose_spacing(self.claims)

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample = self._native_downsamples[level]
        with self._lock:
            if self._image is None:
                raise SlideReadError(f"slide {self.name} was closed")
            try:
                patch = self._image.getUCharPatch(
                    to_level0(x, downsample), to_level0(y, downsample), width, height, level
                )
            except RuntimeError as error:
                raise self._read_error(level, x, y, error) from error
        pixels = np.asarray(patch, np.uint8).reshape(height, width, -1)
        if pixels.shape[2] not in (1, 3):
            raise self._read_error(level, x, y, f"{pixels.shape[2]} channels, 1 or 3 are read")
        return np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3)))

    def close(self) -> None:
        """Release the file. May be called twice."""
        with self._lock:
            if self._image is not None:
                self._image.close()
            self._image = None
