"""slide2vec's own reader of TIFFs: each compressed tile or strip is decoded once, by strict decoders."""

from __future__ import annotations

from slide2vec.errors import BackendError, ExtraMissingError
from slide2vec.readers.codecs import unavailable
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.probe import Probe
from slide2vec.readers.tiff_tiles import TiffTiles, why_not
from slide2vec.readers.tile_assembly import HostTileReader, TileAssembler

__all__ = ["TiffReader", "unavailable"]


class TiffReader(HostTileReader):
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
        self.tiles = TiffTiles(probe, self._read_error)
        self._boxes = TileAssembler(self.tiles, HostDecoder())
