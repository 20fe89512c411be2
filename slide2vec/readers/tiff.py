"""Ours: TIFFs whose compressed tiles or strips are each decoded once, by decoders that notice damage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError, ExtraMissingError
from slide2vec.readers.codecs import unavailable
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.raw import RawBoxes
from slide2vec.readers.tifftiles import TiffTiles, why_not

__all__ = ["TiffReader", "unavailable"]


class TiffReader(PyramidReader):
    """Reads plain TIFFs, Aperio's and OME's with simplejpeg and imagecodecs.

    Raises:
        ExtraMissingError: one of these is not installed.
        BackendError: they do not decode such a file.
    """

    backend = "tiff"

    def __init__(self, probe: Probe) -> None:
        if reason := unavailable():
            raise ExtraMissingError(reason)
        if reason := why_not(probe):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in probe.levels])
        self._boxes = RawBoxes(TiffTiles(probe, self._read_error), HostDecoder())

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self._boxes.read(level, x, y, width, height)
        return pixels

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._boxes.close()
