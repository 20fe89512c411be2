"""The grid of tiles over each piece of tissue, and how much tissue each tile holds."""

from __future__ import annotations

from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.geometry import TileGeometry
from slide2vec.tiling.types import TissueMask, TissuePiece

__all__ = ["Tiles", "coverage", "draw_piece", "tissue_tiles"]

Tiles: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
Ints: TypeAlias = NDArray[np.int64]


def tissue_tiles(
    tissue: TissueMask, geometry: TileGeometry, dimensions: tuple[int, int], threshold: float
) -> Tiles:
    """The tiles whose tissue fraction reaches `threshold`.

    Each piece of tissue has its own grid, anchored at its bounding box, and counts its own tissue
    only; of equal tiles of two pieces the one of the first piece is kept.

    Returns:
        x, y: (N,) int64, level-0 px, sorted by x, then y.
        tissue_fractions: (N,) float32.
    """
    found = [_piece_tiles(piece, tissue, geometry, dimensions, threshold) for piece in tissue.pieces]
    x, y, fractions = (
        np.concatenate([np.empty(0, dtype), *(tiles[i] for tiles in found)])
        for i, dtype in enumerate((np.int64, np.int64, np.float32))
    )
    order = np.lexsort((y, x))
    x, y, fractions = x[order], y[order], fractions[order]
    first = np.ones(len(x), bool)
    first[1:] = (np.diff(x) != 0) | (np.diff(y) != 0)
    return x[first], y[first], fractions[first]


def coverage(
    mask: NDArray[np.uint8], x: Ints, y: Ints, geometry: TileGeometry, dimensions: tuple[int, int]
) -> NDArray[np.float32]:
    """How much of each tile a mask covers, whatever piece it belongs to: (N,) float32.

    Args:
        mask: (h, w), above 0 where it covers.
        x, y: (N,) int64, level-0 px.
    """
    integral = np.asarray(cv2.integral((mask > 0).astype(np.uint8)), np.int32)
    spans, windows = [], []
    for axis, corners in enumerate((x, y)):
        scale = mask.shape[1 - axis] / dimensions[axis]
        windows.append(max(1, round(geometry.tile_size_lv0 * scale)))
        spans.append(_span(corners, scale, windows[-1], 0, mask.shape[1 - axis]))
    (x0, x1), (y0, y1) = spans
    counts = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    return np.asarray(counts / (windows[0] * windows[1]), np.float32)


def _piece_tiles(
    piece: TissuePiece,
    tissue: TissueMask,
    geometry: TileGeometry,
    dimensions: tuple[int, int],
    threshold: float,
) -> Tiles:
    low, high = piece.contour.min(axis=(0, 1)), piece.contour.max(axis=(0, 1))
    image = draw_piece(piece)
    integral = np.asarray(cv2.integral(image), np.int32)
    lines, spans, windows = [], [], []
    for axis in (0, 1):
        scale = tissue.mask.shape[1 - axis] / dimensions[axis]
        start, last = (int(edge * tissue.scale[axis]) for edge in (low[axis], high[axis]))
        line = np.arange(start, min(last + 1, dimensions[axis]), geometry.step_px_lv0, dtype=np.int64)
        window = max(1, round(geometry.tile_size_lv0 * scale))
        lines.append(line)
        spans.append(_span(line, scale, window, int(low[axis]), image.shape[1 - axis]))
        windows.append(window)
    fractions = _fractions(integral, spans[0], spans[1], windows[0] * windows[1])
    # Fractions have single precision; in double precision 0.7 is more than float32(0.7).
    columns, rows = np.nonzero(fractions >= np.float32(threshold))
    return lines[0][columns], lines[1][rows], fractions[columns, rows]


def draw_piece(piece: TissuePiece) -> NDArray[np.uint8]:
    """The piece alone, 1 on 0, in its bounding box of the mask; islands in its holes are not part of it."""
    x, y, width, height = cv2.boundingRect(piece.contour)
    image = np.zeros((height, width), np.uint8)
    offset = (-x, -y)
    cv2.drawContours(image, [piece.contour], -1, 1, thickness=cv2.FILLED, offset=offset)
    if piece.holes:
        cv2.drawContours(image, piece.holes, -1, 0, thickness=cv2.FILLED, offset=offset)
        # The outline of a hole is tissue.
        cv2.drawContours(image, piece.holes, -1, 1, thickness=1, offset=offset)
    return image


def _span(line: Ints, scale: float, window: int, origin: int, size: int) -> tuple[Ints, Ints]:
    """First and past-the-last pixel in the piece's image of tiles that begin at `line` (level 0)."""
    first = np.floor(line * scale).astype(np.int64) - origin
    return np.clip(first, 0, size), np.clip(first + window, 0, size)


def _fractions(
    integral: NDArray[np.int32], x: tuple[Ints, Ints], y: tuple[Ints, Ints], area: int
) -> NDArray[np.float32]:
    """Tissue fractions of a whole grid, (columns, rows) float32."""
    (x0, x1), (y0, y1) = x, y
    rows = integral[y1] - integral[y0]
    counts = (rows[:, x1] - rows[:, x0]).T
    return np.asarray(counts / area, np.float32)
