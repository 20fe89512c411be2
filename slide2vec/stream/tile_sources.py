"""Where a slide's tiles come from: the slide itself, read in supertiles, or a tile archive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.artifacts.finite import remedy
from slide2vec.cpus import job_cpus
from slide2vec.errors import NotFiniteError, SlideReadError
from slide2vec.geometry import floor_to_level
from slide2vec.prepare import cut_tiles, dali_archive
from slide2vec.readers import SlideReader
from slide2vec.readers.reader import BufferedReader, Squares
from slide2vec.runtime import Engine
from slide2vec.tiling import BadTile, Tiling
from slide2vec.tiling.archives import TileArchive
from slide2vec.tiling.shared_level import Chunk, SharedLevel
from slide2vec.tiling.supertiles import plan_supertiles

__all__ = [
    "SlideSource",
    "TileSource",
    "bad_tiles",
    "damaged",
    "not_finite",
    "open_archive",
    "place_singly",
]

#: Places that an error lists.
_LISTED = 10
#: Of DALI's own, per open slide, where the job has as many CPUs.
_DALI_THREADS = 4

Pixels = NDArray[np.uint8]


class TileSource(Protocol):
    """The tiles of one slide, in blocks that are read at once. Used from several threads.

    Attributes:
        backend: what reads: a reader's name, or "archive".
        blocks: (n,) int64 tile indices of each block; together every tile once.
    """

    @property
    def backend(self) -> str: ...

    @property
    def blocks(self) -> Sequence[NDArray[np.int64]]: ...

    def fetch(self, number: int) -> Any:
        """What is stored of block `number`: its pixels, or its compressed tiles.

        Raises:
            SlideReadError: it cannot be decoded.
        """
        ...

    def place(self, number: int, data: Any, targets: Sequence[Pixels]) -> None:
        """Write the tiles of the block into targets, (S, S, 3) uint8 each, S the requested size.

        Raises:
            SlideReadError: one of them cannot be decoded.
        """
        ...

    def read_tile(self, tile: int, target: Pixels) -> None:
        """Fetch and place a single tile: the same pixels as with its block.

        Raises:
            SlideReadError: it cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Release the file. May be called twice."""
        ...


def place_singly(source: TileSource, number: int, targets: Sequence[Pixels]) -> dict[int, SlideReadError]:
    """Place the tiles of a block that could not be read at once, one by one.

    Returns:
        The error of each tile that cannot be decoded; none, where the damage lies between them.
    """
    bad = {}
    for tile, target in zip(source.blocks[number].tolist(), targets, strict=True):
        try:
            source.read_tile(tile, target)
        except SlideReadError as error:
            bad[tile] = error
    return bad


def bad_tiles(tiling: Tiling, bad: Mapping[int, SlideReadError]) -> Iterator[BadTile]:
    """What to record of the tiles that cannot be decoded, in order."""
    for tile, error in sorted(bad.items()):
        reason = str(error).removeprefix(f"slide {tiling.sample_id}: ")
        yield BadTile(int(tiling.x[tile]), int(tiling.y[tile]), reason)


def damaged(tiling: Tiling, bad: Mapping[int, SlideReadError]) -> SlideReadError:
    """The error of a slide some of whose tiles cannot be decoded."""
    places = [f"({tiling.x[tile]}, {tiling.y[tile]})" for tile in sorted(bad)]
    more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
    name = f"slide {tiling.sample_id}: "
    reason = str(next(iter(bad.values()))).removeprefix(name)
    tiles = "a tile" if len(bad) == 1 else f"{len(bad)} tiles"
    return SlideReadError(
        f"{name}{tiles} cannot be decoded, at level-0 px {', '.join(places[:_LISTED])}{more}: {reason}; "
        'on_bad_tile="skip" (--on-bad-tile skip) leaves such tiles out'
    )


def not_finite(tiling: Tiling, wrong: Mapping[int, bool], engine: Engine) -> NotFiniteError:
    """The error of a slide with embeddings that hold NaN or infinities.

    Args:
        wrong: tiles -> whether what the engine gave was finite, and only its cast to float16 is not.
    """
    first = min(wrong)
    if all(wrong.values()):
        what = 'as float16 they overflow: use output_dtype="fp32" (--output-dtype fp32)'
    else:
        by = "PyTorch" if engine.runtime == "torch" else engine.runtime
        what = f"{by} computed them in {engine.precision}: {remedy(engine.precision, engine.runtime)}"
    return NotFiniteError(
        f"slide {tiling.sample_id}: the embeddings of {len(wrong)} of {len(tiling)} tiles hold NaN or "
        f"infinities, the first that of tile {first} at level-0 px ({tiling.x[first]}, "
        f"{tiling.y[first]}); {what}"
    )


class SlideSource:
    """Supertiles of a slide. See `TileSource`.

    Args:
        closed: called when it is closed, to close the reader; None = close the reader, which is its own.
    """

    def __init__(
        self,
        reader: SlideReader,
        tiling: Tiling,
        *,
        grouped: bool = True,
        closed: Callable[[], None] | None = None,
    ) -> None:
        level = tiling.geometry.read_level
        self.reader, self.tiling = reader, tiling
        self._cut: Callable[..., None] = cut_tiles
        self._closed = closed or reader.close
        ratio, rest = divmod(tiling.geometry.read_tile_size_px, tiling.geometry.requested_tile_size_px)
        self.ratio = 1 if rest else ratio
        self._free: list[Pixels] = []
        #: Where its pixels come from if others cut tiles from them, too.
        self.shared: SharedLevel | None = None
        self._others: tuple[SlideReader, ...] = ()  # that it closes itself
        self._supertiles = plan_supertiles(
            tiling.x,
            tiling.y,
            tiling.geometry,
            reader.downsamples[level],
            file_tile=reader.tile_shapes[level],
            grouped=grouped,
        )
        self.backend = reader.backend
        self.blocks = [supertile.tiles for supertile in self._supertiles]

    def with_reader(self, reader: SlideReader, cut: Callable[..., None]) -> SlideSource:
        """The same tiles by another reader, cut by what takes its pixels; it closes both readers."""
        other = copy(self)
        other.reader, other._cut, other._others = reader, cut, (reader, *self._others)
        other.shared = self.shared = None  # what is left to the host would be decoded for all
        return other

    def of_tiles(self, tiles: NDArray[np.int64]) -> SlideSource:
        """Some of its tiles, (n,) ascending indices, by the same reader; not to be closed."""
        tiling = replace(
            self.tiling,
            x=self.tiling.x[tiles],
            y=self.tiling.y[tiles],
            tissue_fractions=self.tiling.tissue_fractions[tiles],
            regions=None,
        )
        other = SlideSource(self.reader, tiling)
        other._cut = self._cut
        return other

    def again(self, closed: Callable[[], None]) -> SlideSource:
        """The same tiles by the same reader, for somebody else, who closes it by itself."""
        other = copy(self)
        other._closed = closed
        return other

    def over(self, tiling: Tiling, *, grouped: bool) -> SlideSource:
        """Other tiles of the same slide, by the same reader."""
        return SlideSource(self.reader, tiling, grouped=grouped, closed=self._closed)

    def fetch(self, number: int) -> Any:
        """The pixels of a supertile, (h, w, 3) uint8, by how much they are reduced already, and the memory
        that `place` is to give back; or what is shared of it."""
        if self.shared is not None:
            return self.shared.fetch(self.squares(number))
        supertile, level = self._supertiles[number], self.tiling.geometry.read_level
        where = supertile.location_lv0, level, supertile.size
        if isinstance(self.reader, BufferedReader):
            # whole cells only, so that the supertile can be reduced at once
            ratio = 1 if (supertile.offsets % self.ratio).any() else self.ratio
            memory = self._memory(supertile.size[0] * supertile.size[1] * 3 // ratio**2)
            squares = supertile.offsets, self.tiling.geometry.read_tile_size_px
            pixels = self.reader.read_into(memory, *where, ratio, squares)
            if pixels is not None:
                return pixels, ratio, memory
            self._free.append(memory)
        return self.reader.read_region(*where), 1, None

    def squares(self, number: int) -> Squares:
        """The tiles of a block, px of the read level."""
        supertile, geometry = self._supertiles[number], self.tiling.geometry
        downsample = self.reader.downsamples[geometry.read_level]
        corner = floor_to_level(np.array(supertile.location_lv0), downsample)
        return corner + supertile.offsets, geometry.read_tile_size_px

    def _memory(self, size: int) -> Pixels:
        """Memory that `place` is done with, else new: to touch a page for the first time is dear."""
        try:
            found = self._free.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return found if found.size >= size else np.empty(size, np.uint8)

    def place(self, number: int, data: Any, targets: Sequence[Pixels]) -> None:
        """Cut the tiles out of a supertile, whose memory is used again."""
        if self.shared is not None:
            self._place_shared(self.shared, self.squares(number), data, targets)
            return
        pixels, ratio, memory = data
        size = self.tiling.geometry.read_tile_size_px
        self._cut(pixels, self._supertiles[number].offsets // ratio, size // ratio, targets)
        if memory is not None:
            self._free.append(memory)

    def _place_shared(
        self, shared: SharedLevel, squares: Squares, held: dict[Any, Chunk], targets: Sequence[Pixels]
    ) -> None:
        side = squares[1] // self.ratio
        try:
            for corner, target in zip(squares[0].tolist(), targets, strict=True):
                tile = target if len(target) == side else np.empty((side, side, 3), np.uint8)
                shared.cut(held, corner, self.ratio, tile)
                if tile is not target:
                    self._cut(tile, np.zeros((1, 2), np.int64), side, [target])
        finally:
            shared.done(held)

    def read_tile(self, tile: int, target: Pixels) -> None:
        """Read a tile by itself."""
        geometry = self.tiling.geometry
        size = geometry.read_tile_size_px
        location = int(self.tiling.x[tile]), int(self.tiling.y[tile])
        pixels = self.reader.read_region(location, geometry.read_level, (size, size))
        self._cut(pixels, np.zeros((1, 2), np.int64), size, [target])

    def close(self) -> None:
        """Close the slide."""
        for reader in self._others:
            reader.close()
        self._free.clear()
        self.shared = None
        self._closed()


def open_archive(path: Path, tiling: Tiling) -> TileSource:
    """The tiles of an archive, read by DALI where it and a GPU are there, else without: same pixels.

    On a CPU DALI is half as fast (3,500 to 4,900 tiles/s against 7,000 to 7,200 on two cores).
    """
    archive = TileArchive(path, tiling)
    if not torch.cuda.is_available() or dali_archive.unavailable() is not None:
        return archive
    side = tiling.geometry.requested_tile_size_px
    return dali_archive.DaliArchive(archive, tile_size_px=side, threads=min(_DALI_THREADS, job_cpus()))
