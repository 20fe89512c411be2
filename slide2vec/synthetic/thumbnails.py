"""Thumbnails of generated slides whose tissue is known, for measuring what finds tissue.

A slide is composed at 4 µm/px (tissue, then what lies on it, then the scan) and averaged to 8 µm/px.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.synthetic.artefacts import (
    Scene,
    blacken_border,
    blow_bubbles,
    blur,
    draw_pen,
    fold,
    lay_coverslip,
    scatter_dust,
)
from slide2vec.synthetic.stained import absorbance, cytology, pieces, smooth_noise

__all__ = ["CASES", "THUMBNAIL_SPACING_UM", "Thumbnail", "make_thumbnail"]

THUMBNAIL_SPACING_UM = 8.0
_FINER = 2  # composed at so many times the resolution
#: Tissue is outlined as a person would: gaps up to this width and holes up to this area belong to it.
GAP_UM, HOLE_UM2 = 64.0, 20_000.0
_DARK = 12.0  # grey level of the darkest glass of fluorescence
_SENSOR_NOISE, _JPEG_QUALITY = 1.5, 85


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A slide at `THUMBNAIL_SPACING_UM`.

    Attributes:
        case, seed: which it is.
        pixels: (H, W, 3) uint8, RGB.
        tissue: (H, W) bool. Blurred and folded tissue is tissue; what lies under pen is not.
        ignored: (H, W) bool, outlines, of which nobody can say on which side they are.
        marks: (H, W) bool each: "pen", "border", "fold", "bubble", "blur", as far as the slide has them.
    """

    case: str
    seed: int
    pixels: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    marks: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What a slide is made of: tissue, stains to choose from, its strength, and what is done to it."""

    kind: str = "resection"
    stains: tuple[str, ...] = ("he",)
    strength: tuple[float, float] = (0.45, 1.0)
    cast: float = 3.0  # grey levels between the channels of its glass
    done: tuple[Callable[[np.random.Generator, Scene], None], ...] = ()
    blurred: bool = False


def _coloured_pen(rng: np.random.Generator, scene: Scene) -> None:
    draw_pen(rng, scene, ("blue", "green", "red"))


def _black_pen(rng: np.random.Generator, scene: Scene) -> None:
    draw_pen(rng, scene, ("black",))


CASES: dict[str, _Case] = {
    "he": _Case(),
    "dab": _Case(stains=("dab",)),
    "pas": _Case(stains=("pas", "trichrome")),
    "pale": _Case(stains=("he", "he", "dab", "pas"), strength=(0.1, 0.3)),
    "tint": _Case(stains=("he", "dab"), cast=30.0),
    "pen": _Case(stains=("he", "he", "dab"), done=(_coloured_pen,)),
    "black-marks": _Case(stains=("he", "he", "dab"), done=(_black_pen,)),
    "folds": _Case(stains=("he", "dab"), done=(fold,)),
    "bubbles": _Case(stains=("he", "dab"), done=(blow_bubbles,)),
    "coverslip": _Case(stains=("he", "dab"), done=(lay_coverslip,)),
    "black-border": _Case(stains=("he", "dab"), done=(blacken_border,)),
    "biopsy": _Case(kind="biopsy", stains=("he", "he", "dab", "pas")),
    "cytology": _Case(kind="cytology"),
    "blur": _Case(stains=("he", "dab"), blurred=True),
    "fluorescence": _Case(kind="fluorescence"),
    "clinic": _Case(
        stains=("he", "dab", "pas"),
        strength=(0.4, 0.9),
        cast=12.0,
        done=(fold, blow_bubbles, lay_coverslip, _coloured_pen, _black_pen),
        blurred=True,
    ),
}


def make_thumbnail(case: str, seed: int, size_px: tuple[int, int] = (900, 700)) -> Thumbnail:
    """A slide of a case. The same arguments give the same pixels.

    Args:
        case: one of `CASES`.
        seed: another seed is another slide.
        size_px: (width, height) at `THUMBNAIL_SPACING_UM`.

    Raises:
        ConfigError: there is no such case.
    """
    if case not in CASES:
        raise ConfigError(f"there is no case {case!r}; there are {', '.join(CASES)}")
    made = CASES[case]
    rng = np.random.default_rng([seed, *case.encode()])
    shape = size_px[1] * _FINER, size_px[0] * _FINER
    scene = _empty(rng, shape, made.cast)
    if made.kind == "cytology":
        scene.tissue, scene.density = cytology(rng, shape)
    else:
        kind = "resection" if made.kind == "fluorescence" else made.kind
        distance = pieces(rng, shape, kind)
        scene.tissue = np.clip(distance / 3, 0, 1)
        stain = str(rng.choice(made.stains))
        scene.density = absorbance(rng, distance, stain, float(rng.uniform(*made.strength)))
    for change in made.done:
        change(rng, scene)
    scatter_dust(rng, scene)
    picture = _fluorescent(rng, scene) if made.kind == "fluorescence" else _in_transmitted_light(scene)
    if made.blurred:
        picture = blur(rng, scene, picture)
    picture[scene.black] = 0
    return Thumbnail(case, seed, _scanned(rng, picture), *_truth(scene))


def _empty(rng: np.random.Generator, shape: tuple[int, int], cast: float) -> Scene:
    """Bare glass: its colour, the lamp's unevenness, and the stripes of the scan."""
    colour = rng.uniform(228, 247) - cast * rng.dirichlet(np.ones(3)) * rng.uniform(0.5, 1.5)
    stripes = np.cos(np.arange(shape[0], dtype=np.float32) * 2 * np.pi / 250)[:, None]
    even = 1 + 0.008 * smooth_noise(rng, shape, 900) + 0.002 * stripes
    light = np.minimum(even[..., None] * colour, 253).astype(np.float32)
    planes = [np.zeros(shape, np.float32) for _ in range(3)]
    return Scene(
        light, np.zeros((*shape, 3), np.float32), planes[0], planes[1], np.zeros(shape, bool), planes[2], {}
    )


