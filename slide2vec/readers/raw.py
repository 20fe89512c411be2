"""The raw road: a slide's compressed tiles read in file order, each decoded once, and assembled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from slide2vec.errors import BackendError
from slide2vec.readers.codecs import TileError
from slide2vec.readers.decoders import TileDecoder
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.tifftiles import TiffTiles, colour_conflict, why_no_jpeg
from slide2vec.readers.tiletable import TilePlace, TileTable

__all__ = ["RawBoxes", "RawReader"]

#: Decoded tiles that reach into a neighbouring box and are kept for it, per open slide.
KEPT_BYTES = 48 << 20
#: Pixels of the tiles that one step decodes, in bytes: boxes over long strips take several.
STEP_BYTES = 64 << 20

#: Level, tile.
_Key: TypeAlias = tuple[int, int]


class RawReader(PyramidReader):
    """A SlideReader over JPEG tiles; its pixels are of the decoder's kind. Meant for decoding on a GPU.

    Raises:
        BackendError: the file has no JPEG tiles, or their colours cannot be told from them alone.
    """

    backend = "raw"

    def __init__(self, probe: Probe, decoder: TileDecoder) -> None:
        if reason := why_no_jpeg(probe):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in probe.levels])
        self._decoder = decoder
        tiles = TiffTiles(probe, self._read_error, is_checked=True)
        self._boxes = RawBoxes(tiles, decoder)
        if reason := colour_conflict(probe):
            self.close()
            raise BackendError(reason)

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        return self._boxes.read(level, x, y, width, height)

    def _canvas(self, height: int, width: int) -> Any:
        return self._decoder.canvas(height, width)

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._boxes.close()


class RawBoxes:
    """Boxes of a slide's levels. Safe to use from several threads: a tile that two boxes share is decoded by
    one of them and kept for the other.

    Args:
        tiles: where they are read from; closed with this.
        decoder: gives the pixels; boxes are of its kind (NumPy arrays or tensors).
    """

    def __init__(self, tiles: TileTable, decoder: TileDecoder) -> None:
        self._tiles, self._decoder = tiles, decoder
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[Any]] = OrderedDict()
        self._working: dict[_Key, Future[Any]] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        """(height, width, 3) uint8 of a box in level px that lies inside the level.

        Raises:
            SlideReadError: one of its tiles cannot be decoded.
        """
        places = self._tiles.under(level, x, y, width, height)
        covered = sum(_pixels(place.in_box) for place in places)
        canvas = self._decoder.canvas(height, width, white=covered < width * height)
        for step in self._steps(level, places):
            self._fill(canvas, level, step)
        return canvas

    def _steps(self, level: int, places: Sequence[TilePlace]) -> Iterator[Sequence[TilePlace]]:
        form = self._tiles.format(level)
        most = max(1, STEP_BYTES // (form.width * form.height * 3))
        return (places[start : start + most] for start in range(0, len(places), most))

    def _fill(self, canvas: Any, level: int, places: Sequence[TilePlace]) -> None:
        """Tiles that others may need, too, are claimed: who needs them meanwhile waits for them."""
        wanted, mine = self._claim(level, places)
        try:
            for place, pixels in zip(mine, self._decode(level, mine), strict=True):
                canvas[place.in_box] = pixels[place.in_tile]
                if not place.is_whole:
                    wanted.pop(place.tile)[1].set_result(pixels)
        finally:
            self._settle(level, mine)
        for place, future in wanted.values():
            canvas[place.in_box] = self._result(level, place, future)[place.in_tile]

    def _claim(
        self, level: int, places: Sequence[TilePlace]
    ) -> tuple[dict[int, tuple[TilePlace, Future[Any]]], list[TilePlace]]:
        """The future pixels of tiles that are shared, and the tiles that nobody has or decodes."""
        wanted: dict[int, tuple[TilePlace, Future[Any]]] = {}
        mine = []
        with self._lock:
            for place in places:
                key = level, place.tile
                found = self._kept.get(key) or self._working.get(key)
                if found is None:
                    mine.append(place)
                    if place.is_whole:
                        continue
                    found = self._working[key] = Future()
                wanted[place.tile] = place, found
        return wanted, mine

    def _decode(self, level: int, places: Sequence[TilePlace]) -> Iterator[Any]:
        """Pixels of each tile in turn; those of whole tiles are good until the next."""
        if not places:
            return
        form = self._tiles.format(level)
        kept = [not place.is_whole for place in places]
        decoded = self._decoder.decode(self._tiles.read(level, places), form, places, kept)
        for place in places:
            try:
                pixels = next(decoded)
            except TileError as error:
                raise self._tiles.damaged(level, place, error) from error
            height, width, channels = pixels.shape
            if not (place.height <= height <= form.height and place.width <= width <= form.width):
                found = f"damaged tile ({width}x{height} px instead of {form.width}x{form.height})"
                raise self._tiles.damaged(level, place, found)
            if channels != 3:
                raise self._tiles.damaged(level, place, f"damaged tile ({channels} channels instead of 3)")
            yield pixels

    def _result(self, level: int, place: TilePlace, future: Future[Any]) -> Any:
        try:
            return future.result()
        except _Unsettled:
            return next(self._decode(level, [place]))

    def _settle(self, level: int, mine: Sequence[TilePlace]) -> None:
        """Keep what a neighbour will ask for; those who wait for what failed will try it themselves."""
        with self._lock:
            for place in mine:
                if place.is_whole:
                    continue
                future = self._working.pop((level, place.tile))
                if future.done():
                    self._kept[level, place.tile] = future
                else:
                    future.set_exception(_Unsettled())
            self._shrink(level)

    def _shrink(self, level: int) -> None:
        form = self._tiles.format(level)
        while len(self._kept) > max(1, KEPT_BYTES // (form.width * form.height * 3)):
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()
        with self._lock:
            self._kept.clear()


def _pixels(part: tuple[slice, slice]) -> int:
    rows, columns = part
    return int((rows.stop - rows.start) * (columns.stop - columns.start))


class _Unsettled(Exception):
    """Another thread failed at this tile, or at one that it read together with it."""
