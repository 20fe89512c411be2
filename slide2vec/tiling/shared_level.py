"""Pixels of a level for several that cut tiles of different sizes from it: decoded once for all of them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.readers.reader import Squares
from slide2vec.readers.tile_assembly import HostTileReader, Place, places_under

__all__ = ["KEPT_FOR_OTHERS_BYTES", "MOST_CHUNK_BYTES", "Chunk", "SharedLevel"]

#: Decoded pixels that are kept until all have cut their tiles, per level of an open slide.
KEPT_FOR_OTHERS_BYTES = 256 << 20
#: Of a chunk: with compressed tiles, or strips, that are larger too few of them would be kept.
MOST_CHUNK_BYTES = KEPT_FOR_OTHERS_BYTES // 16
#: Side of a chunk, averaged px, where compressed tiles are no larger: 0.8 MB, which stay in a CPU's cache.
CHUNK_PX = 512


@dataclass(eq=False)
class Chunk:
    """Neighbouring compressed tiles: `pixels` once they are decoded. Some thread may be at it, and some may
    hold it."""

    pixels: Any = None
    is_taken: bool = False
    holders: int = 0


class SharedLevel:
    """A level in chunks of whole compressed tiles. The first thread that needs a chunk decodes it into memory
    that all cut from, and goes on with those that nobody decodes before it waits for others. What is dropped
    for want of room is decoded again. Used from several threads.

    Args:
        ratio: that all reduce the level by; 1 is taken where averaged cells would reach over edges.
        reads: squares in level px: all that will be read, as they will be.

    Attributes:
        ratio: each pixel of a chunk is the average of so many a side.
        chunk_bytes: of each chunk.
    """

    def __init__(self, reader: HostTileReader, level: int, ratio: int, reads: Sequence[Squares]) -> None:
        self._reader, self._level, self._size = reader, level, reader.level_dimensions[level]
        tile = reader.tile_size(level)
        edges = (edge for at, side in reads for edge in (at, np.minimum(at + side, self._size)))
        cells = not any(side % ratio for side in tile) and not any((edge % ratio).any() for edge in edges)
        self.ratio = ratio = ratio if cells else 1
        self._wide, self._high = (side * max(1, CHUNK_PX * ratio // side) for side in tile)
        self._tiles, self._uses = set[Place](), Counter[Place]()
        for squares in reads:
            self._tiles |= places_under(squares, *tile)
            self._uses.update(self._under(squares))
        self.chunk_bytes = self._wide * self._high * 3 // ratio**2
        self._chunks, self._free = OrderedDict[Place, Chunk](), list[Any]()
        self._changed = threading.Condition()

    @property
    def kept_bytes(self) -> int:
        """Of all that is kept."""
        return len(self._chunks) * self.chunk_bytes

    def fetch(self, squares: Squares) -> dict[Place, Chunk]:
        """What lies under squares, for `cut`, to be given back by `done`.

        Raises:
            SlideReadError: some of it cannot be decoded.
        """
        with self._changed:
            held = {place: self._hold(place) for place in sorted(self._under(squares))}
        try:
            while (place := self._next(held)) is not None:
                self._decode(place, held[place])
        except BaseException:
            self.done(held)
            raise
        return held

    def cut(self, held: dict[Place, Chunk], corner: tuple[int, int], tile: NDArray[np.uint8]) -> None:
        """Write the square at a corner, level px, into a tile, (S, S, 3) uint8 averaged px; white beyond the
        level."""
        ratio, side = self.ratio, len(tile)
        x, y = corner[0] // ratio, corner[1] // ratio
        x1, y1 = min(x + side, self._size[0] // ratio), min(y + side, self._size[1] // ratio)
        x0, y0 = max(x, 0), max(y, 0)
        if (x0, y0, x1, y1) != (x, y, x + side, y + side):
            tile[:] = 255
            if x0 >= x1 or y0 >= y1:
                return
        wide, high = self._wide // ratio, self._high // ratio
        for column in range(x0 // wide, (x1 - 1) // wide + 1):
            at = column * wide
            left, right = max(x0, at), min(x1, at + wide)
            for row in range(y0 // high, (y1 - 1) // high + 1):
                down = row * high
                top, bottom = max(y0, down), min(y1, down + high)
                part = held[column, row].pixels[top - down : bottom - down, left - at : right - at]
                tile[top - y : bottom - y, left - x : right - x] = part

    def done(self, held: dict[Place, Chunk]) -> None:
        """Tiles have been cut."""
        with self._changed:
            for place, chunk in held.items():
                chunk.holders -= 1
                if not chunk.holders and self._uses[place] <= 0 and self._chunks.get(place) is chunk:
                    del self._chunks[place]
                    if chunk.pixels is not None:  # its memory is used again
                        self._free.append(chunk.pixels.base)

    def _under(self, squares: Squares) -> set[Place]:
        """Chunks of the level."""
        columns, rows = -(-self._size[0] // self._wide), -(-self._size[1] // self._high)
        under = places_under(squares, self._wide, self._high)
        return {(column, row) for column, row in under if 0 <= column < columns and 0 <= row < rows}

    def _hold(self, place: Place) -> Chunk:
        """Under the lock."""
        self._uses[place] -= 1
        if (chunk := self._chunks.get(place)) is None:
            while self._chunks and self.kept_bytes + self.chunk_bytes > KEPT_FOR_OTHERS_BYTES:
                self._chunks.popitem(last=False)
            chunk = self._chunks[place] = Chunk()
        chunk.holders += 1
        return chunk

    def _next(self, held: dict[Place, Chunk]) -> Place | None:
        """A chunk that nobody decodes, which is the caller's now; None once all are there."""
        with self._changed:
            while left := [place for place, chunk in held.items() if chunk.pixels is None]:
                for place in left:
                    if not held[place].is_taken:
                        held[place].is_taken = True
                        return place
                self._changed.wait()
        return None

    def _decode(self, place: Place, chunk: Chunk) -> None:
        x, y = place[0] * self._wide, place[1] * self._high
        width, height = min(self._wide, self._size[0] - x), min(self._high, self._size[1] - y)
        shape = height // self.ratio, width // self.ratio, 3
        pixels = None
        try:
            memory = self._memory()
            canvas = memory[: shape[0] * shape[1] * 3].reshape(shape)
            self._reader.fill(canvas, self._level, x, y, self.ratio, self._tiles)
            pixels = canvas
        finally:  # who waits for what failed tries it
            with self._changed:
                chunk.pixels, chunk.is_taken = pixels, False
                self._changed.notify_all()

    def _memory(self) -> NDArray[np.uint8]:
        """Memory that nobody needs any more, else new: to touch a page for the first time is dear."""
        with self._changed:
            return self._free.pop() if self._free else np.empty(self.chunk_bytes, np.uint8)
