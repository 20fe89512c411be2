"""Assembles regions from a slide's compressed tiles, read in file order and each decoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.readers.averaged_box import AveragedBox
from slide2vec.readers.codecs import TileError
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.reader import Squares
from slide2vec.readers.tile_table import TilePlace, TileTable

__all__ = ["Box", "HostTileReader", "Place", "Target", "TileAssembler", "places_under"]

#: Decoded tiles that reach into a neighbouring box and are kept for it, per open slide.
KEPT_BYTES = 48 << 20
#: Pixels of the tiles that one step decodes, in bytes: boxes over long strips take several.
STEP_BYTES = 64 << 20

#: Column and row of a tile.
Place: TypeAlias = tuple[int, int]
#: Left, top, right and bottom, px of a level.
Box: TypeAlias = tuple[int, int, int, int]
#: Level, tile, ratio that it was reduced by.
_Key: TypeAlias = tuple[int, int, int]
_Reserved: TypeAlias = tuple[TilePlace, "_SharedTile"]


class Target(Protocol):
    """Takes a box, tile by tile. See `AveragedBox`."""

    x: int
    y: int
    ratio: int

    def blank(self) -> None: ...

    def put(self, pixels: Any, x: int, y: int, ratio: int = 1) -> None: ...

    def finish(self) -> None: ...


class HostTileReader(PyramidReader):
    """A SlideReader over the boxes of a `HostDecoder`; see also `BufferedReader`."""

    _boxes: TileAssembler

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self._boxes.read(level, x, y, width, height)
        return pixels

    def read_into(
        self,
        memory: NDArray[np.uint8],
        location_lv0: tuple[int, int],
        level: int,
        size: tuple[int, int],
        ratio: int,
        squares: Squares | None = None,
    ) -> NDArray[np.uint8] | None:
        """See `BufferedReader.read_into`."""
        (x, y), (width, height) = self._corner(location_lv0, level), size
        right, bottom = self.level_dimensions[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom)
        if x0 >= x1 or y0 >= y1:
            return None
        shape = height // ratio, width // ratio, 3
        canvas = memory[: shape[0] * shape[1] * 3].reshape(shape)
        target = AveragedBox(canvas, x, y, ratio)
        if (x0, y0, x1, y1) != (x, y, x + width, y + height):
            target.blank()
        within = None if squares is None else (squares[0] + (x, y), squares[1])
        self.fill(target, level, (x0, y0, x1, y1), within and places_under(within, *self.tile_size(level)))
        return canvas

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level's compressed tiles, px."""
        return self._boxes.tile_size(level)

    def fill(self, target: Target, level: int, box: Box, only: Container[Place] | None) -> None:
        """See `TileAssembler.fill`."""
        with self._naming_errors(level, *box[:2]):
            self._boxes.fill(target, level, box, only=only)

    def close(self) -> None:
        """Release the files. May be called twice."""
        self._boxes.close()


@dataclass(eq=False)
class _SharedTile:
    """A tile that a thread decodes for others, too: it `is_over` with no pixels where that failed."""

    pixels: Any = None
    is_over: bool = False


