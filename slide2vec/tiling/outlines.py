"""Areas of a mask, and tiles, as features of GeoJSON in level-0 px: what `slide2vec.tiling.geojson` reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.tiling.grid import draw_piece
from slide2vec.tiling.types import Tiling, TissueMask

__all__ = ["mask_rings", "tile_features", "tissue_features"]

#: A corner between pixels, x and y; a ring of them, not closed.
Corner: TypeAlias = tuple[int, int]
Ring: TypeAlias = list[Corner]


def tissue_features(tissue: TissueMask, name: str, color: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A feature for each piece of tissue: its outline, along the edges of the mask's pixels, and its holes.

    Drawn again on a raster of the mask's size, they give the mask without the pieces that are not tiled.

    Args:
        name: of the class.
        color: of it, (red, green, blue).
    """
    for piece in tissue.pieces:
        left, top, width, height = cv2.boundingRect(piece.contour)
        part = tissue.mask[top : top + height, left : left + width]
        polygons = mask_rings((draw_piece(piece) > 0) & (part > 0))
        scaled = [[_closed(ring, (left, top), tissue.scale) for ring in rings] for rings in polygons]
        kind, found = ("Polygon", scaled[0]) if len(scaled) == 1 else ("MultiPolygon", scaled)
        yield _feature("annotation", {"type": kind, "coordinates": found}, name, color)


def tile_features(tiling: Tiling, name: str, color: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A square for each tile (or region), of QuPath's type "tile".

    Args:
        name, color: as for `tissue_features`.
    """
    side = tiling.geometry.tile_size_lv0
    for index, (x, y) in enumerate(zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        measured = {"tile_index": index, "tissue_fraction": float(tiling.tissue_fractions[index])}
        square = {"type": "Polygon", "coordinates": [ring]}
        yield _feature("tile", square, name, color, measurements=measured)


def _feature(
    kind: str, geometry: Mapping[str, Any], name: str, color: Sequence[int], **more: Any
) -> dict[str, Any]:
    classification = {"name": name, "color": list(color)}
    properties = {"objectType": kind, "classification": classification, **more}
    return {"type": "Feature", "geometry": dict(geometry), "properties": properties}


def _closed(ring: Ring, offset: Corner, scale: tuple[float, float]) -> list[list[float]]:
    points = [[(x + offset[0]) * scale[0], (y + offset[1]) * scale[1]] for x, y in ring]
    return [*points, points[0]]


def mask_rings(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """The polygons of a (h, w) mask, each as its outline and its holes, along the edges of pixels.

    Pixels that touch at a corner only are of two polygons; no ring meets itself, and rings of one polygon
    meet at corners at most, so that the polygons are valid.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    parts = np.asarray(labels, np.int32)
    shells: dict[int, list[Ring]] = defaultdict(list)
    holes: dict[int, list[Ring]] = defaultdict(list)
    for ring in _rings(mask):
        area = _area(ring)
        (shells if area > 0 else holes)[_part_beside(ring, parts)].append(ring)
    return [[*shells[part], *holes[part]] for part in range(1, count)]


def _rings(mask: NDArray[np.bool_]) -> Iterator[Ring]:
    """The edges of a mask as rings of corners, with the mask on the right of each (y points down); one that
    meets itself at a corner is cut there."""
    after = _edges(mask)
    for start in list(after):
        while start in after:
            yield from _rings_from(start, after)


def _rings_from(start: Corner, after: dict[Corner, list[Corner]]) -> Iterator[Ring]:
    """The rings of a way along edges, which are taken out, until it is back."""
    here, came = start, (0, 0)
    path: Ring = []
    places: dict[Corner, int] = {}
    while here in after:
        if here in places:  # it meets itself: what lies between is a ring
            yield _cut(path, places, here)
        places[here] = len(path)
        path.append(here)
        steps = after[here]
        step = steps[0] if len(steps) == 1 else _turn(steps, came)
        steps.remove(step)
        if not steps:
            del after[here]
        here, came = (here[0] + step[0], here[1] + step[1]), step
    yield _cut(path, places, here)


def _cut(path: Ring, places: dict[Corner, int], corner: Corner) -> Ring:
    """Take the part of a way that begins at a corner out of it."""
    ring = path[places[corner] :]
    del path[places[corner] :]
    for each in ring:
        del places[each]
    return _without_straight(ring)


def _edges(mask: NDArray[np.bool_]) -> dict[Corner, list[Corner]]:
    """From which corner edges lead in which direction: right above a pixel of the mask, down on its right,
    left below, up on its left."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    sides = (
        (~padded[:-2, 1:-1], (0, 0), (1, 0)),
        (~padded[1:-1, 2:], (1, 0), (0, 1)),
        (~padded[2:, 1:-1], (1, 1), (-1, 0)),
        (~padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    found: dict[Corner, list[Corner]] = {}
    for outside, (dx, dy), step in sides:
        for y, x in np.argwhere(inside & outside).tolist():
            found.setdefault((x + dx, y + dy), []).append(step)
    return found


def _turn(steps: list[Corner], came: Corner) -> Corner:
    """Of two ways on, the one around the same pixel: to the right."""
    right = (-came[1], came[0])
    return right if right in steps else steps[0]


def _without_straight(ring: Ring) -> Ring:
    """The corners at which a ring turns."""
    points = np.array(ring)
    came, goes = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = came[:, 0] * goes[:, 1] != came[:, 1] * goes[:, 0]
    return [(x, y) for x, y in points[turns].tolist()]


def _area(ring: Ring) -> float:
    x, y = np.array(ring).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _part_beside(ring: Ring, parts: NDArray[np.int32]) -> int:
    """The part that lies on the right of a ring's first edge."""
    (x0, y0), (x1, y1) = ring[:2]
    dx, dy = int(np.sign(x1 - x0)), int(np.sign(y1 - y0))
    # of the unit edge from the first corner: the pixel to its right
    x = x0 + (dx < 0) * -1 + (dy > 0) * -1
    y = y0 + (dx < 0) * -1 + (dy < 0) * -1
    return int(parts[y, x])
