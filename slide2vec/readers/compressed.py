"""A slide's JPEG tiles as they are stored, for decoders that take many of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from slide2vec.errors import BackendError, SlideReadError
from slide2vec.readers import codecs
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.dicom_tiles import DicomTiles
from slide2vec.readers.dicom_tiles import why_not as why_no_frames
from slide2vec.readers.probe import Probe
from slide2vec.readers.tiff_tiles import TiffTiles, colour_conflict, why_no_jpeg
from slide2vec.readers.tile_assembly import HostTileReader, TileAssembler
from slide2vec.readers.tile_table import TilePlace, TileTable

__all__ = ["CompressedJpegs"]


class CompressedJpegs(HostTileReader):
    """The JPEG tiles of a TIFF, or the JPEG frames of a DICOM slide. Regions that it reads itself are decoded
    strictly, on the CPU.

    Attributes:
        tiles: where they lie, and how they are coded.

    Raises:
        BackendError: the file has no JPEG tiles of three channels, or their colours are not clear from them
            alone.
    """

    backend = "jpegs"

    def __init__(self, probe: Probe) -> None:
        is_dicom = probe.kind == "dicom"
        reason = _why_no_frames(probe) if is_dicom else why_no_jpeg(probe) or colour_conflict(probe)
        if reason:
            raise BackendError(reason)
        levels = probe.dicom_levels if is_dicom else probe.levels
        super().__init__(probe, [(level.width, level.height) for level in levels])
        self.tile_shapes = tuple(level.tile for level in levels)
        self.tiles: TileTable = (
            DicomTiles(probe.dicom_levels, probe.name, self._read_error)
            if is_dicom
            else TiffTiles(probe, self._read_error)
        )
        self._boxes = TileAssembler(self.tiles, HostDecoder())

    def read_jpegs(self, level: int, places: Sequence[TilePlace]) -> list[bytes]:
        """What is stored of tiles: complete JPEGs, which a strict decoder takes.

        Raises:
            SlideReadError: one of them is damaged, or cannot be read.
        """
        form = self.tiles.format(level)
        jpegs = [part for (part,) in self.tiles.read(level, places)]
        for place, jpeg in zip(places, jpegs, strict=True):
            try:
                codecs.check_jpeg(jpeg, form, (place.height, place.width))
            except codecs.TileError as error:
                raise self.tiles.damaged(level, place, error) from error
        return jpegs


def _why_no_frames(probe: Probe) -> str | None:
    if reason := next(filter(None, map(why_no_frames, probe.dicom_levels)), None):
        return reason
    opened = DicomTiles(probe.dicom_levels, probe.name, lambda *where: SlideReadError(str(where)))
    try:
        forms = [opened.format(level) for level in range(len(probe.dicom_levels))]
    finally:
        opened.close()
    bad = next((form for form in forms if form.compression != "JPEG" or form.samples != 3), None)
    return None if bad is None else f"it is stored in {bad.compression} frames of {bad.samples} channels"
