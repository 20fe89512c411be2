"""A reader over arrays, and settings, for the tests of the tiling room."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import PreprocessingConfig
from slide2vec.slides import Slide

WHITE = (244, 243, 245)
TISSUE = (190, 120, 185)


class ArrayReader:
    """A SlideReader over the levels of a pyramid in memory; counts the pixels it has given."""

    backend = "array"
    spacing_source = "none"

    def __init__(
        self,
        levels: Sequence[NDArray[np.uint8]],
        *,
        spacing_um: float | None = 0.25,
        downsamples: Sequence[float] | None = None,
    ) -> None:
        self._levels = levels
        self.level_dimensions = tuple((level.shape[1], level.shape[0]) for level in levels)
        self.dimensions = self.level_dimensions[0]
        widths = (self.dimensions[0] / width for width, _ in self.level_dimensions)
        self.downsamples = tuple(downsamples or widths)
        self.tile_shapes = (None,) * len(levels)
        self.spacing_um = spacing_um
        self.largest_read_px = 0

    def read_region(
        self, location_lv0: tuple[int, int], level: int, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        self.largest_read_px = max(self.largest_read_px, size[0] * size[1])
        x, y = (floor(start / self.downsamples[level]) for start in location_lv0)
        region = np.full((size[1], size[0], 3), 255, np.uint8)
        x0, y0 = max(x, 0), max(y, 0)
        part = self._levels[level][y0 : max(y + size[1], 0), x0 : max(x + size[0], 0)]
        region[y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part
        return region

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def blank(width: int, height: int, *tissue: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """White with rectangles of tissue, (x, y, width, height) each."""
    image = np.full((height, width, 3), WHITE, np.uint8)
    for x, y, w, h in tissue:
        image[y : y + h, x : x + w] = TISSUE
    return image


def settings(**changes: Any) -> PreprocessingConfig:
    """224 px tiles at 0.5 µm/px, small pieces of tissue included, no closing, unless changed."""
    values: dict[str, Any] = {
        "requested_spacing_um": 0.5,
        "requested_tile_size_px": 224,
        "segmentation": {"close": 0},
        "filtering": {"a_t": 0},
    }
    return PreprocessingConfig(**{**values, **changes})


def a_slide(**changes: Any) -> Slide:
    values: dict[str, Any] = {"sample_id": "s", "image_path": Path("s.tiff")}
    return Slide(**{**values, **changes})
