"""Tiles of a slide by other code than a run's: OpenSlide or tifffile, and area averaging by matrix products.

None of the readers, of the supertiles and of the cutting that fill a run's batches is used here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.readers import open_slide
from slide2vec.slides import Slide

__all__ = ["NoSecondReader", "SecondReader", "area_average", "second_readers"]

Pixels = NDArray[np.uint8]


class NoSecondReader(Exception):
    """No other reader opens the slide, or as the run saw it; says why."""


class SecondReader(ABC):
    """A slide, opened by a library directly.

    Attributes:
        name: of the library.
        dimensions: (width, height) of each level, px, level 0 first.
    """

    name: str
    dimensions: tuple[tuple[int, int], ...]

    def tile(self, x: int, y: int, level: int, downsample: float, side: int, size: int) -> Pixels:
        """(size, size, 3) uint8: a tile of `side` px of a level, area-averaged.

        Args:
            x, y: its corner in level-0 px.
            downsample: of the level, by which level-0 px are divided, and rounded down.
        """
        return area_average(
            self.read(int(x // downsample), int(y // downsample), level, downsample, side), size
        )

    def level_of(self, downsample: float) -> int:
        """The level that is so many times smaller than level 0, within 1 %.

        Raises:
            NoSecondReader: it sees none.
        """
        width = self.dimensions[0][0]
        for level, (across, _) in enumerate(self.dimensions):
            if abs(width / across / downsample - 1) <= 0.01:
                return level
        raise NoSecondReader(f"{self.name} sees no level {downsample:.4g} times smaller than level 0")

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    @abstractmethod
    def read(self, x: int, y: int, level: int, downsample: float, side: int) -> Pixels:
        """(side, side, 3) uint8 in px of a level, white beyond its edges."""


class _OpenSlide(SecondReader):
    name = "openslide"

    def __init__(self, path: Path) -> None:
        import openslide

        self._slide = openslide.OpenSlide(str(path))
        self.dimensions = tuple(self._slide.level_dimensions)

    def level_of(self, downsample: float) -> int:
        level = super().level_of(downsample)
        exact = self._slide.level_downsamples[level]
        if exact != round(exact):
            raise NoSecondReader(f"{self.name} interpolates on a level {exact:.6g} times smaller")
        return level

    def read(self, x: int, y: int, level: int, downsample: float, side: int) -> Pixels:
        import openslide

        location = round(x * downsample), round(y * downsample)
        try:
            found = np.asarray(self._slide.read_region(location, level, (side, side)))
        except openslide.OpenSlideError as error:
            raise NoSecondReader(f"OpenSlide cannot read level {level} at {location}: {error}") from error
        alpha = found[..., 3:].astype(np.float64) / 255
        over_white = found[..., :3] * alpha + 255 * (1 - alpha)
        return np.floor(over_white + 0.5).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


class _Tifffile(SecondReader):
    name = "tifffile"

    def __init__(self, path: Path) -> None:
        import tifffile

        self._tiff = tifffile.TiffFile(path)
        self._file = self._tiff.filehandle
        self._pages: list[Any] = [level.pages[0] for level in self._tiff.series[0].levels]
        for page in self._pages:
            if not page.is_tiled or page.samplesperpixel != 3 or page.dtype != np.uint8:
                self.close()
                raise NoSecondReader("it sees no tiles of three 8-bit colours")
        self.dimensions = tuple((page.imagewidth, page.imagelength) for page in self._pages)

    def read(self, x: int, y: int, level: int, downsample: float, side: int) -> Pixels:
        page = self._pages[level]
        wide, high, across = page.tilewidth, page.tilelength, -(-page.imagewidth // page.tilewidth)
        found = np.full((side, side, 3), 255, np.uint8)
        right, bottom = min(x + side, page.imagewidth), min(y + side, page.imagelength)
        for row in range(y // high, -(-bottom // high)):
            for column in range(x // wide, -(-right // wide)):
                pixels = self._segment(page, row * across + column)
                left, top = max(x, column * wide), max(y, row * high)
                until = min(right, (column + 1) * wide), min(bottom, (row + 1) * high)
                found[top - y : until[1] - y, left - x : until[0] - x] = pixels[
                    top - row * high : until[1] - row * high, left - column * wide : until[0] - column * wide
                ]
        return found

    def _segment(self, page: Any, index: int) -> Any:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return np.full((page.tilelength, page.tilewidth, 3), 255, np.uint8)
        self._file.seek(offset)
        compressed = self._file.read(count)  # first: looking up `decode` may read elsewhere in the file
        try:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            decoded = page.decode(compressed, index, **tables)[0]
        except Exception as error:  # of any of its codecs
            raise NoSecondReader(f"tifffile cannot decode its tile {index}: {error}") from error
        return decoded.reshape(decoded.shape[-3:])

    def close(self) -> None:
        self._tiff.close()


def second_readers(slide: Slide, backend: str) -> Iterator[Callable[[], SecondReader]]:
    """What opens a slide: first what its run, which read it with `backend`, did not read it with.

    Not OpenSlide where it is known to give other pixels than the file has.
    """
    kinds: list[type[_OpenSlide] | type[_Tifffile]] = [_OpenSlide, _Tifffile]
    if backend == _OpenSlide.name:
        kinds.reverse()
    for kind in kinds:
        yield partial(_opened, kind, slide)


def _opened(kind: type[_OpenSlide] | type[_Tifffile], slide: Slide) -> SecondReader:
    try:
        if kind is _OpenSlide:
            open_slide(slide, _OpenSlide.name).close()  # which refuses what OpenSlide misreads
        return kind(slide.image_path)
    except Exception as error:  # of any library, of any kind of file
        raise NoSecondReader(f"{kind.name}: {error}") from error


def area_average(pixels: Pixels, size: int) -> Pixels:
    """(S, S, 3) -> (size, size, 3) uint8: every pixel is the mean of the area that it covers, parts of
    pixels by their part, rounded half up."""
    side = len(pixels)
    if side == size:
        return pixels
    weights = _weights(side, size)
    rows = (weights @ pixels.reshape(side, -1)).reshape(size, side, 3)
    mean = weights @ rows
    averaged: Pixels = np.clip(np.floor(mean + 0.5), 0, 255).astype(np.uint8)
    return averaged


def _weights(side: int, size: int) -> NDArray[np.float64]:
    """(size, side): how much of each pixel every averaged one covers; rows sum to 1."""
    edges = np.arange(size + 1) * (side / size)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(side)[None, :]
    covered = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, None)
    return np.asarray(covered / (side / size))
