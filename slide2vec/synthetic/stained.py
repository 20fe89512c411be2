"""Pieces of stained tissue at thumbnail scale: outlines of resections, biopsies and cytology, and what they
absorb.

Concentrations of the textures in `tissues.py`, coloured by the Beer-Lambert law. Optical densities per
concentration of haematoxylin, DAB, Schiff's reagent, methyl blue and ponceau are those of Ruifrok and
Johnston (Anal Quant Cytol Histol 2001; 23: 291-299) and of ImageJ's plugin "Colour Deconvolution", which
extends them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.synthetic.tissues import CONCENTRATION_SCALE, TISSUES, detail_noise, tissue_textures

__all__ = ["STAINS", "absorbance", "cytology", "pieces", "smooth_noise"]

Plane: TypeAlias = NDArray[Any]  # (h, w) float32

_HAEMATOXYLIN, _EOSIN, _BLOOD = (0.65, 0.70, 0.29), (0.06, 0.77, 0.36), (0.10, 0.80, 0.62)
_DAB, _UNSPECIFIC, _SCHIFF = (0.27, 0.57, 0.78), (0.07, 0.09, 0.11), (0.175, 0.972, 0.155)
_METHYL_BLUE, _PONCEAU = (0.80, 0.59, 0.10), (0.10, 0.74, 0.67)

#: How strongly what absorbs takes which stain: nuclei; cytoplasm and fibres, where the marker is not and
#: where it is; nuclei where it is; red cells.
_USED: dict[str, list[tuple[tuple[float, float, float], float]]] = {
    "he": [(_HAEMATOXYLIN, 1), (_EOSIN, 1), (_EOSIN, 1), (_HAEMATOXYLIN, 0), (_BLOOD, 1)],
    "dab": [(_HAEMATOXYLIN, 0.55), (_UNSPECIFIC, 1), (_DAB, 0.8), (_DAB, 0.9), ((0.2, 0.4, 0.5), 1)],
    "pas": [(_HAEMATOXYLIN, 0.7), (_SCHIFF, 0.3), (_SCHIFF, 0.9), (_SCHIFF, 0), ((0.1, 0.4, 0.4), 1)],
    "trichrome": [((0.6, 0.6, 0.5), 0.9), (_PONCEAU, 0.7), (_METHYL_BLUE, 0.8), (_PONCEAU, 0), (_PONCEAU, 1)],
}
#: Optical density for red, green and blue light of the same five, (5, 3) float32.
STAINS = {name: np.array([np.multiply(*pair) for pair in used], np.float32) for name, used in _USED.items()}
_REACH_PX = 24.0  # how far the outline frays, px of 4 µm


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], reach: float) -> Plane:
    """(h, w) float32 noise of zero mean and unit variance, whose bumps are about `reach` px."""
    knots = [max(4, round(side / reach) + 3) for side in shape]
    values = rng.standard_normal(tuple(knots)).astype(np.float32)
    made = cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray((made - made.mean()) / max(float(made.std()), 1e-6), np.float32)


def pieces(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> Plane:
    """Distance to the outline of the tissue, (h, w) float32 px, positive inside it.

    Args:
        kind: "resection": one to four pieces of some mm, some with tears; "biopsy": cores of about a
            millimetre's width, bent and broken.
    """
    solid = np.zeros(shape, np.uint8)
    for _ in range(int(rng.integers(1, 5)) if kind == "resection" else int(rng.integers(3, 8))):
        (_blob if kind == "resection" else _core)(rng, solid)
    if kind == "resection":
        for _ in range(int(rng.integers(0, 4))):
            _tear(rng, solid)
    inside, outside = (cv2.distanceTransform(part, cv2.DIST_L2, 3) for part in (solid, 1 - solid))
    frayed = 0.5 * _tiled(detail_noise(), shape) + 0.8 * smooth_noise(rng, shape, 40)
    reach = _REACH_PX * (1.0 if kind == "resection" else 0.3)
    return np.asarray(inside - outside + reach * frayed, np.float32)


def _blob(rng: np.random.Generator, solid: Plane) -> None:
    height, width = solid.shape
    t = np.linspace(0, 2 * np.pi, 160)
    radius = 1 + sum(rng.normal(0, 0.13 / k) * np.cos(k * t + rng.uniform(0, 7)) for k in range(2, 8))
    a, b = rng.uniform(0.1, 0.27) * width, rng.uniform(0.1, 0.3) * height
    points = np.stack([a * radius * np.cos(t), b * radius * np.sin(t)], 1) @ _turn(rng.uniform(0, 7))
    centre = np.array([rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height])
    cv2.fillPoly(solid, [(points + centre).astype(np.int32)], 1)


def _core(rng: np.random.Generator, solid: Plane) -> None:
    height, width = solid.shape
    count, step = int(rng.uniform(0.15, 0.75) * width / 20), 20.0
    heading = rng.uniform(-0.5, 0.5) + np.cumsum(rng.normal(0, 0.06, count))
    at = np.cumsum(step * np.stack([np.cos(heading), np.sin(heading)], 1), 0)
    at += np.array([rng.uniform(0.05, 0.5) * width, rng.uniform(0.1, 0.9) * height])
    caliber = rng.uniform(60, 140)
    breaks = rng.random(count) < 0.06
    for first, second, broken in zip(at[:-1], at[1:], breaks, strict=False):
        if not broken:
            ends = [(int(x), int(y)) for x, y in (first, second)]
            cv2.line(solid, ends[0], ends[1], 1, int(caliber * rng.uniform(0.75, 1)))


def _tear(rng: np.random.Generator, solid: Plane) -> None:
    """A gap without tissue, of more than 0.2 mm."""
    rows, columns = np.nonzero(solid)
    if not len(rows):
        return
    place = int(rng.integers(len(rows)))
    axes = int(rng.uniform(60, 220)), int(rng.uniform(35, 70))
    centre = int(columns[place]), int(rows[place])
    cv2.ellipse(solid, centre, axes, float(rng.uniform(0, 180)), 0, 360, 0, -1)


def _turn(angle: float) -> NDArray[Any]:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def absorbance(rng: np.random.Generator, distance: Plane, stain: str, strength: float) -> NDArray[Any]:
    """(h, w, 3) float32 optical density (base 10, of red, green and blue light) of tissue inside an outline.

    Args:
        distance: to the outline, px of 4 µm, positive inside.
        stain: one of `STAINS`.
        strength: 1 is a usual stain, 0.2 a faint one.
    """
    shape = distance.shape
    inputs = _concentrations(rng, shape)
    positive = _positive(rng, shape)
    uneven = strength * (1 + 0.12 * smooth_noise(rng, shape, 300) + 0.05 * smooth_noise(rng, shape, 60))
    h, e, b = (inputs[..., k] * uneven * np.clip(distance / 3, 0, 1) for k in range(3))
    parts = np.stack([h * (1 - positive), e * (1 - positive), e * positive, h * positive, b], -1)
    if stain != "dab":  # only there does the marker hide the nucleus
        parts[..., 0] = h
    density = parts.reshape(-1, 5) @ STAINS[stain]
    return np.asarray(np.clip(density, 0, None).reshape(*shape, 3), np.float32)


def _positive(rng: np.random.Generator, shape: tuple[int, int]) -> Plane:
    """Where the marker is, 0 to 1: in a share of the tissue that differs from slide to slide."""
    share = rng.uniform(0.02, 0.8)
    regions = (
        smooth_noise(rng, shape, 160) + 0.5 * smooth_noise(rng, shape, 25) + 0.5 * smooth_noise(rng, shape, 6)
    )
    return np.asarray(np.clip((regions - np.quantile(regions, 1 - share)) / 0.3 + 0.5, 0, 1), np.float32)


def _concentrations(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[Any]:
    """(h, w, 3) float32 of haematoxylin, eosin and red cells: regions of several tissues, each its
    texture."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    kinds = rng.permutation(len(TISSUES))[: int(rng.integers(3, len(TISSUES) + 1))]
    total, mixed = np.zeros(shape, np.float32), np.zeros((*shape, 3), np.float32)
    for kind in kinds:
        x, y = columns + 20 * smooth_noise(rng, shape, 90), rows + 20 * smooth_noise(rng, shape, 90)
        turned = _turn(rng.uniform(0, 7))
        share = cv2.exp(4 * smooth_noise(rng, shape, 220) + 0.8 * _tiled(detail_noise(), shape))
        share = share * (0.3 if TISSUES[kind] in {"blood", "fat"} else 1.0)
        u, v = ((turned[i, 0] * x + turned[i, 1] * y + 3e3).astype(np.float32) % 128 for i in range(2))
        texture = cv2.remap(tissue_textures(4.0)[kind], u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        total += share
        mixed += texture * share[..., None]
    return np.asarray(mixed / total[..., None] / CONCENTRATION_SCALE, np.float32)


def cytology(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Plane, NDArray[Any]]:
    """A smear in Papanicolaou's stain: squamous cells, single or in sheets, and groups of small dark ones.

    Returns:
        Cover by cells, (h, w) float32 from 0 to 1, and optical density, (h, w, 3) float32.
    """
    density, cover = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    crowd = smooth_noise(rng, shape, 200) + 0.6 * smooth_noise(rng, shape, 50)
    rows, columns = np.nonzero(crowd > np.quantile(crowd, rng.uniform(0.5, 0.75)))
    for index in rng.integers(len(rows), size=int(len(rows) / rng.uniform(110, 260))):
        centre = columns[index] + rng.normal(0, 6), rows[index] + rng.normal(0, 6)
        _squamous(rng, density, cover, centre)
    for index in rng.integers(len(rows), size=int(rng.integers(20, 80))):
        _group(rng, density, cover, (columns[index], rows[index]))
    return cover, density


def _squamous(
    rng: np.random.Generator, density: NDArray[Any], cover: Plane, centre: tuple[float, float]
) -> None:
    """A cell of 40 to 70 µm, cyan to pink, its nucleus of 8 to 12 µm."""
    colour = np.array([(0.20, 0.09, 0.05), (0.05, 0.20, 0.10), (0.06, 0.16, 0.18)][int(rng.integers(3))])
    axes = rng.uniform(5, 9, 2)
    _add(rng, density, cover, centre, axes, colour * rng.uniform(0.7, 1.6))
    _add(rng, density, None, centre, np.full(2, rng.uniform(1.0, 1.5)), np.array([0.6, 0.65, 0.35]))


def _group(
    rng: np.random.Generator, density: NDArray[Any], cover: Plane, centre: tuple[float, float]
) -> None:
    """A group of 20 to 200 small cells, crowded."""
    reach = rng.uniform(8, 28)
    for _ in range(int(rng.integers(20, 200))):
        place = (centre[0] + rng.normal(0, reach / 2), centre[1] + rng.normal(0, reach / 2))
        _add(
            rng,
            density,
            cover,
            place,
            rng.uniform(1.5, 2.5, 2),
            np.array([0.35, 0.4, 0.22]) * rng.uniform(0.6, 1),
        )


def _add(
    rng: np.random.Generator,
    density: NDArray[Any],
    cover: Plane | None,
    centre: tuple[float, float],
    axes: NDArray[Any],
    colour: NDArray[Any],
) -> None:
    """A soft ellipse of a density, px of 4 µm."""
    reach = int(axes.max()) + 3
    x, y = round(centre[0]), round(centre[1])
    if not (reach <= x < density.shape[1] - reach and reach <= y < density.shape[0] - reach):
        return
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    u, v = np.stack([dx, dy], -1).reshape(-1, 2).dot(_turn(rng.uniform(0, 7))).T.reshape(2, *dx.shape)
    alpha = np.clip((1 - np.hypot(u / axes[0], v / axes[1])) * axes.min() + 0.5, 0, 1)
    window = slice(y - reach, y + reach + 1), slice(x - reach, x + reach + 1)
    density[window] += alpha[..., None] * colour
    if cover is not None:
        np.maximum(cover[window], alpha, out=cover[window])


def _tiled(plane: Plane, shape: tuple[int, int]) -> Plane:
    """A seamless plane repeated over a shape."""
    return np.asarray(plane.take(range(shape[0]), 0, mode="wrap").take(range(shape[1]), 1, mode="wrap"))
