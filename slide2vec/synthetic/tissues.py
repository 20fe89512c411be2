"""A library of tissue textures: stain concentrations of stroma, tumour, glands, …, that tile seamlessly.

Every texture is (S, S, 3) uint8: concentrations of haematoxylin, eosin and red-cell pigment times
`CONCENTRATION_SCALE`, drawn at `TEXTURE_SPACING_UM`. It repeats without a seam in both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.synthetic.drawing import (
    PAD,
    SIZE,
    Canvas,
    Plane,
    Points,
    fill,
    noise,
    outline,
    outlines,
    resampled,
    scatter,
    slope,
    step,
    unit,
    value_at,
    voronoi,
    warp_rows,
    waves_along_x,
)

__all__ = ["CONCENTRATION_SCALE", "TEXTURE_SPACING_UM", "TISSUES", "detail_noise", "tissue_textures"]

#: In the order of the labels of a slide's layout; the first is what lies between the others.
TISSUES = ("stroma", "muscle", "fat", "glands", "tumour", "lymphoid", "blood")
TEXTURE_SPACING_UM = 0.25
CONCENTRATION_SCALE = 90.0

Ring: TypeAlias = tuple[Points, Points]  # points and directions in radians
Texture: TypeAlias = NDArray[Any]  # (S, S, 3) uint8


@functools.lru_cache(maxsize=4)
def tissue_textures(spacing_um: float) -> tuple[Texture, ...]:
    """The texture of every tissue of `TISSUES` at a spacing in µm/px, (S, S, 3) uint8 each."""
    side = max(64, round(SIZE * TEXTURE_SPACING_UM / spacing_um))
    if side == SIZE:
        return _full_resolution()
    return tuple(cv2.resize(t, (side, side), interpolation=cv2.INTER_AREA) for t in _full_resolution())


@functools.lru_cache(maxsize=1)
def detail_noise() -> Plane:
    """(S, S) float32 seamless noise of several octaves, unit variance: what frays outlines."""
    rng = np.random.default_rng(7)
    octaves = [noise(rng, reach, reach) * reach**0.7 for reach in (2.5, 6.0, 16.0, 40.0)]
    return unit(np.sum(octaves, axis=0))


@functools.lru_cache(maxsize=1)
def _full_resolution() -> tuple[Texture, ...]:
    painters: dict[str, Callable[[np.random.Generator], Texture]] = {
        "stroma": _stroma,
        "muscle": _muscle,
        "fat": _fat,
        "glands": _glands,
        "tumour": _tumour,
        "lymphoid": _lymphoid,
        "blood": _blood,
    }
    # one after the other: thousands of short OpenCV calls from several threads wait for each other
    return tuple(painters[name](np.random.default_rng(i)) for i, name in enumerate(TISSUES))


def _stroma(rng: np.random.Generator) -> Texture:
    waves = waves_along_x(rng, 30.0)
    h, e, b = _fibres(rng, waves, eosin=0.78, clefts=0.9)
    points = scatter(rng, 74)
    _paint_nuclei(h, rng, points, (13.0, 3.6), angles=slope(waves, points), dark=1.5)
    lymphocytes = scatter(rng, 150)
    _paint_nuclei(h, rng, lymphocytes, (9.0, 8.0), dark=1.7)
    linings = [_vessel(rng, h, e, b, centre) for centre in scatter(rng, 620)]
    _paint_rings(h, rng, linings, (10.0, 3.2), dark=1.5)
    return _texture(rng, h, e, b)


def _muscle(rng: np.random.Generator) -> Texture:
    waves = waves_along_x(rng, 9.0)
    h, e, b = _fibres(rng, waves, eosin=1.0, clefts=0.22)
    h += 0.10
    points = scatter(rng, 66)
    _paint_nuclei(h, rng, points, (20.0, 4.6), angles=slope(waves, points), dark=1.25)
    return _texture(rng, h, e, b)


def _fat(rng: np.random.Generator) -> Texture:
    gap = cv2.blur(np.pad(voronoi(rng, 250, jitter=0.75), 32, mode="wrap"), (33, 33))[32:-32, 32:-32]
    wall = step((10.5 + 1.5 * noise(rng, 20, 20) - gap) / 4.0)
    e = 0.75 * wall * (0.8 + 0.25 * noise(rng, 3, 3))
    h = 0.12 * wall
    b = np.zeros_like(e)
    points = scatter(rng, 90)
    on_wall = points[value_at(wall, points) > 0.5]
    _paint_nuclei(h, rng, on_wall, (11.0, 4.0), dark=1.4)
    return _texture(rng, h, e, b)


def _glands(rng: np.random.Generator) -> Texture:
    h, e, b = _fibres(rng, waves_along_x(rng, 30.0), eosin=0.5, clefts=0.4)
    _paint_nuclei(h, rng, scatter(rng, 46), (9.0, 6.5), dark=1.55)
    linings = [_gland(rng, h, e, b, centre) for centre in scatter(rng, 340, jitter=0.22)]
    _paint_rings(h, rng, linings, (15.0, 7.0), dark=1.4)
    return _texture(rng, h, e, b)


def _tumour(rng: np.random.Generator) -> Texture:
    gap = voronoi(rng, 420, jitter=0.9)
    nest = step((gap + 14 * noise(rng, 12, 12) - 34) / 6.0)
    h, e, b = _fibres(rng, waves_along_x(rng, 30.0), eosin=0.6, clefts=0.5)
    h = h * (1 - nest) + nest * (0.30 + 0.05 * noise(rng, 6, 6))
    e = e * (1 - nest) + nest * (0.52 + 0.07 * noise(rng, 10, 10))
    points = scatter(rng, 37, jitter=0.75)
    inside = value_at(nest, points) > 0.5
    cells = points[inside]
    _membranes(e, cells, nest)
    _paint_nuclei(h, rng, points[~inside], (11.0, 4.0), dark=1.5)
    _paint_nuclei(h, rng, cells, (14.0, 10.5), dark=1.25, spread=0.22, nucleoli=True)
    return _texture(rng, h, e, b)


def _lymphoid(rng: np.random.Generator) -> Texture:
    pale = unit(noise(rng, 80, 80))
    e = 0.30 + 0.06 * noise(rng, 6, 6)
    h = 0.22 + 0.05 * noise(rng, 4, 4)
    b = np.zeros_like(e)
    points = scatter(rng, 23, jitter=0.8)
    keep = rng.random(len(points)) < 0.93 - 0.22 * np.clip(value_at(pale, points), 0, 2)
    _paint_nuclei(h, rng, points[keep], (9.2, 8.4), dark=1.7, spread=0.12)
    return _texture(rng, h, e, b)


def _blood(rng: np.random.Generator) -> Texture:
    shape = (SIZE, SIZE)
    h, e, b = (
        np.full(shape, 0.02, np.float32),
        np.full(shape, 0.10, np.float32),
        np.full(shape, 0.08, np.float32),
    )
    points = scatter(rng, 25, jitter=0.85)
    keep = rng.random(len(points)) < 0.9 + 0.12 * np.clip(value_at(noise(rng, 60, 60), points), -3, 0)
    _paint_red_cells(rng, b, points[keep], 0.75)
    e += 0.25 * b
    _paint_nuclei(h, rng, scatter(rng, 190), (10.0, 9.0), dark=1.5)
    return _texture(rng, h, e, b)


def _fibres(
    rng: np.random.Generator, waves: Plane, eosin: float, clefts: float
) -> tuple[Plane, Plane, Plane]:
    """Wavy bundles of fibres along x: (haematoxylin, eosin, red) planes."""
    bundles, strands = noise(rng, 110, 13), noise(rng, 45, 3.0)
    flow = warp_rows(bundles + 0.8 * strands, waves)
    fine = warp_rows(noise(rng, 20, 1.5), waves)
    e = eosin * np.clip(1.0 + 0.20 * flow + 0.10 * fine, 0.2, None)
    e *= 1.0 - np.clip(clefts, 0, 0.95) * step((-flow - 1.15) / 0.12)
    h = np.clip(0.06 + 0.03 * noise(rng, 14, 14), 0, None).astype(np.float32)
    return h, e.astype(np.float32), np.zeros_like(h)


def _gland(rng: np.random.Generator, h: Plane, e: Plane, b: Plane, centre: Points) -> Ring:
    """A round gland: pink cytoplasm, paler towards a white lumen. Returns where its basal nuclei are."""
    radius = rng.uniform(118, 158)
    outer = outline(rng, radius, radius * rng.uniform(0.75, 1.0), rng.uniform(0, np.pi), 48, 0.07)
    inner = outer * rng.uniform(0.22, 0.45)
    for plane, body, lumen in ((h, 0.16, 0.0), (e, 0.50, 0.03), (b, 0.0, 0.0)):
        fill(plane, centre, outer * 1.06, 0.35 * body + 0.1)
        fill(plane, centre, outer, body)
        fill(plane, centre, outer * 0.72, body * 0.75)
        fill(plane, centre, inner, lumen)
    ring = resampled(outer * 0.82, int(radius * 5.2 / 17))
    ring *= rng.uniform(0.93, 1.06, (len(ring), 1))
    return ring + centre, np.arctan2(ring[:, 1], ring[:, 0]) + rng.normal(0, 0.15, len(ring))


def _vessel(rng: np.random.Generator, h: Plane, e: Plane, b: Plane, centre: Points) -> Ring:
    """A small vessel: muscular wall, blood in the lumen. Returns where its endothelium is."""
    radius = rng.uniform(30, 62)
    outer = outline(rng, radius, radius * rng.uniform(0.55, 0.9), rng.uniform(0, np.pi), 40, 0.06)
    inner = outer * 0.66
    for plane, wall, lumen in ((h, 0.12, 0.0), (e, 1.0, 0.02), (b, 0.0, 0.0)):
        fill(plane, centre, outer, wall)
        fill(plane, centre, inner, lumen)
    fill(b, centre, inner * 0.7, 0.5)
    ring = resampled(inner * 1.12, 9)
    return ring + centre, np.arctan2(ring[:, 1], ring[:, 0]) + np.pi / 2


def _paint_rings(
    plane: Plane, rng: np.random.Generator, rings: list[Ring], radii: tuple[float, float], dark: float
) -> None:
    points, angles = (np.concatenate(parts) for parts in zip(*rings, strict=True))
    _paint_nuclei(plane, rng, points, radii, angles=angles, dark=dark, spread=0.1)


def _membranes(eosin: Plane, cells: Points, where: Plane) -> None:
    """Faint borders half way between neighbouring cells."""
    seeds = np.full(eosin.shape, 255, np.uint8)
    at = np.round(cells).astype(int) % SIZE
    seeds[at[:, 1], at[:, 0]] = 0
    padded = np.pad(seeds, PAD, mode="wrap")
    labels = cv2.distanceTransformWithLabels(padded, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    borders = (labels != np.roll(labels, 1, 0)) | (labels != np.roll(labels, 1, 1))
    soft = cv2.GaussianBlur(borders.astype(np.float32), (0, 0), 1.6)[PAD:-PAD, PAD:-PAD]
    eosin += 0.55 * soft * where


def _paint_nuclei(
    plane: Plane,
    rng: np.random.Generator,
    points: Points,
    radii: tuple[float, float],
    *,
    dark: float,
    angles: Points | None = None,
    spread: float = 0.15,
    nucleoli: bool = False,
) -> None:
    """Nuclei of half axes `radii` px at `points` (N, 2): a rim, clumped chromatin, some nucleoli."""
    count = len(points)
    scale = np.exp(rng.normal(0, spread, count))
    angles = rng.uniform(0, np.pi, count) if angles is None else angles
    depths = np.clip(rng.normal(0.72, 0.1, count), 0.4, 0.95)
    width = radii[1] * scale * rng.uniform(0.85, 1.15, count)
    mask = Canvas()
    for point, shape, depth in zip(
        points, outlines(rng, radii[0] * scale, width, angles, 18, 0.05), depths, strict=True
    ):
        mask.polygon(point, shape, depth, rim=min(1.0, depth + 0.16))
        if nucleoli and rng.random() < 0.5:
            mask.disc(point + rng.normal(0, 2.5, 2), 2.6, 1.0)
    painted = mask.plane(blur=0.9)
    inside = step((painted - 0.25) / 0.15)
    chromatin = 1.0 + 0.16 * noise(rng, 2.2, 2.2)
    plane *= 1 - inside
    plane += dark * painted * chromatin * inside


def _paint_red_cells(rng: np.random.Generator, plane: Plane, points: Points, strength: float) -> None:
    """Red cells of 7 µm, a little paler in the middle."""
    radii = rng.uniform(11.0, 14.0, len(points))
    levels = rng.uniform(0.75, 1.0, len(points))
    shapes = outlines(rng, radii, radii * rng.uniform(0.75, 1, len(points)), radii * 9, 16, 0.03)
    mask = Canvas()
    for point, shape, radius, level in zip(points, shapes, radii, levels, strict=True):
        mask.polygon(point, shape, level)
        mask.disc(point, radius * 0.35, level * 0.85)
    np.maximum(plane, strength * mask.plane(blur=1.2), out=plane)


def _texture(rng: np.random.Generator, h: Plane, e: Plane, b: Plane) -> Texture:
    """Concentration planes -> a texture, with the unevenness of a real stain."""
    uneven = 1.0 + 0.05 * noise(rng, 1.3, 1.3)
    planes = [CONCENTRATION_SCALE * h * uneven, CONCENTRATION_SCALE * e * uneven, CONCENTRATION_SCALE * b]
    return cv2.merge([cv2.convertScaleAbs(np.maximum(plane, 0)) for plane in planes])
