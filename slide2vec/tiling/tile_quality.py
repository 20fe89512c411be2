"""Artefacts and focus of tiles: which share of each is blurred, under pen, folded, under a bubble, bare.

Pen, folds, bubbles and background are looked for at 8 µm/px; focus in each tile at 1 µm/px, by cells of 32
µm: what is out of focus has lost its fine contrast in relation to its coarse one, or all of it, whatever the
stain. Or GrandQC's network says what each pixel is (`QualityConfig.method`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import QualityConfig
from slide2vec.geometry import TileGeometry
from slide2vec.readers import SlideReader
from slide2vec.tiling.areas import morphed, without_specks
from slide2vec.tiling.auto_tissue import AUTO, optical_density
from slide2vec.tiling.bubbles import find_bubbles
from slide2vec.tiling.coordinates import ARTEFACTS
from slide2vec.tiling.label_windows import label_map, slide_windows
from slide2vec.tiling.previews import thumbnail
from slide2vec.tiling.quality import tiles_at
from slide2vec.tiling.scanned import is_dark
from slide2vec.tiling.tissue_methods import chosen

__all__ = ["artefact_maps", "blurred_share", "measure_tiles", "within_limits"]

Plane: TypeAlias = NDArray[Any]

#: What is measured without a network.
CLASSICAL = tuple(name for name in ARTEFACTS if name != "spot")
#: Labels of a network that are kept of a slide; of a larger one every n-th along both axes.
MOST_LABELS = 64_000_000
#: A fold has so many times the density of the tissue within so many µm, at least so much more, not less
#: coloured (difference of the channels, as a share); its area.
FOLD, FOLD_MORE, GREY, FOLD_AROUND_UM, FOLD_UM2 = 1.6, 0.15, 0.2, 500.0, 6_000.0
#: Focus is measured at this spacing (µm/px), and not on slides that are coarser than twice that; side of a
#: cell, µm.
FOCUS_UM, CELL_UM = 1.0, 32.0
#: What is in focus has at least so much contrast of up to 1 px in relation to that of 1 to 4 px, and of that
#: at least so much in relation to how dark it is. H&E of 0.5 µm/px: 0.25 and more within 98 % of cells in
#: focus and 95 % when blurred by a Gaussian of 1 µm, below 0.24 in 95 % from 2 µm on.
FINE, CONTRAST = 0.22, 0.05


def measure_tiles(
    reader: SlideReader,
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    geometry: TileGeometry,
    config: QualityConfig,
) -> dict[str, NDArray[np.float32]]:
    """The share of every tile that each of `ARTEFACTS` takes, (N,) float32 from 0 to 1; of dark spots only
    where a network finds them.

    Of blur it is the share of its tissue.

    Args:
        x, y: (N,) int64, level-0 px.

    Raises:
        SlideReadError: pixels cannot be decoded.
        WeightsError: the network's weights cannot be had.
    """
    network = config.network()
    if network is not None:
        return _by_network(chosen(network), reader, x, y, geometry)
    if not len(x):
        return {name: np.zeros(0, np.float32) for name in CLASSICAL}
    base = geometry.base_spacing_um
    picture = thumbnail(reader, max(1.0, AUTO.spacing_um / base))
    scale = reader.dimensions[0] / picture.shape[1]
    maps = artefact_maps(picture, base * scale)
    side = geometry.tile_size_lv0 / scale
    found = {name: _shares(where, x / scale, y / scale, side) for name, where in maps.items()}
    found["blur"] = np.zeros(len(x), np.float32)
    if base <= 2 * FOCUS_UM:
        tissue = ~(maps["background"] | maps["pen"])
        spacing = max(FOCUS_UM, base)
        for index, tile in tiles_at(reader, x, y, geometry, spacing):
            left, top = int(x[index] / scale), int(y[index] / scale)
            part = tissue[top : ceil(top + side), left : ceil(left + side)]
            found["blur"][index] = blurred_share(tile, part, spacing)
    return found


def _by_network(
    segmenter: Any,
    reader: SlideReader,
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    geometry: TileGeometry,
) -> dict[str, NDArray[np.float32]]:
    """The shares of the labels that a segmenter of windows has for artefacts; only windows with tiles are
    looked at."""
    downsample = segmenter.spacing_um / geometry.base_spacing_um
    size, read = slide_windows(reader, downsample, segmenter.window_px)
    left, top = x / downsample, y / downsample
    side, window = geometry.tile_size_lv0 / downsample, segmenter.window_px

    def has_tiles(column: int, row: int) -> bool:
        beside = (left + side > column) & (left < column + window)
        return bool((beside & (top + side > row) & (top < row + window)).any())

    found = label_map(segmenter, size, read, most_px=MOST_LABELS, most_overview_px=1, wanted=has_tiles)
    scale = downsample * found.step
    places = x / scale, y / scale, geometry.tile_size_lv0 / scale
    shares = {
        name: _shares(np.isin(found.labels, _numbers(segmenter.names, name)), *places) for name in ARTEFACTS
    }
    tissue = 1 - shares["background"]
    shares["blur"] = np.divide(shares["blur"], tissue, out=np.zeros_like(tissue), where=tissue > 0).clip(0, 1)
    return shares


def _numbers(names: tuple[str, ...], name: str) -> list[int]:
    return [number for number, each in enumerate(names) if each == name]


def within_limits(
    shares: Mapping[str, NDArray[np.float32]], config: QualityConfig, count: int
) -> NDArray[np.bool_]:
    """Which of `count` tiles have no more of anything than `config` allows, (N,) bool."""
    kept = np.ones(count, bool)
    for name, share in shares.items():
        most = getattr(config, f"max_{name}")
        if most is not None:
            kept &= share <= most
    return kept


def artefact_maps(picture: NDArray[np.uint8], spacing_um: float) -> dict[str, NDArray[np.bool_]]:
    """Where a thumbnail, (H, W, 3) uint8 RGB, has background, pen, folds and bubbles: (H, W) bool each."""
    labels = AUTO.segment(picture, spacing_um)
    tissue, pen, outside = (labels == AUTO.names.index(name) for name in ("tissue", "pen", "unscanned"))
    maps = {"background": ~(tissue | pen), "pen": pen}
    if is_dark(picture, outside):
        nothing = np.zeros_like(pen)
        return {**maps, "fold": nothing, "bubble": nothing}
    density = optical_density(picture, outside, spacing_um)
    return {
        **maps,
        "fold": _folds(density, tissue, spacing_um),
        "bubble": find_bubbles(density, ~maps["background"] | outside, spacing_um),
    }


def _folds(density: tuple[Plane, ...], tissue: Plane, spacing_um: float) -> Plane:
    """Bands of tissue that is much denser than that around it, and no greyer: (H, W) bool."""
    sigma = FOLD_AROUND_UM / 2 / spacing_um
    weight = tissue.astype(np.float32)
    total = cv2.GaussianBlur(weight, (0, 0), sigma) + 1e-3
    more, around = [], np.zeros(tissue.shape, np.float32)
    for plane in density:
        usual = cv2.GaussianBlur(plane * weight, (0, 0), sigma) / total
        more.append(cv2.GaussianBlur(plane, (0, 0), max(0.5, 12 / spacing_um)) - usual)
        around += usual / 3
    most = np.maximum(np.maximum(more[0], more[1]), more[2])
    least = np.minimum(np.minimum(more[0], more[1]), more[2])
    excess = np.asarray(sum(more)) / 3
    dense = tissue & (excess > np.maximum(FOLD_MORE, (FOLD - 1) * around)) & (most - least > GREY * most)
    joined = morphed(dense, cv2.MORPH_CLOSE, 40 / spacing_um)
    return _bands(without_specks(joined, FOLD_UM2 / spacing_um**2)) & tissue


def _bands(mask: Plane) -> Plane:
    """The pieces of a mask that are at least twice as long as they are wide."""
    found = np.zeros(mask.shape, np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for outline in outlines:
        sides = sorted(cv2.minAreaRect(outline)[1])
        if sides[1] + 1 >= 2 * (sides[0] + 1):
            cv2.drawContours(found, [outline], -1, 1, cv2.FILLED)
    return (found > 0) & mask


def blurred_share(tile: NDArray[np.uint8], tissue: NDArray[np.bool_], spacing_um: float) -> float:
    """The share of a tile's tissue that is out of focus.

    Args:
        tile: (h, w, 3) uint8, RGB, of about `FOCUS_UM` µm/px.
        tissue: (h', w') bool, of the same square, coarser.
    """
    side = max(4, round(CELL_UM / spacing_um))
    size = tile.shape[1] // side, tile.shape[0] // side
    if min(*size, *tissue.shape) < 1:
        return 0.0
    grey = np.asarray(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), np.float32)
    fine, coarse = (np.asarray(cv2.GaussianBlur(grey, (0, 0), sigma)) for sigma in (1.0, 4.0))
    parts = (grey - fine) ** 2, (fine - coarse) ** 2, grey
    small, large, mean = (np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA)) for part in parts)
    within = cv2.resize(tissue.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.5
    if not within.any():
        return 0.0
    blurred = (small < FINE**2 * large) | (large < (CONTRAST * (240 - mean)) ** 2)
    return float(blurred[within].mean())


def _shares(where: Plane, x: NDArray[Any], y: NDArray[Any], side: float) -> NDArray[np.float32]:
    """Of a map, the share that tiles at (x, y) px of a side have, (N,) float32; what overhangs counts as
    none."""
    sums = cv2.integral(where.astype(np.uint8)).astype(np.float64)
    height, width = where.shape
    left, top = (
        np.clip(np.rint(origin).astype(np.int64), 0, most) for origin, most in ((x, width), (y, height))
    )
    right = np.clip(np.maximum(np.rint(x + side).astype(np.int64), left + 1), 0, width)
    bottom = np.clip(np.maximum(np.rint(y + side).astype(np.int64), top + 1), 0, height)
    counts = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    areas = np.maximum(1, (right - left) * (bottom - top))
    return np.asarray(counts / areas, np.float32)
