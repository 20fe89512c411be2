"""What all readers share: a region's place in its level, and white around the slide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, floor
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError
from slide2vec.readers.probe import Probe

__all__ = ["PyramidReader", "to_level0"]


#: What libraries raise over damage beside what their documentation says.
_OF_LIBRARIES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)


class PyramidReader(ABC):
    """A SlideReader whose back end only has to read boxes that lie inside a level."""

    backend: str

    def __init__(self, probe: Probe, level_dimensions: Sequence[tuple[int, int]]) -> None:
        self.path, self.name, self.probe = probe.path, probe.name, probe
        self.level_dimensions = tuple((int(width), int(height)) for width, height in level_dimensions)
        self.dimensions = self.level_dimensions[0]
        self.downsamples = tuple(self.dimensions[0] / width for width, _ in self.level_dimensions)
        self.planning_levels = min(probe.planning or len(self.downsamples), len(self.downsamples))
        self.spacing_um, self.spacing_source = probe.spacing_um, probe.spacing_source
        self.claims = probe.claims
        known = len(probe.levels) >= len(self.level_dimensions)
        self.tile_shapes: tuple[tuple[int, int] | None, ...] = tuple(
            probe.levels[level].tile if known else None for level in range(len(self.level_dimensions))
        )

    @abstractmethod
    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """(height, width, 3) uint8 of a box in level px that lies inside the level; contiguous."""

    @abstractmethod
    def close(self) -> None:
        """Release the file. May be called twice."""

    def read_region(
        self, location_lv0: tuple[int, int], level: int, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """See `SlideReader.read_region`."""
        width, height = size
        if not 0 <= level < len(self.level_dimensions) or width < 1 or height < 1:
            raise SlideReadError(
                f"slide {self.name}: level {level}, size {width}x{height} cannot be read; it has the levels "
                f"0 to {len(self.level_dimensions) - 1}, and sizes are 1 or more"
            )
        x, y = self._corner(location_lv0, level)
        right, bottom = self.level_dimensions[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            return self._checked_box(level, x, y, width, height)
        canvas = self._canvas(height, width)
        if x0 < x1 and y0 < y1:
            canvas[y0 - y : y1 - y, x0 - x : x1 - x] = self._checked_box(level, x0, y0, x1 - x0, y1 - y0)
        return canvas  # type: ignore[no-any-return]

    def _checked_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """What `_read_box` gives; an error where it is of another shape, or a library raises its own."""
        with self._naming_errors(level, x, y):
            pixels = self._read_box(level, x, y, width, height)
        if tuple(pixels.shape) != (height, width, 3):
            raise self._read_error(level, x, y, f"pixels of shape {tuple(pixels.shape)} came out")
        return pixels

    @contextmanager
    def _naming_errors(self, level: int, x: int, y: int) -> Iterator[None]:
        """What a library raises of its own becomes an error of the slide at that place."""
        try:
            yield
        except SlideReadError:
            raise
        except _OF_LIBRARIES as error:
            raise self._read_error(level, x, y, error) from error

    def _corner(self, location_lv0: tuple[int, int], level: int) -> tuple[int, int]:
        """(x, y) in px of a level."""
        x, y = (floor(start / self.downsamples[level]) for start in location_lv0)
        return x, y

    def _canvas(self, height: int, width: int) -> Any:
        """White pixels, of the kind that `_read_box` gives."""
        return np.full((height, width, 3), 255, np.uint8)

    def _read_error(self, level: int, x: int, y: int, why: object) -> SlideReadError:
        at = (round(x * self.downsamples[level]), round(y * self.downsamples[level]))
        return SlideReadError(
            f"slide {self.name}: {self.backend} cannot decode level {level} at {at} (level-0 px): {why}. "
            f"The file may be damaged: {self.probe.origin}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def to_level0(pixel: int, downsample: float) -> int:
    """A level-0 coordinate that a library which floors coordinate / downsample takes to `pixel`.

    It lies near the middle of those that do, so that a library's rounding (cuCIM divides in
    single precision) does not matter.
    """
    return max(ceil(pixel * downsample), floor((pixel + 0.5) * downsample)) if downsample > 1 else pixel
