"""Tiles of a slide on a device, out of its compressed JPEG tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slide2vec.errors import BackendError
from slide2vec.geometry import floor_to_level
from slide2vec.prepare.dali_tiles import RATIOS, DaliTiles, Geometry
from slide2vec.prepare.device_cut import cut_tiles_on_device
from slide2vec.prepare.gather_tiles import Gather
from slide2vec.prepare.tile_parts import parts_of_boxes
from slide2vec.readers import codecs
from slide2vec.readers.dicom import DicomReader
from slide2vec.readers.jpeg_tiles import DecodedTiles, JpegTileReader
from slide2vec.readers.probe import Probe
from slide2vec.readers.tiff import TiffReader
from slide2vec.readers.tiff_tiles import colour_conflict, why_no_jpeg
from slide2vec.readers.tile_table import TilePlace
from slide2vec.stream.device_sources import neighbours
from slide2vec.stream.tile_sources import SlideSource

__all__ = ["DaliSource", "GatheredTiles", "open_jpegs"]

IntArray = NDArray[np.int64]


class _JpegSource:
    """Tiles of a slide by another reader. See `TileSource`.

    Args:
        source: the slide's tiles by the host's reader, whose blocks it takes.
        reader: of the same slide. It is not closed.
    """

    def __init__(self, source: SlideSource, reader: TiffReader | DicomReader | JpegTileReader) -> None:
        tiling, geometry = source.tiling, source.tiling.geometry
        self.backend, self.blocks = source.backend, source.blocks
        self._level, self._side = geometry.read_level, geometry.read_tile_size_px
        corners = np.stack([tiling.x, tiling.y], axis=1)
        self._corners: IntArray = floor_to_level(corners, reader.downsamples[self._level])

    def close(self) -> None:
        """Nothing: the reader is another's."""


class GatheredTiles(_JpegSource):
    """Tiles that are cut straight out of decoded JPEG tiles.

    Args:
        gather: cuts them out of what the reader decodes.
    """

    def __init__(self, source: SlideSource, reader: JpegTileReader, gather: Gather) -> None:
        super().__init__(source, reader)
        self._reader, self._gather = reader, gather

    def fetch(self, number: int) -> tuple[IntArray, DecodedTiles]:
        """The decoded tiles of a block, and where its tiles begin."""
        return self._fetch(self.blocks[number])

    def _fetch(self, tiles: IntArray) -> tuple[IntArray, DecodedTiles]:
        corners = self._corners[tiles]
        return corners, self._reader.decode(self._level, corners, (self._side, self._side))

    def place(self, number: int, data: tuple[IntArray, DecodedTiles], targets: Sequence[Any]) -> None:
        """Cut the tiles of a block out of what was decoded."""
        corners, decoded = data
        try:
            self._gather(decoded, corners, self._side, targets)
        finally:
            self._reader.release(decoded)

    def read_tile(self, tile: int, target: Any) -> None:
        """Decode what a tile needs, and cut it out."""
        self.place(0, self._fetch(np.array([tile])), [target])


