"""Pixels of a level for several that cut tiles of different sizes from it: decoded once for all of them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.readers.averaged_box import AveragedBox, AveragedBoxes
from slide2vec.readers.reader import Squares
from slide2vec.readers.tile_assembly import Box, HostTileReader, Place, places_under

__all__ = ["KEPT_FOR_OTHERS_BYTES", "MOST_CHUNK_BYTES", "Chunk", "SharedLevel"]

#: Decoded pixels that are kept until all have cut their tiles, per level of an open slide.
KEPT_FOR_OTHERS_BYTES = 256 << 20
#: Of a chunk: with compressed tiles, or strips, that are larger too few of them would be kept.
MOST_CHUNK_BYTES = KEPT_FOR_OTHERS_BYTES // 16
#: Side of a chunk, averaged px, where compressed tiles are no larger: 0.8 MB, which stay in a CPU's cache.
CHUNK_PX = 512


#: Ratio that squares are reduced by, and where in x and y its cells begin, level px modulo the ratio.
_Cells: TypeAlias = tuple[int, int, int]


@dataclass(eq=False)
class Chunk:
    """Neighbouring compressed tiles: they have `parts` once they are decoded. Some thread may be at it, and
    some may hold it.

    Attributes:
        parts: by kind of cells: the average of those that lie wholly in it, and in full resolution the edges
            that hold parts of others.
    """

    parts: dict[_Cells, list[AveragedBox]] = field(default_factory=dict)
    memory: NDArray[np.uint8] | None = None
    is_taken: bool = False
    holders: int = 0


class SharedLevel:
    """A level in chunks of whole compressed tiles. The first thread that needs a chunk decodes it into memory
    that all cut from, averaged for each kind of cells that somebody needs there, and goes on with those that
    nobody decodes before it waits for others. What is dropped for want of room is decoded again. Used from
    several threads.

    Args:
        reads: all that will be read, as it will be: squares in level px, and the ratio they are reduced by.

    Attributes:
        chunk_bytes: of the largest chunk.
        kept_bytes: of all that is kept.
    """

    def __init__(self, reader: HostTileReader, level: int, reads: Sequence[tuple[Squares, int]]) -> None:
        self._reader, self._level, self._size = reader, level, reader.level_dimensions[level]
        tile, least = reader.tile_size(level), min(ratio for _, ratio in reads)
        self._wide, self._high = (side * max(1, CHUNK_PX * least // side) for side in tile)
        self._tiles, self._uses = set[Place](), Counter[Place]()
        self._cells = dict[Place, set[_Cells]]()
        for squares, ratio in reads:
            self._tiles |= places_under(squares, *tile)
            self._uses.update(self._under(squares))
            for cells, alike in _by_cells(squares, ratio):
                for place in self._under(alike):
                    self._cells.setdefault(place, set()).add(cells)
        self.chunk_bytes, self.kept_bytes = max(map(self._bytes, self._cells), default=0), 0
        self._chunks, self._free = OrderedDict[Place, Chunk](), list[NDArray[np.uint8]]()
        self._changed = threading.Condition()

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

    def cut(
        self, held: dict[Place, Chunk], corner: tuple[int, int], ratio: int, tile: NDArray[np.uint8]
    ) -> None:
        """Write the square at a corner, level px, into a tile, (S, S, 3) uint8 averaged px; white beyond the
        level."""
        (x, y), side = corner, len(tile) * ratio
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + side, self._size[0]), min(y + side, self._size[1])
        target = AveragedBox(tile, x, y, ratio)
        if (left, top, right, bottom) != (x, y, x + side, y + side):
            target.blank()
            if left >= right or top >= bottom:
                return
        for column in range(left // self._wide, (right - 1) // self._wide + 1):
            for row in range(top // self._high, (bottom - 1) // self._high + 1):
                for part in held[column, row].parts[ratio, x % ratio, y % ratio]:
                    target.put(part.canvas, part.x, part.y, part.ratio)
        target.finish()

    def done(self, held: dict[Place, Chunk]) -> None:
        """Tiles have been cut."""
        with self._changed:
            for place, chunk in held.items():
                chunk.holders -= 1
                if not chunk.holders and self._uses[place] <= 0 and self._chunks.get(place) is chunk:
                    self._drop(place)
                    if chunk.memory is not None:  # is used again
                        self._free.append(chunk.memory)

    def _under(self, squares: Squares) -> set[Place]:
        """Chunks of the level."""
        columns, rows = -(-self._size[0] // self._wide), -(-self._size[1] // self._high)
        under = places_under(squares, self._wide, self._high)
        return {(column, row) for column, row in under if 0 <= column < columns and 0 <= row < rows}

    def _bytes(self, place: Place) -> int:
        """Of a chunk, without its edges."""
        return sum(self._wide * self._high * 3 // ratio**2 for ratio, _, _ in self._cells[place])

    def _hold(self, place: Place) -> Chunk:
        """Under the lock."""
        self._uses[place] -= 1
        if (chunk := self._chunks.get(place)) is None:
            while self._chunks and self.kept_bytes + self._bytes(place) > KEPT_FOR_OTHERS_BYTES:
                self._drop(next(iter(self._chunks)))
            chunk = self._chunks[place] = Chunk()
            self.kept_bytes += self._bytes(place)
        chunk.holders += 1
        return chunk

    def _drop(self, place: Place) -> None:
        """Under the lock."""
        del self._chunks[place]
        self.kept_bytes -= self._bytes(place)

    def _next(self, held: dict[Place, Chunk]) -> Place | None:
        """A chunk that nobody decodes, which is the caller's now; None once all are there."""
        with self._changed:
            while left := [place for place, chunk in held.items() if not chunk.parts]:
                for place in left:
                    if not held[place].is_taken:
                        held[place].is_taken = True
                        return place
                self._changed.wait()
        return None

    def _decode(self, place: Place, chunk: Chunk) -> None:
        x, y = place[0] * self._wide, place[1] * self._high
        box = x, y, min(x + self._wide, self._size[0]), min(y + self._high, self._size[1])
        parts, memory = dict[_Cells, list[AveragedBox]](), None
        try:
            memory = self._memory(self._bytes(place))
            found, free = dict[_Cells, list[AveragedBox]](), memory
            for cells in self._cells[place]:
                found[cells] = _parts(box, cells, free)
                free = free[found[cells][0].canvas.size :]
            target = AveragedBoxes([part for each in found.values() for part in each])
            self._reader.fill(target, self._level, box, self._tiles)
            parts = found
        finally:  # who waits for what failed tries it
            with self._changed:
                chunk.parts, chunk.memory, chunk.is_taken = parts, memory, False
                self._changed.notify_all()

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """Memory that nobody needs any more, else new: to touch a page for the first time is dear."""
        with self._changed:
            found = self._free.pop() if self._free else None
        return found if found is not None and found.size >= size else np.empty(size, np.uint8)