def _in_transmitted_light(scene: Scene) -> NDArray[Any]:
    return np.asarray(scene.light * cv2.exp(scene.density * np.float32(-np.log(10))), np.float32)


def _fluorescent(rng: np.random.Generator, scene: Scene) -> NDArray[Any]:
    """Nuclei and fibres shine in two colours out of a haze, before a dark glass."""
    nuclei, fibres = scene.density[..., 0], scene.density[..., 1]
    colours = np.array([(0.1, 0.25, 1.0), (0.1, 1.0, 0.2), (1.0, 0.2, 0.1)], np.float32)
    second = colours[int(rng.integers(1, 3))] * rng.uniform(0, 60)
    haze = np.array([3, 6, 10], np.float32) * scene.tissue[..., None] * rng.uniform(0.8, 2)
    shining = nuclei[..., None] * colours[0] * rng.uniform(90, 700) + fibres[..., None] * second
    return np.asarray(rng.uniform(0, _DARK, 3) + haze + shining, np.float32)


def _scanned(rng: np.random.Generator, picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Averaged to 8 µm/px, with a sensor's noise, through JPEG."""
    size = picture.shape[1] // _FINER, picture.shape[0] // _FINER
    small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    noisy = small + rng.normal(0, _SENSOR_NOISE, small.shape) * (small > 0)
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[..., ::-1].copy()


def _truth(scene: Scene) -> tuple[NDArray[np.bool_], NDArray[np.bool_], dict[str, NDArray[np.bool_]]]:
    """Tissue, what is ignored, and the marks, at 8 µm/px."""
    gone = (scene.ink > 0.5) | scene.black
    tissue = _outlined(_reduced(scene.tissue) >= 0.5) & ~_reduced_any(gone)
    pen = _reduced(scene.ink) >= 0.5
    near = cv2.dilate(tissue.astype(np.uint8), np.ones((3, 3), np.uint8)) > cv2.erode(
        tissue.astype(np.uint8), np.ones((3, 3), np.uint8)
    )
    softened = cv2.resize(scene.uncertain, tissue.shape[::-1], interpolation=cv2.INTER_AREA) / _FINER
    distance = cv2.distanceTransform((~near).astype(np.uint8), cv2.DIST_L2, 3)
    marks = {"pen": pen, "border": _reduced_any(scene.black)}
    marks |= {name: _reduced(where.astype(np.float32)) >= 0.5 for name, where in scene.marks.items()}
    return tissue, near | (distance < softened), {name: where for name, where in marks.items() if where.any()}


def _outlined(tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tissue without its narrow gaps and small holes."""
    side = round(GAP_UM / THUMBNAIL_SPACING_UM)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side + 1, side + 1))
    padded = np.pad(tissue.astype(np.uint8), side)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)[side:-side, side:-side]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - closed, connectivity=4)
    small = np.asarray(stats)[:, cv2.CC_STAT_AREA] * THUMBNAIL_SPACING_UM**2 < HOLE_UM2
    small[0] = False
    return np.asarray((closed > 0) | small[labels])


def _reduced(plane: NDArray[Any]) -> NDArray[Any]:
    size = plane.shape[1] // _FINER, plane.shape[0] // _FINER
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))


def _reduced_any(plane: NDArray[Any]) -> NDArray[np.bool_]:
    return _reduced(plane.astype(np.float32)) > 0.25
