"""The raw road: a slide's compressed tiles read in file order, each decoded once, and assembled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from slide2vec.errors import BackendError
from slide2vec.readers.decoders import TileDecoder
from slide2vec.readers.jpegtiles import JpegTiles, TilePlace, why_not
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader

__all__ = ["RawBoxes", "RawReader"]

#: Decoded tiles that reach into a neighbouring box and are kept for it, per open slide.
KEPT_BYTES = 48 << 20

#: Level, tile.
_Key: TypeAlias = tuple[int, int]


class RawReader(PyramidReader):
    """A SlideReader over `RawBoxes`; its pixels are of the decoder's kind.

    Meant for decoding on a GPU: with OpenCV on the CPU it has cuCIM's pixels at 0.6 to 0.8 of its speed.

    Raises:
        BackendError: the file has no JPEG tiles, or their colours cannot be told from them alone.
    """

    backend = "raw"

    def __init__(self, probe: Probe, decoder: TileDecoder) -> None:
        if reason := why_not(probe):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in probe.levels])
        self._decoder = decoder
        tiles = JpegTiles(probe, self._read_error)
        self._boxes = RawBoxes(tiles, decoder, [level.photometric == "RGB" for level in probe.levels])
        conflicts = map(tiles.colour_conflict, range(len(probe.levels)))
        if reason := next(filter(None, conflicts), None):
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
    """Boxes of a slide's levels. Safe to use from several threads: a tile that two of them need at the
    same time is decoded by one.

    Args:
        tiles: where they are read from; closed with this.
        decoder: gives the pixels; boxes are of its kind (NumPy arrays or tensors).
        rgb: per level, whether the components are RGB.
    """

    def __init__(self, tiles: JpegTiles, decoder: TileDecoder, rgb: Sequence[bool]) -> None:
        self._tiles, self._decoder, self._rgb = tiles, decoder, rgb
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[Any]] = OrderedDict()
        self._working: dict[_Key, Future[Any]] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        """(height, width, 3) uint8 of a box in level px that lies inside the level.

        Raises:
            SlideReadError: one of its tiles cannot be decoded.
        """
        canvas = self._decoder.canvas(height, width)
        places = self._tiles.under(level, x, y, width, height)
        wanted, mine = self._claim(level, places)
        try:
            for place, pixels in zip(mine, self._decode(level, mine), strict=True):
                wanted[place.tile].set_result(pixels)
        finally:
            self._settle(level, mine, wanted)
        for place in places:
            canvas[place.in_box] = self._result(level, place, wanted[place.tile])[place.in_tile]
        return canvas

    def _claim(
        self, level: int, places: Sequence[TilePlace]
    ) -> tuple[dict[int, Future[Any]], list[TilePlace]]:
        """The future pixels of every tile, and the tiles that nobody has or decodes."""
        wanted: dict[int, Future[Any]] = {}
        mine = []
        with self._lock:
            for place in places:
                key = level, place.tile
                found = self._kept.get(key) or self._working.get(key)
                if found is None:
                    found = self._working[key] = Future()
                    mine.append(place)
                wanted[place.tile] = found
        return wanted, mine

    def _decode(self, level: int, places: Sequence[TilePlace]) -> list[Any]:
        if not places:
            return []
        shape = self._tiles.shape(level)
        decoded = self._decoder.decode(self._tiles.read(level, places), rgb=self._rgb[level])
        for place, pixels in zip(places, decoded, strict=True):
            if pixels is None or tuple(pixels.shape) != shape:
                found = "no pixels" if pixels is None else "x".join(map(str, pixels.shape))
                raise self._tiles.damaged(level, place, f"damaged JPEG tile ({found} instead of {shape})")
        return decoded

    def _result(self, level: int, place: TilePlace, future: Future[Any]) -> Any:
        try:
            return future.result()
        except _Unsettled:
            return self._decode(level, [place])[0]

    def _settle(self, level: int, mine: Sequence[TilePlace], wanted: dict[int, Future[Any]]) -> None:
        """Keep what a neighbour will ask for; those who wait for what failed will try it themselves."""
        with self._lock:
            for place in mine:
                future = self._working.pop((level, place.tile))
                if not future.done():
                    future.set_exception(_Unsettled())
                elif not place.is_whole:
                    self._kept[level, place.tile] = future
            self._shrink(level)

    def _shrink(self, level: int) -> None:
        height, width, channels = self._tiles.shape(level)
        while len(self._kept) > max(1, KEPT_BYTES // (height * width * channels)):
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()
        with self._lock:
            self._kept.clear()


class _Unsettled(Exception):
    """Another thread failed at this tile, or at one that it read together with it."""
