"""Method "auto": tissue by what it absorbs of the light that comes through this slide's own glass.

Glass is estimated from the slide, everywhere anew, so that a tint, a lamp or a coverslip does not matter.
Stained tissue is told from glass, dust and edges by colour in optical density (differences between the
channels, which grey things do not have), unstained tissue by contrast over an area, and what is fainter than
either as far as it goes on from tissue. Pen is told from tissue by its colour, width and smoothness. On a
dark slide (fluorescence) tissue is what shines.

Lengths and areas are in µm, so that the spacing of the thumbnail matters little. All constants were set on
slides of `slide2vec.synthetic.thumbnails` and on real ones; benchmarks/tissue.py measures them on others.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.tiling.areas import morphed, without_specks
from slide2vec.tiling.ink import RIM_UM, find_ink
from slide2vec.tiling.scanned import is_dark, log_light, unscanned

__all__ = ["AUTO", "AutoTissue", "optical_density"]

Plane: TypeAlias = NDArray[Any]

#: Colour, as the distance of the three optical densities from their mean, from which something is stained:
#: bare glass has up to 0.004 after smoothing (a grey level of noise, JPEG), hardly stained tissue 0.02.
STAINED = 0.012
#: The same as a share of the density: what is dark has noisy colours.
STAINED_SHARE = 0.06
#: Gaussian by which colour is smoothed, µm.
SMOOTH_UM = 10.0
#: Optical density, and its deviation within 40 µm, that tissue without colour has over most of 250 µm in all
#: directions (the rim of a bubble that is out of focus is narrower).
FAINT, ROUGH, ROUGH_UM, MOSTLY = 0.004, 0.006, 250.0, 0.65
#: Beside tissue less is enough: this colour, smoothed by so many µm, or a deviation of so many times that of
#: bare glass, and at least that of one grey level and a bit (JPEG).
FAINT_COLOUR, FAINT_SMOOTH_UM, FAINT_ROUGH, LEAST_ROUGH = 0.007, 20.0, 2.5, 0.0022
#: Dust, fibres and edges of glass: colourless, at least so dense, narrower than so many µm; what is near
#: them.
DIRTY, DIRT_UM, NEAR_DIRT_UM = 0.12, 250.0, 56.0
#: An edge is where the density is this share of that within so many µm; and out of focus, this share of that
#: of larger things than nuclei within more.
EDGE, HALO_UM = 0.3, 20.0
SOFT_EDGE, SOFT_HALO_UM, LARGER_UM = 0.25, 40.0, 64.0
#: Width that tissue beside ink has at least, beyond the rim of the ink, µm.
STRAND_UM = 32.0
#: Gaps up to this width are tissue, as HS2P closes them (4 px of 16 µm), and holes up to this area; pieces
#: below are none.
GAP_UM, HOLE_UM2, PIECE_UM2 = 64.0, 20_000.0, 3_000.0
#: Grey levels above the dark background from which something shines, and so many of its deviations.
SHINES, SHINES_SIGMAS = 3.0, 4.0
#: Least width (µm) and area (µm²) of what shines: dust and fibres shine, too.
GLOW_UM, GLOW_UM2 = 120.0, 50_000.0


class AutoTissue:
    """Finds tissue and pen on a thumbnail.

    Attributes:
        names: of the labels, by their numbers.
        spacing_um: µm/px of the thumbnail that it is made for.
    """

    names = ("background", "tissue", "pen", "unscanned")
    spacing_um = 8.0

    def segment(self, thumbnail: NDArray[np.uint8], spacing_um: float) -> NDArray[np.uint8]:
        """Labels of a thumbnail, (H, W) uint8, indices of `names`.

        Args:
            thumbnail: (H, W, 3) uint8, RGB.
            spacing_um: of it, µm/px.
        """
        outside = unscanned(thumbnail)
        ink = np.zeros_like(outside)
        if is_dark(thumbnail, outside):
            tissue = _shining(thumbnail, outside, spacing_um)
        else:
            density = optical_density(thumbnail, outside, spacing_um)
            ink, rim = find_ink(density, spacing_um)
            ink &= ~outside
            tissue = _beyond(_absorbing(density, ink | rim | outside, spacing_um), ink, spacing_um)
        labels = np.zeros(outside.shape, np.uint8)
        labels[_whole(tissue, spacing_um)] = 1
        labels[ink] = 2
        labels[outside] = 3
        return labels


AUTO = AutoTissue()


def optical_density(
    thumbnail: NDArray[np.uint8], outside: NDArray[np.bool_], spacing_um: float
) -> tuple[Plane, Plane, Plane]:
    """-log10 of the light that comes through, relative to that through the glass around: red, green and blue,
    (H, W) float32 each."""
    light = log_light(thumbnail, outside, spacing_um)
    size = thumbnail.shape[1], thumbnail.shape[0]
    table = np.log10(np.arange(256, dtype=np.float32) + 1)
    planes = []
    for channel, glass in zip(cv2.split(thumbnail), cv2.split(light), strict=True):
        plane = cv2.resize(glass, size, interpolation=cv2.INTER_LINEAR) - cv2.LUT(channel, table)
        planes.append(plane)
    return planes[0], planes[1], planes[2]


def _absorbing(density: tuple[Plane, ...], without: Plane, spacing_um: float) -> Plane:
    """Where something stained is, or something unstained but rough over an area, and what is fainter and goes
    on from there: (H, W) bool."""
    smooth = [_blurred(plane, SMOOTH_UM / spacing_um) for plane in density]
    most = np.maximum(np.maximum(smooth[0], smooth[1]), smooth[2])
    colour = _colour(smooth)
    stained = (colour > STAINED) & (colour > STAINED_SHARE * most)
    clean = ~_near_thin(~stained & (most > DIRTY), spacing_um) & ~without
    mean, deviation = _deviation(np.asarray(sum(density)) / 3, spacing_um)
    rough = (deviation > ROUGH) & (mean > FAINT)
    found = (stained & ~without) | _over_area(rough & clean, stained & ~without, spacing_um)
    glass = ~found & ~without & (np.abs(mean) < STAINED)
    noise = float(np.median(deviation[glass])) if glass.any() else ROUGH / FAINT_ROUGH
    least = max(LEAST_ROUGH, FAINT_ROUGH * noise)
    wide = _colour([_blurred(plane, FAINT_SMOOTH_UM / spacing_um) for plane in density])
    faint = ((wide > FAINT_COLOUR) & (wide > STAINED_SHARE * most)) | (deviation > least)
    beyond = morphed(
        _over_area(faint & clean, found, spacing_um) & ~found, cv2.MORPH_OPEN, GAP_UM / spacing_um
    )
    found = _with_what_goes_on(found, beyond, spacing_um)
    return found & _within_edges(density, without, spacing_um)


def _colour(density: list[Plane]) -> Plane:
    """How far the three optical densities lie from their mean: (H, W) float32."""
    mean = sum(density) / 3
    return np.asarray(np.sqrt(sum((plane - mean) ** 2 for plane in density)), np.float32)


def _deviation(grey: Plane, spacing_um: float) -> tuple[Plane, Plane]:
    """Mean and deviation of the density within 40 µm: (H, W) float32 each."""
    side = max(3, round(40 / spacing_um) | 1)
    mean, squares = (cv2.blur(plane, (side, side)) for plane in (grey, grey * grey))
    return mean, np.sqrt(np.maximum(squares - mean * mean, 0))


def _over_area(mask: Plane, found: Plane, spacing_um: float) -> Plane:
    """What of a mask fills, with what was found, an area that is wide in all directions: (H, W) bool."""
    side = max(3, round(ROUGH_UM / spacing_um) | 1)
    filled = cv2.blur((mask | found).astype(np.float32), (side, side)) > MOSTLY
    return mask & morphed(filled, cv2.MORPH_OPEN, ROUGH_UM / spacing_um)


def _with_what_goes_on(found: Plane, faint: Plane, spacing_um: float) -> Plane:
    """What was found, with the faint parts that hang together with a piece of it: (H, W) bool."""
    pieces = without_specks(found, PIECE_UM2 / spacing_um**2)
    _, labels = cv2.connectedComponents((faint | pieces).astype(np.uint8), connectivity=4)
    goes_on = np.zeros(int(labels.max()) + 1, bool)
    goes_on[labels[pieces]] = True
    return np.asarray(found | (faint & goes_on[labels]))


def _near_thin(mask: Plane, spacing_um: float) -> Plane:
    """What is near the parts of a mask that are narrower than `DIRT_UM`: (H, W) bool."""
    thin = mask & ~morphed(mask, cv2.MORPH_OPEN, DIRT_UM / spacing_um)
    side = 2 * round(NEAR_DIRT_UM / spacing_um) + 1
    return np.asarray(cv2.dilate(thin.astype(np.uint8), np.ones((side, side), np.uint8)) > 0)


def _within_edges(density: tuple[Plane, ...], without: Plane, spacing_um: float) -> Plane:
    """Without the halo that optics and JPEG lay around what is dense, ink excepted: (H, W) bool."""
    most = _blurred(np.maximum(np.maximum(density[0], density[1]), density[2]), 5 / spacing_um)
    most[without] = 0
    larger = cv2.morphologyEx(most, cv2.MORPH_OPEN, _square(LARGER_UM / 2 / spacing_um))
    sharp = most > EDGE * cv2.dilate(most, _square(HALO_UM / spacing_um))
    within: Plane = sharp & (most > SOFT_EDGE * cv2.dilate(larger, _square(SOFT_HALO_UM / spacing_um)))
    return within


def _square(reach_px: float) -> NDArray[np.uint8]:
    """What reaches so many px in all directions."""
    side = 2 * round(reach_px) + 1
    return np.ones((side, side), np.uint8)


def _shining(thumbnail: NDArray[np.uint8], outside: Plane, spacing_um: float) -> Plane:
    """Where something is brighter than the dark glass around it: (H, W) bool."""
    bright = _blurred(thumbnail.astype(np.float32), SMOOTH_UM / spacing_um)
    within = bright[~outside]
    least = np.percentile(within, 5, axis=0)
    darkest = within[(within <= least + SHINES).all(-1)]
    if not len(darkest):
        darkest = least[None]
    glass, spread = np.median(darkest, axis=0), darkest.std(axis=0)
    shines = (bright > glass + np.maximum(SHINES, SHINES_SIGMAS * spread)).any(-1) & ~outside
    joined = morphed(shines, cv2.MORPH_CLOSE, GAP_UM / spacing_um)
    return without_specks(morphed(joined, cv2.MORPH_OPEN, GLOW_UM / spacing_um), GLOW_UM2 / spacing_um**2)


def _beyond(tissue: Plane, ink: Plane, spacing_um: float) -> Plane:
    """Without what is nothing but the rim of a mark: tissue beside ink goes on beyond `RIM_UM`."""
    if not ink.any():
        return tissue
    beside = cv2.distanceTransform((~ink).astype(np.uint8), cv2.DIST_L2, 3) <= RIM_UM / spacing_um
    joined = morphed(tissue, cv2.MORPH_CLOSE, GAP_UM / spacing_um) & ~beside
    far = morphed(joined, cv2.MORPH_OPEN, STRAND_UM / spacing_um)
    distance = cv2.distanceTransform((~far).astype(np.uint8), cv2.DIST_L2, 3)
    return np.asarray(tissue & (distance <= 1.2 * RIM_UM / spacing_um))


def _whole(tissue: Plane, spacing_um: float) -> Plane:
    """Tissue without narrow gaps, small holes and small pieces: (H, W) bool."""
    large = without_specks(tissue, PIECE_UM2 / 4 / spacing_um**2)
    closed = morphed(large, cv2.MORPH_CLOSE, GAP_UM / spacing_um)
    filled = ~without_specks(~closed, HOLE_UM2 / spacing_um**2)
    return without_specks(filled, PIECE_UM2 / spacing_um**2)


def _blurred(planes: Plane, sigma: float) -> Plane:
    return np.asarray(cv2.GaussianBlur(planes, (0, 0), max(0.5, sigma)), np.float32)
