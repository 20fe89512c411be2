"""From polygons to the labels of a raster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from slide2vec.labels import TISSUE
from slide2vec.tiling.geojson import Area

__all__ = ["draw_areas"]


def draw_areas(
    areas: Sequence[Area],
    labels: Mapping[str, Sequence[int]],
    size: tuple[int, int],
    dimensions: tuple[int, int],
) -> NDArray[np.uint8]:
    """A raster of the whole slide with the (first) value of each label where its areas are, 0 elsewhere.

    A pixel is in an area when its middle is. Where areas of several labels overlap, that of the later one of
    `labels` counts; one whose value is 0 takes away.

    Args:
        labels: label -> values.
        size: (width, height) of the raster, px.
        dimensions: (width, height) of level 0, px.

    Returns:
        (h, w) uint8.

    Raises:
        ValueError: an area's class is none of the labels, or an area is not on the slide.
    """
    named: dict[str, list[Area]] = {label: [] for label in labels}
    for _, feature in groupby(areas, key=lambda area: area.where):
        parts = list(feature)
        _check_on_slide(parts, dimensions)
        named[_label_of(parts[0], labels)] += parts
    raster = np.zeros((size[1], size[0]), np.uint8)
    scale = np.array(size) / np.array(dimensions)
    for label in sorted(labels, key=lambda label: labels[label][0] == 0):
        for area in named[label]:
            _fill(raster, [ring * scale for ring in area.rings], labels[label][0])
    return raster


def _label_of(area: Area, labels: Mapping[str, Sequence[int]]) -> str:
    """The label of an area's class, by its name or, where one fits, by its name in other letters' case."""
    listed = ", ".join(labels)
    if area.label is None:
        if TISSUE in labels:
            return TISSUE
        raise ValueError(f"{area.where} has no class; give it one of {listed} (masks.pixel_mapping)")
    if area.label in labels:
        return area.label
    alike = [label for label in labels if label.casefold() == area.label.casefold()]
    if len(alike) != 1:
        raise ValueError(
            f"{area.where} has the class {area.label!r}, and masks.pixel_mapping has {listed}: add it there, "
            "or classify it as one of these"
        )
    return alike[0]


def _check_on_slide(parts: Sequence[Area], dimensions: tuple[int, int]) -> None:
    low = np.min([area.rings[0].min(0) for area in parts], axis=0)
    high = np.max([area.rings[0].max(0) for area in parts], axis=0)
    if (low >= dimensions).any() or (high <= 0).any():
        raise ValueError(
            f"{parts[0].where} is not on the slide: x from {low[0]:g} to {high[0]:g}, y from {low[1]:g} to "
            f"{high[1]:g}, and the slide has {dimensions[0]}x{dimensions[1]} px; coordinates are px of level "
            "0: is it of another slide, or in µm?"
        )


def _fill(raster: NDArray[np.uint8], rings: Sequence[NDArray[np.float64]], value: int) -> None:
    """Give the pixels of a polygon a value. Each row changes between outside and inside where a ring crosses
    the line through the middles of its pixels."""
    points = np.concatenate(rings)
    limit = raster.shape[1], raster.shape[0]
    left, top = (max(0, int(low)) for low in np.floor(points.min(0)))
    right, bottom = (min(most, int(high)) for most, high in zip(limit, np.ceil(points.max(0)), strict=True))
    if right <= left or bottom <= top:
        return
    inside = np.zeros((bottom - top, right - left + 1), np.bool_)
    for ring in rings:
        rows, columns = _crossings(ring - (left, top), inside.shape[0], inside.shape[1] - 1)
        np.logical_xor.at(inside, (rows, columns), True)
    np.logical_xor.accumulate(inside, axis=1, out=inside)
    raster[top:bottom, left:right][inside[:, :-1]] = value


def _crossings(
    ring: NDArray[np.float64], height: int, width: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each row that an edge of a ring crosses, the row, and its first pixel whose middle is beyond."""
    start, end = ring, np.roll(ring, -1, axis=0)
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(np.intp) for y in (low, high))
    counts = last - first
    edge = np.repeat(np.arange(len(ring)), counts)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    along = (rows + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
    return rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.intp)