def _by_cells(squares: Squares, ratio: int) -> Iterator[tuple[_Cells, Squares]]:
    """Squares whose cells begin alike."""
    corners, side = squares
    for x, y in np.unique(corners % ratio, axis=0).tolist():
        yield (ratio, x, y), (corners[(corners % ratio == (x, y)).all(axis=1)], side)


def _parts(box: Box, cells: _Cells, memory: NDArray[np.uint8]) -> list[AveragedBox]:
    """What is kept of a box: first the cells that lie wholly in it, in that memory."""
    (left, top, right, bottom), (ratio, x, y) = box, cells
    x0, y0 = min(left + (x - left) % ratio, right), min(top + (y - top) % ratio, bottom)
    columns, rows = (right - x0) // ratio, (bottom - y0) // ratio
    canvas = memory[: columns * rows * 3].reshape(rows, columns, 3)
    x1, y1 = x0 + columns * ratio, y0 + rows * ratio
    edges = (
        (left, top, x0, bottom),
        (x1, top, right, bottom),
        (left, top, right, y0),
        (left, y1, right, bottom),
    )
    return [
        AveragedBox(canvas, x0, y0, ratio),
        *(
            AveragedBox(np.empty((y1 - y0, x1 - x0, 3), np.uint8), x0, y0, 1)
            for x0, y0, x1, y1 in edges
            if x0 < x1 and y0 < y1
        ),
    ]
