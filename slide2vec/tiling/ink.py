"""Pen: marks of one colour of ink, wide and smooth, on glass and across tissue, and the soft rims of them."""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.tiling.areas import morphed

__all__ = ["find_ink"]

Plane: TypeAlias = NDArray[Any]

#: Pen is looked for at this spacing; a stroke is at least so wide, and a mark so large.
COARSE_UM, WIDTH_UM, MARK_UM2 = 32.0, 190.0, 100_000.0
#: Deviation of optical density within 40 µm, relative to it, up to which a mark is smooth: ink has 0.04 to
#: 0.09, tissue 0.1 and more.
SMOOTH = 0.09
#: Deviation of a camera's and of JPEG's noise, grey levels: ink lets little light through.
NOISE = 1.5
#: Share of its ink's density that a mark across tissue has at least.
ACROSS = 0.7
#: Optical density of ink, at least, and share of its ink's density up to which a mark goes.
LEAST, WITHIN = 0.15, 0.5
#: Up to so many µm beside a mark, what takes light away in the proportions of its ink, within this share or
#: this much of the light, is ink that is out of focus or runs thin.
RIM_UM, ALIKE, ALIKE_LEAST = 96.0, 0.1, 0.015


def find_ink(
    density: tuple[Plane, Plane, Plane], spacing_um: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where pen is, and where the rims of its marks are.

    Args:
        density: optical densities for red, green and blue light, (H, W) float32 each.
        spacing_um: µm/px.

    Returns:
        (H, W) bool each; no pixel is in both.
    """
    height, width = density[0].shape
    factor = max(1.0, COARSE_UM / spacing_um)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    coarse = cv2.merge([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in density])
    candidates = _colours(coarse)
    marks, rims = np.zeros((height, width), bool), np.zeros((height, width), bool)
    if not any(found.any() for found in candidates):
        return marks, rims
    rough = cv2.resize(
        _roughness(np.asarray(sum(density)) / 3, spacing_um), size, interpolation=cv2.INTER_AREA
    )
    smooth = cv2.blur(cv2.merge(density), (3, 3))
    for found in candidates:
        seeds = _seeds(rough, found, spacing_um * factor)
        if seeds.any():
            ink = np.quantile(coarse[seeds], 0.25, axis=0)  # of one stroke, where several cross
            mark = _outlined(smooth, _grown(coarse, seeds, ink, spacing_um * factor), ink)
            marks |= mark
            rims |= _rim(smooth, mark, ink, spacing_um)
    return marks, rims & ~marks


def _colours(density: Plane) -> tuple[Plane, ...]:
    """Where the colour of a black, a blue, a green and a red marker is: (h, w) bool each."""
    red, green, blue = (density[..., k] for k in range(3))
    least, most = density.min(-1), density.max(-1)
    return (
        (least > 0.4) & (most - least < 0.3 * most),
        (red > 0.35) & (red > 1.12 * green) & (green > 1.2 * blue),
        (red > 0.3) & (green < 0.75 * red) & (green < 0.85 * blue),
        (green > 0.35) & (red < 0.3 * green) & (blue > 0.72 * green),
    )


def _seeds(rough: Plane, candidates: Plane, spacing_um: float) -> Plane:
    """The smooth marks of the colour of one marker: (h, w) bool."""
    wide = morphed(candidates, cv2.MORPH_OPEN, WIDTH_UM / spacing_um)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(wide.astype(np.uint8), connectivity=8)
    seeds = np.zeros_like(wide)
    for index in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] * spacing_um**2 >= MARK_UM2):
        part = labels == index
        if index and np.quantile(rough[part], 0.3) < SMOOTH:
            seeds |= part
    return seeds


def _grown(density: Plane, seeds: Plane, ink: Plane, spacing_um: float) -> Plane:
    """Marks with where they go on across tissue: (h, w) bool."""
    as_dense = np.asarray(density > ACROSS * ink).all(axis=-1)
    across = morphed(np.asarray(as_dense), cv2.MORPH_OPEN, WIDTH_UM / spacing_um)
    _, labels = cv2.connectedComponents((across | seeds).astype(np.uint8), connectivity=8)
    grown: Plane = np.isin(labels, np.unique(labels[seeds]))
    return grown


def _outlined(density: Plane, mark: Plane, ink: Plane) -> Plane:
    """A mark that was found coarsely, as far as half of its ink goes: (H, W) bool."""
    height, width = density.shape[:2]
    near = cv2.dilate(mark.astype(np.uint8), np.ones((3, 3), np.uint8))
    whole = cv2.resize(near, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    inked = np.all([density[..., k] > WITHIN * ink[k] for k in range(3)], axis=0)
    return np.asarray(whole & inked & (density.max(-1) > LEAST))


def _rim(density: Plane, mark: Plane, ink: Plane, spacing_um: float) -> Plane:
    """Where ink and bare glass mix beside a mark: (H, W) bool."""
    side = 2 * round(RIM_UM / spacing_um) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    rim = (cv2.dilate(mark.astype(np.uint8), disc) > 0) & ~mark
    taken, of_ink = 1 - 10.0 ** -density[rim], 1 - 10.0**-ink  # light: that is what mixes
    part = taken @ of_ink / (of_ink @ of_ink)
    off = np.linalg.norm(taken - part[:, None] * of_ink, axis=1)
    rim[rim] = off < np.maximum(ALIKE * np.linalg.norm(taken, axis=1), ALIKE_LEAST)
    return rim


def _roughness(density: Plane, spacing_um: float) -> Plane:
    """Deviation of the density within some 40 µm, without a camera's noise, relative to it."""
    sigma = max(0.8, 16 / spacing_um)
    mean, squares = (cv2.GaussianBlur(plane, (0, 0), sigma) for plane in (density, density * density))
    noise = NOISE / 240 / np.log(10) * cv2.exp(np.log(10) * np.minimum(mean, 3))
    rough: Plane = np.sqrt(np.maximum(squares - mean * mean - noise * noise, 0)) / np.maximum(mean, 0.02)
    return rough