class DaliSource(_JpegSource):
    """Tiles that are decoded and assembled by DALI.

    Every compressed tile is decoded strictly on the CPU as well, reduced to an eighth a side, before DALI
    gets it: DALI makes up pixels for damage inside of a JPEG.

    Args:
        reader: of `open_jpegs`.
        decoder: does the work.
    """

    def __init__(self, source: SlideSource, reader: TiffReader | DicomReader, decoder: DaliTiles) -> None:
        super().__init__(source, reader)
        self._reader, self._decoder = reader, decoder
        self._form = reader.tiles.format(self._level)
        ratio, rest = divmod(self._side, source.tiling.geometry.requested_tile_size_px)
        self._ratio = ratio if not rest and ratio in RATIOS else 1
        self._bands = _bands(self._side, self._ratio, self._form.width * self._form.height)

    def fetch(self, number: int) -> Tensor:
        """The tiles of a block, (n, S, S, 3) uint8; S is the requested size, or that in the level where DALI
        does not reduce by their ratio.

        Raises:
            SlideReadError: a compressed tile is damaged.
            RuntimeError: DALI cannot decode one.
        """
        return self._decoded(self.blocks[number])

    def place(self, number: int, data: Tensor, targets: Sequence[Any]) -> None:
        """Write what `fetch` gave into targets, (S, S, 3) uint8 each; nothing is waited for."""
        side = data.shape[1]
        if side == targets[0].shape[0]:
            for slots, target in neighbours([torch.as_tensor(target) for target in targets]):
                target.copy_(data[slots], non_blocking=True)
            return
        offsets = np.stack([np.zeros(len(data), np.int64), np.arange(len(data)) * side], axis=1)
        cut_tiles_on_device(data.reshape(-1, side, 3), offsets, side, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        """Fetch and place a single tile."""
        self.place(0, self._decoded(np.array([tile])), [target])

    def _decoded(self, tiles: IntArray) -> Tensor:
        side, bands, level = self._side, self._bands, self._level
        height = side // bands
        corners = self._corners[tiles]
        boxes = np.repeat(corners, bands, axis=0)
        boxes[:, 1] += np.tile(np.arange(bands) * height, len(tiles))
        places = self._places(corners)
        size, form = self._reader.level_dimensions[level], self._form
        parts = parts_of_boxes(
            boxes, (side, height), size, (form.width, form.height), np.array(list(places), np.int64)
        )
        jpegs = self._checked([places[tile] for tile in parts.tiles.tolist()])
        geometry = Geometry(side, height, self._ratio, form.rgb)
        found = self._decoder.boxes(jpegs, parts, geometry)
        size_px = side // self._ratio
        return found.reshape(len(tiles), size_px, size_px, 3)

    def _places(self, corners: IntArray) -> dict[int, TilePlace]:
        """The compressed tiles around some tiles."""
        right, bottom = self._reader.level_dimensions[self._level]
        (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), (corners.max(axis=0) + self._side).tolist()
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, right), min(y1, bottom)
        if x0 >= x1 or y0 >= y1:
            return {}
        found = self._reader.tiles.tiles_in(self._level, x0, y0, x1 - x0, y1 - y0)
        return {place.tile: place for place in found}

    def _checked(self, places: Sequence[TilePlace]) -> list[bytes]:
        """What is stored of compressed tiles: complete JPEGs, which a strict decoder takes."""
        jpegs = [part for (part,) in self._reader.tiles.read(self._level, places)]
        for place, jpeg in zip(places, jpegs, strict=True):
            try:
                codecs.check_jpeg(jpeg, self._form, (place.height, place.width))
            except codecs.TileError as error:
                raise self._reader.tiles.damaged(self._level, place, error) from error
        return jpegs


def _bands(side: int, ratio: int, tile_pixels: int) -> int:
    """In how many boxes, one above the other, a tile is assembled: about as many as the compressed tiles that
    it takes, since a batch of DALI's has one of each per sample."""
    most = 1 + side * side // tile_pixels
    size = side // ratio
    return next(bands for bands in range(min(most, size), 0, -1) if not size % bands)


def open_jpegs(probe: Probe) -> TiffReader | DicomReader:
    """The JPEG tiles of a TIFF, or the JPEG frames of a DICOM slide.

    Raises:
        BackendError: it has no JPEG tiles of three channels, or their colours are not clear from them alone.
    """
    if probe.kind != "dicom" and (reason := why_no_jpeg(probe) or colour_conflict(probe)):
        raise BackendError(reason)
    reader = DicomReader(probe) if probe.kind == "dicom" else TiffReader(probe)
    reader.backend = "jpegs"
    for form in map(reader.tiles.format, range(len(reader.level_dimensions))):
        if form.compression != "JPEG" or form.samples != 3:
            reader.close()
            raise BackendError(f"it is stored in {form.compression} frames of {form.samples} channels")
    return reader
