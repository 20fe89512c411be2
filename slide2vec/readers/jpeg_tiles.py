"""JPEG tiles of a slide that a device decodes: whole, each into its slot of one piece of memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError
from slide2vec.readers.codecs import TileError, decode_tile
from slide2vec.readers.decoders import NvimgcodecDecoder, NvimgcodecMemory
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.tiff_tiles import TiffTiles, colour_conflict, why_no_jpeg
from slide2vec.readers.tile_table import TileFormat

__all__ = ["DecodedTiles", "JpegTileReader", "region_of"]


@dataclass(eq=False)
class DecodedTiles:
    """Decoded tiles of a level, and where they lie.

    Attributes:
        memory: of which the first slots hold them.
        slots: (rows, columns) int64 of neighbouring tiles, the slot of each; -1 where the file leaves it out
            or nobody needs it.
        left, top: of the first of them, level px.
        level_size: (width, height) of the level, px: what lies beyond is not the slide's.
    """

    memory: NvimgcodecMemory
    slots: NDArray[np.int64]
    left: int
    top: int
    level_size: tuple[int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what they hold of the level, px."""
        (rows, columns), (height, width) = self.slots.shape, self.memory.pixels.shape[1:3]
        right = min(self.left + columns * width, self.level_size[0])
        return self.left, self.top, right, min(self.top + rows * height, self.level_size[1])


class JpegTileReader(PyramidReader):
    """A SlideReader over JPEG tiles, whose regions are tensors of the decoder's device.

    Attributes:
        refused: tiles that the decoder did not take, and that the CPU decoded.

    Raises:
        BackendError: the file has no JPEG tiles, or their colours are not clear from them alone.
    """

    backend = "raw"

    def __init__(self, probe: Probe, decoder: NvimgcodecDecoder) -> None:
        if reason := why_no_jpeg(probe):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in probe.levels])
        self._decoder, self._lock, self.refused = decoder, threading.Lock(), 0
        self._tiles = TiffTiles(probe, self._read_error, is_checked=True)
        if reason := colour_conflict(probe):
            self.close()
            raise BackendError(reason)

    def decode(self, level: int, corners: NDArray[np.int64], side: tuple[int, int]) -> DecodedTiles:
        """The tiles under boxes of one size.

        Args:
            corners: (n, 2), (x, y) of each box, level px; they may lie outside the level.
            side: (width, height) of the boxes, px.

        Raises:
            SlideReadError: one of the tiles cannot be read or decoded.
        """
        form = self._tiles.format(level)
        under, left, top = self._under(level, corners, side)
        rows, columns = np.nonzero(under)
        across = -(-self.level_dimensions[level][0] // form.width)
        numbers = (rows + top) * across + columns + left
        order = self._tiles.file_order(level, numbers)
        slots = np.full(under.shape, -1, np.int64)
        slots[rows[order], columns[order]] = np.arange(len(order))
        memory = self._decoded(level, numbers[order], form)
        place = left * form.width, top * form.height
        return DecodedTiles(memory, slots, *place, self.level_dimensions[level])

    def _under(
        self, level: int, corners: NDArray[np.int64], side: tuple[int, int]
    ) -> tuple[NDArray[np.bool_], int, int]:
        """(rows, columns), which tiles lie under the boxes, and the column and the row of the first."""
        form, size = self._tiles.format(level), self.level_dimensions[level]
        begin, end = np.maximum(corners, 0), np.minimum(corners + side, size)
        seen = (begin < end).all(axis=1)
        if not seen.all():
            begin, end = begin[seen], end[seen]
        if not len(begin):
            return np.zeros((1, 1), bool), 0, 0
        tile = form.width, form.height
        first, last = begin // tile, (end - 1) // tile
        origin = first.min(axis=0)
        columns, rows = (last.max(axis=0) - origin + 1).tolist()
        left, top = origin.tolist()
        most = (last - first).max(axis=0).tolist()
        # of each box all its columns and rows, the last of them again where it has fewer than another
        xs, ys = (
            np.minimum(first[:, axis, None] + np.arange(most[axis] + 1), last[:, axis, None]) - origin[axis]
            for axis in (0, 1)
        )
        under = np.zeros((rows, columns), bool)
        under[ys[:, :, None], xs[:, None, :]] = True
        return under, left, top

    def _decoded(self, level: int, numbers: NDArray[np.int64], form: TileFormat) -> NvimgcodecMemory:
        jpegs = self._tiles.read_jpegs(level, numbers)
        memory, refused = self._decoder.decode(jpegs, form)
        for slot in refused:
            place = self._tiles.place(level, int(numbers[slot]))
            try:
                pixels = decode_tile([jpegs[slot]], form, (place.height, place.width), None)
            except TileError as error:
                raise self._tiles.damaged(level, place, error) from error
            height, width = pixels.shape[:2]
            memory.pixels[slot, :height, :width].copy_(import_module("torch").from_numpy(pixels))
        if refused:
            with self._lock:
                self.refused += len(refused)
        return memory

    def release(self, decoded: DecodedTiles) -> None:
        """What is enqueued on the device is the last that needs them."""
        self._decoder.release(decoded.memory)

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        decoded = self.decode(level, np.array([[x, y]]), (width, height))
        try:
            return region_of(decoded, x, y, width, height)
        finally:
            self.release(decoded)

    def _canvas(self, height: int, width: int) -> Any:
        return self._decoder.white(height, width)

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()


def region_of(decoded: DecodedTiles, x: int, y: int, width: int, height: int) -> Any:
    """(height, width, 3) uint8 of a box, a tensor of the decoder's device; white beyond the level and where
    the file leaves tiles out.

    Args:
        x, y: of the box, level px.
    """
    pixels, (rows, columns) = decoded.memory.pixels, decoded.slots.shape
    tile_height, tile_width = pixels.shape[1:3]
    canvas = pixels.new_full((height, width, 3), 255)
    left, top, right, bottom = decoded.box
    x0, y0, x1, y1 = max(x, left), max(y, top), min(x + width, right), min(y + height, bottom)
    if x0 >= x1 or y0 >= y1 or (decoded.slots < 0).all():
        return canvas
    slots = import_module("torch").from_numpy(decoded.slots).to(pixels.device)
    tiles = pixels[slots.clamp(min=0)]
    tiles[slots < 0] = 255
    plane = tiles.transpose(1, 2).reshape(rows * tile_height, columns * tile_width, 3)
    canvas[y0 - y : y1 - y, x0 - x : x1 - x] = plane[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas
