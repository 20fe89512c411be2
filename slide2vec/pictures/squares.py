"""Squares of a slide on a picture of it, each at its place to a fraction of a pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["lay_squares"]

Floats = NDArray[np.float32]


def lay_squares(
    shape: tuple[int, int],
    x: NDArray[np.integer[Any]],
    y: NDArray[np.integer[Any]],
    side_lv0: float,
    dimensions: tuple[int, int],
    colours: NDArray[np.floating[Any]],
) -> tuple[Floats, Floats]:
    """The colours of a slide's tiles on a picture of the whole slide.

    Where the edge of a tile runs through a pixel, the pixel has a share of it; where tiles overlap, the mean
    of their colours. A tile smaller than a pixel is drawn as large as one, about its centre.

    Args:
        shape: (height, width) of the picture.
        x, y: (N,) top-left corners of the tiles, level-0 px.
        side_lv0: of a tile, level-0 px.
        dimensions: (width, height) of the slide, level-0 px.
        colours: (N, C) float.

    Returns:
        (h, w, C) float32, the colours; and (h, w, 1) float32 from 0 to 1, how much of a pixel has one.
    """
    height, width = shape
    paint = np.zeros((height, width, colours.shape[1]), np.float32)
    covered = np.zeros((height, width, 1), np.float32)
    columns = _spans(np.asarray(x, np.float64), side_lv0, width / dimensions[0], width)
    rows = _spans(np.asarray(y, np.float64), side_lv0, height / dimensions[1], height)
    for colour, (left, across), (top, down) in zip(colours, columns, rows, strict=True):
        weights = (down[:, None] * across)[..., None]
        part = slice(top, top + len(down)), slice(left, left + len(across))
        paint[part] += weights * colour.astype(np.float32)
        covered[part] += weights
    paint /= np.maximum(covered, 1e-6)
    return paint, np.minimum(covered, 1.0)


def _spans(
    corners: NDArray[np.float64], side: float, scale: float, length: int
) -> list[tuple[int, NDArray[np.float32]]]:
    """Along one axis: the first pixel that each tile covers, and its share of that and the next ones."""
    low, high = corners * scale, (corners + side) * scale
    if side * scale < 1.0:
        low = np.clip((low + high) / 2 - 0.5, 0, max(0, length - 1))
        high = low + 1.0
    first = np.clip(np.floor(low), 0, length).astype(int)
    last = np.clip(np.ceil(high - 1e-9), 0, length).astype(int)
    found = []
    for start, stop, begin, end in zip(first.tolist(), last.tolist(), low, high, strict=True):
        pixels = np.arange(start, max(start, stop))
        shares = np.minimum(end, pixels + 1) - np.maximum(begin, pixels)
        found.append((start, shares.astype(np.float32)))
    return found
