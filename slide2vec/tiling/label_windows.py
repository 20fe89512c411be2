"""Labels of a slide from a segmenter that looks at windows: at its own µm/px, a few in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil, sqrt
from typing import Protocol, TypeAlias, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.readers import SlideReader
from slide2vec.readers.pyramid import to_level0
from slide2vec.tiling.previews import thumbnail_level

__all__ = ["LabelMap", "ReadWindow", "WindowSegmenter", "label_map", "slide_windows"]

Plane: TypeAlias = NDArray[np.uint8]
#: (left, top) of a window, px at the segmenter's spacing -> (side, side, 3) uint8, white beyond the slide.
ReadWindow: TypeAlias = Callable[[int, int], Plane]

#: Neighbouring windows overlap by twice so much, px: a pixel has at least so much around it, but for those at
#: the slide's edge.
MARGIN_PX = 64


@runtime_checkable
class WindowSegmenter(Protocol):
    """What labels windows.

    Attributes:
        names: of the labels, by their numbers.
        spacing_um: µm/px of the windows.
        window_px: their side.
        batch_windows: how many at once.
    """

    names: tuple[str, ...]
    spacing_um: float
    window_px: int
    batch_windows: int

    def label(self, windows: Plane) -> Plane:
        """(B, side, side, 3) uint8 RGB -> (B, side, side) uint8."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Labels of a slide.

    Attributes:
        labels: (h, w) uint8, of every `step`-th pixel along both axes at the segmenter's spacing.
        overview: (h', w', 3) uint8, RGB at every `overview_step`-th of the labels.
    """

    labels: Plane
    step: int
    overview: Plane
    overview_step: int


@dataclass(frozen=True)
class _Part:
    """Along an axis: where a window begins, and from where to where its labels are taken, px."""

    start: int
    first: int
    last: int


def label_map(
    segmenter: WindowSegmenter,
    size: tuple[int, int],
    read: ReadWindow,
    *,
    most_px: int,
    most_overview_px: int,
    wanted: Callable[[int, int], bool] = lambda left, top: True,
) -> LabelMap:
    """Label a slide window by window; where windows overlap, a pixel has the label of the one whose edge is
    farther away.

    Args:
        size: (width, height) of the slide at the segmenter's spacing, px.
        most_px, most_overview_px: of the labels and of the overview, about.
        wanted: whether the window at (left, top) px is to be looked at; what is not has label 0.
    """
    width, height = size
    step = max(1, ceil(sqrt(width * height / most_px)))
    labels = np.zeros((ceil(height / step), ceil(width / step)), np.uint8)
    rougher = max(1, ceil(sqrt(labels.size / most_overview_px)))
    overview = np.full((ceil(labels.shape[0] / rougher), ceil(labels.shape[1] / rougher), 3), 255, np.uint8)
    windows = _windows(size, segmenter.window_px, wanted)
    while some := tuple(islice(windows, segmenter.batch_windows)):
        pixels = np.stack([read(column.start, row.start) for row, column in some])
        for (row, column), window, found in zip(some, pixels, segmenter.label(pixels), strict=True):
            _paste(labels, found, row, column, step)
            _paste(overview, window, row, column, step * rougher)
    return LabelMap(labels, step, overview, rougher)


def _windows(
    size: tuple[int, int], side: int, wanted: Callable[[int, int], bool]
) -> Iterator[tuple[_Part, _Part]]:
    columns, rows = (_parts(length, side) for length in size)
    for row in rows:
        for column in columns:
            if wanted(column.start, row.start):
                yield row, column


def _parts(length: int, side: int) -> list[_Part]:
    if length <= side:
        return [_Part(0, 0, length)]
    margin = min(MARGIN_PX, side // 4)
    starts = [*range(0, length - side, side - 2 * margin), length - side]
    cuts = [0, *((before + after + side) // 2 for before, after in pairwise(starts)), length]
    return [_Part(*each) for each in zip(starts, cuts, cuts[1:], strict=False)]


def _paste(target: Plane, window: Plane, row: _Part, column: _Part, step: int) -> None:
    """Put every `step`-th pixel of the slide that a window has the say of where it belongs."""
    rows, columns = (slice(ceil(part.first / step), ceil(part.last / step)) for part in (row, column))
    of_rows, of_columns = (
        slice(own.start * step - part.start, part.last - part.start, step)
        for own, part in ((rows, row), (columns, column))
    )
    target[rows, columns] = window[of_rows, of_columns]


def slide_windows(reader: SlideReader, downsample: float, side: int) -> tuple[tuple[int, int], ReadWindow]:
    """The size of a slide reduced by `downsample` (below 1: enlarged), (width, height) px, and what reads
    windows of it.

    The windows raise SlideReadError where pixels cannot be decoded.
    """
    width, height = (max(1, round(length / downsample)) for length in reader.dimensions)
    level = thumbnail_level(reader, max(1.0, downsample))
    own = reader.downsamples[level]
    factor = downsample / own
    read_px = max(1, round(side * factor))

    def read(left: int, top: int) -> Plane:
        corner = to_level0(round(left * factor), own), to_level0(round(top * factor), own)
        pixels = reader.read_region(corner, level, (read_px, read_px))
        if read_px == side:
            return pixels
        way = cv2.INTER_AREA if read_px > side else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(pixels, (side, side), interpolation=way), np.uint8)

    return (width, height), read
