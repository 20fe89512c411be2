"""What a thumbnail shows besides what lies on the glass: the light through it, and where nothing was
scanned."""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["is_dark", "log_light", "unscanned"]

Plane: TypeAlias = NDArray[Any]

#: Grey level of the darkest channel from which a pixel may be glass in transmitted light, and the share of
#: such pixels, and the median of the brightest channel, from which a slide is none of fluorescence.
GLASS_VALUE, GLASS_SHARE, DARK_MEDIAN = 150, 0.02, 60
#: Grey level up to which what was not scanned is black (ink is lighter), and the area of such, px.
BLACK, BLACK_PX = 3, 400
#: Grey levels within which neighbours of glass are, and pixels of one kind of glass; share of a slide that it
#: has.
SMOOTH, SPREAD, LEAST_SHARE = 6, 5, 0.01
#: Deviation from the slide's glass up to which a place tells of the glass there: log10, and between channels.
NEAR, NEAR_COLOUR = 0.05, 0.008
#: Over how many µm the light is smoothed, and side of a cell, µm.
REACH_UM, CELL_UM = 1000.0, 64.0
#: Of a slide without bare glass.
USUAL_GLASS = 245


def unscanned(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a thumbnail is padding: black along the edges of a bright slide, or exactly white: (H, W)
    bool."""
    darkest, brightest = _darkest(thumbnail), _brightest(thumbnail)
    if (darkest > GLASS_VALUE).mean() < GLASS_SHARE:
        return np.zeros(darkest.shape, bool)
    black = (brightest <= BLACK).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(black, connectivity=4)
    height, width = darkest.shape
    x, y, w, h, area = np.asarray(stats).T
    chosen = ((x == 0) | (y == 0) | (x + w == width) | (y + h == height)) & (area >= BLACK_PX)
    chosen[0] = False
    outside = np.asarray(cv2.dilate(chosen[labels].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)
    white = darkest == 255
    return outside | white if LEAST_SHARE < white.mean() < 1 - GLASS_SHARE else outside


def is_dark(thumbnail: NDArray[np.uint8], outside: NDArray[np.bool_]) -> bool:
    """Whether a thumbnail is dark all over, as in fluorescence."""
    bright = (_darkest(thumbnail) > GLASS_VALUE) & ~outside
    within = _brightest(thumbnail)[~outside]
    return bool(within.size and bright.mean() < GLASS_SHARE and np.median(within) < DARK_MEDIAN)


def log_light(thumbnail: NDArray[np.uint8], outside: NDArray[np.bool_], spacing_um: float) -> Plane:
    """log10 of what comes through bare glass (grey levels + 1), by cells of `CELL_UM`: (h, w, 3) float32."""
    cell = max(1, round(CELL_UM / spacing_um))
    size = max(1, thumbnail.shape[1] // cell), max(1, thumbnail.shape[0] // cell)
    small = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    scanned = cv2.resize(outside.astype(np.float32), size, interpolation=cv2.INTER_AREA) == 0
    usable = scanned & (_range(small.mean(-1)) <= SMOOTH)
    seen = np.log10(small + 1)
    light = np.broadcast_to(np.log10(_glass_colour(thumbnail, outside) + 1), small.shape).astype(np.float32)
    sigma = REACH_UM / spacing_um / cell
    for _ in range(2):
        change = seen - light
        colour = np.abs(change - change.mean(-1, keepdims=True)).max(-1)
        bare = usable & (np.abs(change).max(-1) < NEAR) & (colour < NEAR_COLOUR)
        weight = bare.astype(np.float32)
        total = cv2.GaussianBlur(weight, (0, 0), sigma) + 1e-3
        sums = cv2.GaussianBlur(seen * weight[..., None], (0, 0), sigma) + 1e-3 * light
        light = np.asarray(sums / total[..., None], np.float32)
    return light


def _glass_colour(thumbnail: NDArray[np.uint8], outside: NDArray[np.bool_]) -> Plane:
    """The brightest colour that a good share of the smooth pixels has: (3,) float32."""
    grey = np.asarray(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY))
    smooth = (_range(grey) <= SMOOTH) & ~outside & (grey >= GLASS_VALUE)
    counts = np.bincount(grey[smooth], minlength=256).astype(np.float64)
    near = np.convolve(counts, np.ones(2 * SPREAD + 1), "same")
    enough = np.flatnonzero(near >= LEAST_SHARE * grey.size)
    if not len(enough):
        return np.full(3, USUAL_GLASS, np.float32)
    first = max(0, int(enough[-1]) - 3 * SPREAD)
    peak = first + int(np.argmax(near[first : int(enough[-1]) + 1]))
    chosen = smooth & (np.abs(grey.astype(np.int16) - peak) <= SPREAD)
    return np.asarray(np.median(thumbnail[chosen], axis=0), np.float32)


def _range(grey: Plane) -> Plane:
    """Of each pixel and its neighbours."""
    kernel = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(grey, kernel) - cv2.erode(grey, kernel))


def _darkest(thumbnail: NDArray[np.uint8]) -> Plane:
    red, green, blue = cv2.split(thumbnail)  # ten times as fast as along the short axis
    return np.minimum(np.minimum(red, green), blue)


def _brightest(thumbnail: NDArray[np.uint8]) -> Plane:
    red, green, blue = cv2.split(thumbnail)
    return np.maximum(np.maximum(red, green), blue)
