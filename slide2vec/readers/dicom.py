"""slide2vec's own reader of DICOM slides: each frame is decoded once, by strict decoders."""

from __future__ import annotations

from importlib.util import find_spec

from slide2vec.errors import BackendError, ExtraMissingError
from slide2vec.readers import codecs
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.dicom_tiles import DicomTiles, why_not
from slide2vec.readers.probe import Probe
from slide2vec.readers.tile_assembly import HostTileReader, TileAssembler

__all__ = ["DicomReader", "unavailable"]


def unavailable() -> str | None:
    """Why this back end cannot be used here, None when it can."""
    if find_spec("pydicom") is None:
        return "pydicom is not installed: pip install pydicom"
    return codecs.unavailable()


class DicomReader(HostTileReader):
    """Reads whole-slide images with pydicom, simplejpeg and imagecodecs.

    Raises:
        ExtraMissingError: one of these is not installed.
        BackendError: it is no DICOM file, or its frames are coded in a way that is not read.
    """

    backend = "dicom"

    def __init__(self, probe: Probe) -> None:
        if reason := unavailable():
            raise ExtraMissingError(reason)
        if probe.kind != "dicom":
            raise BackendError(f"it is no DICOM file ({probe.vendor or probe.kind})")
        levels = probe.dicom_levels
        if reason := next(filter(None, map(why_not, levels)), None):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in levels])
        self.tile_shapes = tuple(level.tile for level in levels)
        self.tiles = DicomTiles(levels, probe.name, self._read_error)
        self._boxes = TileAssembler(self.tiles, HostDecoder())