class TileAssembler:
    """Boxes of a slide's levels. Safe to use from several threads: a tile that two boxes share is decoded by
    one of them and kept for the other.

    Args:
        tiles: where they are read from; closed with this.
        decoder: gives the pixels.
    """

    def __init__(self, tiles: TileTable, decoder: HostDecoder) -> None:
        self._tiles, self._decoder = tiles, decoder
        self._lock = threading.Lock()
        #: Notified once for all tiles that a thread has decoded for others, too.
        self._decoded = threading.Condition(self._lock)
        self._kept: OrderedDict[_Key, _SharedTile] = OrderedDict()
        self._kept_bytes = 0
        self._working: dict[_Key, _SharedTile] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        """(height, width, 3) uint8 of a box in level px that lies inside the level.

        Raises:
            SlideReadError: one of its tiles cannot be decoded.
        """
        canvas = np.empty((height, width, 3), np.uint8)
        self.fill(AveragedBox(canvas, x, y, 1), level, (x, y, x + width, y + height))
        return canvas

    def fill(self, target: Target, level: int, box: Box, *, only: Container[Place] | None = None) -> None:
        """Write a box that lies inside the level. Each tile is averaged as it comes out of the decoder, while
        the CPU's cache holds it.

        Args:
            only: columns and rows of the tiles that are decoded: pixels of others may be any.

        Raises:
            SlideReadError: one of its tiles cannot be decoded.
        """
        x, y, right, bottom = box
        places, form = self._tiles.tiles_in(level, x, y, right - x, bottom - y), self._tiles.format(level)
        columns, rows = (
            (right - 1) // form.width - x // form.width,
            (bottom - 1) // form.height - y // form.height,
        )
        if len(places) < (columns + 1) * (rows + 1):  # some are left out
            target.blank()
        if only is not None:
            places = [place for place in places if (place.x // form.width, place.y // form.height) in only]
        whole_cells = all(edge % target.ratio == 0 for edge in (target.x, target.y, form.width, form.height))
        for step in self._steps(level, places):
            self._fill(target, level, step, target.ratio if whole_cells else 1)
        target.finish()

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) of its compressed tiles, px."""
        form = self._tiles.format(level)
        return form.width, form.height

    def _steps(self, level: int, places: Sequence[TilePlace]) -> Iterator[Sequence[TilePlace]]:
        form = self._tiles.format(level)
        most = max(1, STEP_BYTES // (form.width * form.height * 3))
        return (places[start : start + most] for start in range(0, len(places), most))

    def _fill(self, target: Target, level: int, places: Sequence[TilePlace], ratio: int) -> None:
        """Tiles that other boxes need, too, are reserved: whoever needs them meanwhile waits for them.

        Args:
            ratio: that what is kept for others is reduced by.
        """
        wanted, mine, reserved = self._claim(level, places, ratio)
        try:
            for place, pixels in zip(mine, self._decode(level, mine, ratio, wanted), strict=True):
                held = pixels[: place.height, : place.width]
                if place.tile not in wanted and not (place.width % ratio or place.height % ratio):
                    target.put(held, place.x, place.y)
                    continue
                cells = held if ratio == 1 else _averaged(held, ratio)
                target.put(cells, place.x, place.y, ratio)
                if place.tile in wanted:
                    wanted.pop(place.tile)[1].pixels = cells
        finally:
            self._publish(level, reserved, ratio)
        for place, tile in wanted.values():
            target.put(self._result(level, place, tile, ratio), place.x, place.y, ratio)

    def _claim(
        self, level: int, places: Sequence[TilePlace], ratio: int
    ) -> tuple[dict[int, _Reserved], list[TilePlace], list[_Reserved]]:
        """The tiles that are shared; the tiles that are neither decoded nor being
        decoded, and those of them that are reserved for others, too."""
        wanted: dict[int, _Reserved] = {}
        mine, reserved = [], []
        with self._lock:
            for place in places:
                key = level, place.tile, ratio
                found = self._kept.get(key) or self._working.get(key)
                if found is None:
                    mine.append(place)
                    if place.is_whole:
                        continue
                    found = self._working[key] = _SharedTile()
                    reserved.append((place, found))
                wanted[place.tile] = place, found
        return wanted, mine, reserved

    def _decode(
        self, level: int, places: Sequence[TilePlace], ratio: int, wanted: Container[int]
    ) -> Iterator[Any]:
        """Pixels of each tile in turn; those that are not wanted as they are are valid until the next."""
        if not places:
            return
        form = self._tiles.format(level)
        kept = [ratio == 1 and place.tile in wanted for place in places]
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

    def _result(self, level: int, place: TilePlace, tile: _SharedTile, ratio: int) -> Any:
        if not tile.is_over:
            with self._decoded:
                self._decoded.wait_for(lambda: tile.is_over)
        if tile.pixels is None:  # the thread that decoded it failed, at it or at another one of its step
            pixels = next(self._decode(level, [place], ratio, {place.tile}))[: place.height, : place.width]
            return pixels if ratio == 1 else _averaged(pixels, ratio)
        return tile.pixels

    def _publish(self, level: int, reserved: Sequence[_Reserved], ratio: int) -> None:
        """Keep what a neighbouring box will need; threads that wait for what failed try it themselves."""
        with self._lock:
            for place, tile in reserved:
                del self._working[key := (level, place.tile, ratio)]
                tile.is_over = True
                if tile.pixels is not None:
                    self._kept[key] = tile
                    self._kept_bytes += self._size(*key)
            if reserved:
                self._decoded.notify_all()
            self._shrink()

    def _shrink(self) -> None:
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._size(*self._kept.popitem(last=False)[0])

    def _size(self, level: int, tile: int, ratio: int) -> int:
        """Bytes of a tile that is kept."""
        form = self._tiles.format(level)
        return form.width * form.height * 3 // ratio**2

    def close(self) -> None:
        """Release the file. May be called twice."""
        self._tiles.close()
        with self._lock:
            self._kept.clear()
            self._kept_bytes = 0


def places_under(squares: Squares, wide: int, high: int) -> set[Place]:
    """The cells of a grid that squares touch.

    Args:
        wide, high: sides of its cells, px.
    """
    corners, side = squares
    return {
        (column, row)
        for x, y in corners.tolist()
        for column in range(x // wide, (x + side - 1) // wide + 1)
        for row in range(y // high, (y + side - 1) // high + 1)
    }


def _averaged(pixels: NDArray[np.uint8], ratio: int) -> NDArray[np.uint8]:
    """A tile in whole cells; white is what lies beyond the level."""
    height, width = (-(-side // ratio) for side in pixels.shape[:2])
    box = AveragedBox(np.empty((height, width, 3), np.uint8), 0, 0, ratio)
    box.put(pixels, 0, 0)
    box.finish()
    return box.canvas
