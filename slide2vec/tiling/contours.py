"""From a tissue mask to the pieces of tissue that are tiled."""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.geometry import TileGeometry
from slide2vec.tiling.types import TissuePiece

__all__ = ["find_pieces", "smallest_area"]


def find_pieces(
    mask: NDArray[np.uint8], min_area: float
) -> tuple[tuple[TissuePiece, ...], tuple[float, ...]]:
    """The 8-connected pieces of a (h, w) uint8 mask whose outline minus holes is over `min_area` px, and the
    areas (px) of those whose is not."""
    found, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return (), ()
    outlines = [np.asarray(outline, np.int32) for outline in found]
    parents = np.asarray(hierarchy)[0, :, 3].tolist()
    holes: dict[int, list[NDArray[np.int32]]] = defaultdict(list)
    for outline, parent in zip(outlines, parents, strict=True):
        if parent != -1:
            holes[parent].append(outline)
    pieces, left_out = [], []
    for index, (outline, parent) in enumerate(zip(outlines, parents, strict=True)):
        if parent != -1:
            continue
        area = _area(outline, holes[index])
        if area > min_area:
            pieces.append(TissuePiece(outline, tuple(holes[index])))
        elif area > 0:
            left_out.append(area)
    return tuple(pieces), tuple(left_out)


def _area(outline: NDArray[np.int32], holes: list[NDArray[np.int32]]) -> float:
    area = cv2.contourArea(outline)
    # Most outlines are specks: do not measure the holes of those without area.
    return area - sum(cv2.contourArea(hole) for hole in holes) if area > 0 else 0.0


def smallest_area(
    a_t: float, ref_tile_size: int, geometry: TileGeometry, scale: tuple[float, float]
) -> float:
    """Area in px of the mask that a piece must exceed: `a_t` reference tiles at the read spacing.

    Args:
        ref_tile_size: side of the reference tile in px of the read level.
        scale: (x, y), level-0 px per px of the mask.
    """
    side_lv0 = ref_tile_size * (geometry.read_spacing_um / geometry.base_spacing_um)
    return a_t * int(side_lv0 / scale[0] * (side_lv0 / scale[1]))
