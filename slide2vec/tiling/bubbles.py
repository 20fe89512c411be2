"""Air bubbles under the coverslip: what thin, dark, elliptic rims on bare glass enclose.

Ellipses are fitted to the rims by random samples (Fischler and Bolles, Commun ACM 1981; 24: 381-395), since
fibres, dust and other rims cross them; those over tissue are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["find_bubbles"]

Plane: TypeAlias = NDArray[Any]

#: The rim is so much denser than what is beside it, within so many µm.
RIM, RIM_UM = 0.02, 100.0
#: Least radius of a bubble, µm; how far its rim is from a circle and from an ellipse, as a share of the
#: radius.
RADIUS_UM, OFF_CIRCLE, OFF_ELLIPSE = 250.0, 0.12, 0.05
#: Directions in which a rim is looked for, the share of those not over tissue in which it has to be, and of
#: all.
DIRECTIONS, SEEN, SEEN_OF_ALL = 72, 0.7, 0.35
_TRIES, _MOST_POINTS, _MOST_BUBBLES = 300, 2000, 6


class _Ellipse(NamedTuple):
    centre: tuple[float, float]
    axes: tuple[float, float]
    angle: float

    def polar(self, points: Plane) -> tuple[Plane, Plane]:
        """Direction and distance from the centre, in radii, of points (N, 2)."""
        turn = np.deg2rad(self.angle)
        turned = (points - self.centre) @ np.array(
            [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        )
        x, y = (2 * turned / np.array(self.axes)).T
        return np.arctan2(y, x), np.hypot(x, y)

    def rim(self) -> Plane:
        """(DIRECTIONS, 2) points on it."""
        ends = (round(self.axes[0] / 2), round(self.axes[1] / 2))
        centre = (round(self.centre[0]), round(self.centre[1]))
        points = cv2.ellipse2Poly(centre, ends, round(self.angle), 0, 360, 360 // DIRECTIONS)
        return np.asarray(points)[:DIRECTIONS]


def find_bubbles(density: tuple[Plane, ...], without: Plane, spacing_um: float) -> NDArray[np.bool_]:
    """Where bubbles are.

    Args:
        density: optical densities for red, green and blue light, (H, W) float32 each.
        without: (H, W) bool, where rims cannot be seen.
        spacing_um: µm/px.

    Returns:
        (H, W) bool.
    """
    factor = max(1.0, 16 / spacing_um)
    height, width = without.shape
    size = max(1, round(width / factor)), max(1, round(height / factor))
    least = np.minimum(np.minimum(density[0], density[1]), density[2])
    grey = cv2.resize(least, size, interpolation=cv2.INTER_AREA)
    hidden = cv2.resize(without.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    found = np.zeros(grey.shape, np.uint8)
    for ellipse in _ellipses(grey, hidden, spacing_um * factor):
        cv2.ellipse(found, ellipse, 1, -1)
    return np.asarray(cv2.resize(found, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def _ellipses(grey: Plane, hidden: Plane, spacing_um: float) -> Iterator[_Ellipse]:
    side = max(3, round(RIM_UM / spacing_um) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    rim = (cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, kernel) > RIM) & ~hidden
    count, labels, stats, _ = cv2.connectedComponentsWithStats(rim.astype(np.uint8), connectivity=8)
    spans = np.asarray(stats)[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(1)
    rng = np.random.default_rng(0)
    for index in range(1, count):
        if spans[index] * spacing_um < RADIUS_UM:
            continue
        points = np.argwhere(labels == index)[:, ::-1].astype(np.float32)
        for _ in range(_MOST_BUBBLES):
            ellipse = _best(rng, points, hidden, RADIUS_UM / spacing_um)
            if ellipse is None:
                break
            yield ellipse
            points = points[np.abs(ellipse.polar(points)[1] - 1) > 2 * OFF_ELLIPSE]


def _best(rng: np.random.Generator, points: Plane, hidden: Plane, least_px: float) -> _Ellipse | None:
    """The ellipse that most points lie on; None where none has enough."""
    if len(points) < DIRECTIONS // 4:
        return None
    some = points[rng.choice(len(points), min(len(points), _MOST_POINTS), replace=False)]
    best, most = None, 0
    for triple in some[rng.integers(len(some), size=(_TRIES, 3))]:
        centre, radius = _circle(triple)
        if not least_px <= radius <= max(hidden.shape):
            continue
        near = np.abs(np.hypot(*(some - centre).T) - radius) < OFF_CIRCLE * radius
        if near.sum() > most:
            best, most = (centre, radius), int(near.sum())
    if best is None:
        return None
    near = np.abs(np.hypot(*(points - best[0]).T) - best[1]) < OFF_CIRCLE * best[1]
    for _ in range(3):
        if near.sum() < 6:
            return None
        ellipse = _fitted(points[near])
        if not (2 * least_px <= min(ellipse.axes) and max(ellipse.axes) < 1.6 * min(ellipse.axes)):
            return None
        near = np.abs(ellipse.polar(points)[1] - 1) < OFF_ELLIPSE
    return ellipse if _seen(ellipse, points[near], hidden) else None


def _fitted(points: Plane) -> _Ellipse:
    (x, y), (width, height), angle = cv2.fitEllipse(points)
    return _Ellipse((x, y), (width, height), angle)


def _circle(triple: Plane) -> tuple[Plane, float]:
    """Centre and radius of the circle through three points; no radius where they are on a line."""
    (ax, ay), (bx, by), (cx, cy) = np.asarray(triple, np.float64)
    twice = 2 * ((bx - ax) * (cy - ay) - (cx - ax) * (by - ay))
    if abs(twice) < 1e-6:
        return np.zeros(2), 0.0
    b, c = (bx - ax) ** 2 + (by - ay) ** 2, (cx - ax) ** 2 + (cy - ay) ** 2
    x, y = ((cy - ay) * b - (by - ay) * c) / twice, ((bx - ax) * c - (cx - ax) * b) / twice
    return np.array([ax + x, ay + y]), float(np.hypot(x, y))


def _seen(ellipse: _Ellipse, points: Plane, hidden: Plane) -> bool:
    """Whether there are points in most directions in which the rim could be seen."""
    height, width = hidden.shape
    x, y = ellipse.rim().T
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    visible = int(np.count_nonzero(~hidden[y[inside], x[inside]]))
    if not len(points):
        return False
    hit = len(np.unique(np.floor(ellipse.polar(points)[0] * DIRECTIONS / (2 * np.pi))))
    return hit >= SEEN_OF_ALL * DIRECTIONS and hit >= SEEN * visible
