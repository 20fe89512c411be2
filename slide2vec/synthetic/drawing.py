"""Drawing on seamless squares: noise, scattered points, outlines, cells, in pixels of 0.25 µm."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PAD",
    "SIZE",
    "Canvas",
    "Plane",
    "Points",
    "fill",
    "noise",
    "outline",
    "outlines",
    "resampled",
    "scatter",
    "slope",
    "step",
    "unit",
    "value_at",
    "voronoi",
    "warp_rows",
    "waves_along_x",
    "white_spectrum",
]

SIZE = 2048
PAD = 128  # no nucleus or red cell reaches further than this over the seam

Plane: TypeAlias = NDArray[Any]  # (SIZE, SIZE) float32
Points: TypeAlias = NDArray[Any]  # (N, 2) float64 x, y in px, or one (2,)


class Canvas:
    """A seamless uint8 canvas: what is drawn across an edge comes back at the opposite one."""

    def __init__(self) -> None:
        side = SIZE + 2 * PAD
        self._pixels = np.zeros((side, side), np.uint8)

    def polygon(self, centre: Points, shape: Points, value: float, rim: float | None = None) -> None:
        """A filled outline (N, 2) px around a centre, value 0 to 1, with a darker or lighter rim."""
        for origin in _copies(centre):
            points = ((shape + origin) * 16).astype(np.int32)
            cv2.fillPoly(self._pixels, [points], round(200 * value), cv2.LINE_AA, 4)
            if rim is not None:
                cv2.polylines(self._pixels, [points], True, round(200 * rim), 1, cv2.LINE_AA, 4)

    def disc(self, centre: Points, radius: float, value: float) -> None:
        """A filled disc."""
        for x, y in _copies(centre):
            cv2.circle(
                self._pixels,
                (round(x * 16), round(y * 16)),
                round(radius * 16),
                round(200 * value),
                -1,
                16,
                4,
            )

    def plane(self, blur: float) -> Plane:
        """(S, S) float32 of what was drawn, blurred by `blur` px."""
        soft = cv2.GaussianBlur(self._pixels, (0, 0), blur)
        return soft[PAD:-PAD, PAD:-PAD].astype(np.float32) / 200


def _copies(centre: Points) -> list[tuple[float, float]]:
    """Where to draw, in padded coordinates, so that the cropped canvas has no seam."""
    x, y = (float(value) % SIZE + PAD for value in centre)
    columns, rows = (
        [v + shift for shift in (0, -SIZE, SIZE) if 0 < v + shift < SIZE + 2 * PAD] for v in (x, y)
    )
    return [(column, row) for column in columns for row in rows]


def fill(plane: Plane, centre: Points, shape: Points, value: float) -> None:
    """Set a (large) outline to a value, seamlessly and with a soft edge."""
    low, high = np.floor(shape.min(0)) - 6, np.ceil(shape.max(0)) + 6
    mask = np.zeros((int(high[1] - low[1]), int(high[0] - low[0])), np.uint8)
    cv2.fillPoly(mask, [np.round((shape - low) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    alpha = cv2.GaussianBlur(mask, (0, 0), 1.5).astype(np.float32) / 255
    rows = (np.arange(mask.shape[0]) + int(centre[1] + low[1])) % SIZE
    columns = (np.arange(mask.shape[1]) + int(centre[0] + low[0])) % SIZE
    where = np.ix_(rows, columns)
    plane[where] = plane[where] * (1 - alpha) + value * alpha


def outline(rng: np.random.Generator, a: float, b: float, angle: float, points: int, rough: float) -> Points:
    """A closed, irregular ellipse (points, 2) around the origin."""
    shape: Points = outlines(rng, np.array([a]), np.array([b]), np.array([angle]), points, rough)[0]
    return shape


def outlines(
    rng: np.random.Generator, a: Points, b: Points, angle: Points, points: int, rough: float
) -> Points:
    """Closed, irregular ellipses (N, points, 2) around the origin, of half axes and directions (N,)."""
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = np.ones((len(a), points))
    for order in (2, 3, 4, 5):
        height, phase = rng.normal(0, rough / np.sqrt(order - 1), len(a)), rng.uniform(0, 2 * np.pi, len(a))
        radius += height[:, None] * np.cos(order * t + phase[:, None])
    x, y = a[:, None] * radius * np.cos(t), b[:, None] * radius * np.sin(t)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1)


def resampled(shape: Points, count: int) -> Points:
    """`count` points at equal distances along a closed outline."""
    closed = np.vstack([shape, shape[:1]])
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    at = np.linspace(0, length[-1], count, endpoint=False)
    return np.stack([np.interp(at, length, closed[:, axis]) for axis in (0, 1)], axis=1)


def scatter(rng: np.random.Generator, spacing: float, jitter: float = 0.9) -> Points:
    """Irregular points (N, 2), about `spacing` px apart, on a jittered grid of staggered rows."""
    count = round(SIZE / spacing / 2) * 2
    step = SIZE / count
    rows, columns = np.mgrid[0:count, 0:count]
    points = np.stack([columns + 0.5 * (rows % 2), rows], axis=-1).reshape(-1, 2).astype(np.float64)
    return np.mod((points + jitter * rng.uniform(-0.5, 0.5, points.shape)) * step, SIZE)


def voronoi(rng: np.random.Generator, spacing: float, jitter: float) -> Plane:
    """Voronoi cells: (S, S) float32, about the distance to the nearest border in px."""
    seeds = scatter(rng, spacing, jitter)
    grid = np.arange(0, SIZE, 4, dtype=np.float32)
    first = np.full((len(grid), len(grid)), np.inf, np.float32)
    second = first.copy()
    for x, y in seeds:
        dx, dy = (np.abs((grid - v + SIZE / 2) % SIZE - SIZE / 2) for v in (x, y))
        distance = np.hypot(dx[None, :], dy[:, None])
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    return _enlarged((second - first) / 2, 4)


def noise(rng: np.random.Generator, sx: float, sy: float) -> Plane:
    """(S, S) float32 seamless Gaussian noise, zero mean and unit variance, correlated over sx, sy px."""
    return np.roll(_smooth_noise(sx, sy), tuple(rng.integers(0, SIZE, 2)), axis=(0, 1))


@functools.lru_cache(maxsize=6)
def _smooth_noise(sx: float, sy: float) -> Plane:
    along_x = np.exp(-2 * (np.pi * sx * np.fft.rfftfreq(SIZE)) ** 2).astype(np.float32)
    along_y = np.exp(-2 * (np.pi * sy * np.fft.fftfreq(SIZE)) ** 2).astype(np.float32)
    return unit(np.fft.irfft2(white_spectrum() * along_x * along_y[:, None]))


@functools.lru_cache(maxsize=1)
def white_spectrum() -> NDArray[np.complexfloating[Any, Any]]:
    """Of white noise: one is enough, since every use is shifted to a place of its own."""
    return np.fft.rfft2(np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32))


def _enlarged(plane: Plane, factor: int) -> Plane:
    """A seamless plane enlarged without creating a seam."""
    padded = np.pad(plane, 4, mode="wrap")
    large = cv2.resize(padded, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return large[4 * factor : -4 * factor, 4 * factor : -4 * factor]


def unit(plane: Plane) -> Plane:
    scaled: Plane = (plane - plane.mean()) / plane.std()
    return scaled.astype(np.float32, copy=False)


def step(plane: Plane) -> Plane:
    """A soft step: 0 below 0, 1 above 1."""
    clipped: Plane = np.clip(plane, 0.0, 1.0, dtype=np.float32)
    return clipped


def waves_along_x(rng: np.random.Generator, height: float) -> Plane:
    """(S, S) float32 vertical displacements of fibres in px."""
    return height * noise(rng, 100, 60) + 0.25 * height * noise(rng, 36, 40)


def warp_rows(plane: Plane, waves: Plane) -> Plane:
    """The plane with every pixel taken from `waves` px below, seamlessly."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return cv2.remap(plane, x, np.mod(y + waves, SIZE), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def slope(waves: Plane, points: Points) -> Points:
    """Direction of the fibres at points (N, 2), radians."""
    rise = np.roll(waves, -8, axis=1) - np.roll(waves, 8, axis=1)
    return -np.arctan(value_at(rise, points) / 16).astype(np.float64)


def value_at(plane: Plane, points: Points) -> Plane:
    """Values of a plane at points (N, 2), nearest pixel."""
    x, y = np.round(points).astype(int).T % SIZE
    values: Plane = plane[y, x]
    return values
