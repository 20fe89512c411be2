"""Tiles that are dropped for their pixels: white, black, gray or blurred ones.

Pixels are looked at in `qc_spacing_um`, a coarse spacing, so that this costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import FilterConfig
from slide2vec.geometry import TileGeometry, select_level
from slide2vec.readers import SlideReader
from slide2vec.readers.reader import planning_downsamples

__all__ = ["good_tiles", "looks_good", "tiles_at"]

Pixels = NDArray[np.uint8]

#: Side of what is read at once, in tiles.
_WINDOW_TILES = 8


@dataclass(frozen=True)
class _View:
    """How tiles are looked at: the level, their side in it, and the side they are brought to."""

    level: int
    read_px: int
    qc_px: int


def good_tiles(
    reader: SlideReader,
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    geometry: TileGeometry,
    config: FilterConfig,
) -> NDArray[np.bool_]:
    """Which tiles pass the pixel filters that `config` switches on, (N,) bool.

    Args:
        x, y: (N,) int64, level-0 px.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    good = np.ones(len(x), bool)
    if not (config.filter_white or config.filter_black or config.filter_grayspace or config.filter_blur):
        return good
    for index, tile in tiles_at(reader, x, y, geometry, config.qc_spacing_um):
        good[index] = tile.size == 0 or looks_good(tile, config)
    return good


def looks_good(tile: Pixels, config: FilterConfig) -> bool:
    """Whether a tile, (h, w, 3) uint8, passes the filters that `config` switches on."""
    if config.filter_white and (tile > config.white_threshold).all(-1).mean() > config.fraction_threshold:
        return False
    if config.filter_black and (tile < config.black_threshold).all(-1).mean() > config.fraction_threshold:
        return False
    if config.filter_grayspace:
        saturation = np.asarray(cv2.cvtColor(tile, cv2.COLOR_RGB2HSV))[:, :, 1].astype(np.float32) / 255.0
        gray = saturation < config.grayspace_saturation_threshold
        if gray.mean() > config.grayspace_fraction_threshold:
            return False
    if config.filter_blur:
        edges = cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_64F)
        return bool(np.asarray(edges).var() >= config.blur_threshold)
    return True


def _view(reader: SlideReader, geometry: TileGeometry, spacing_um: float) -> _View:
    base = geometry.base_spacing_um
    # Finer than level 0 is answered with level 0, enlarged.
    spacing = max(spacing_um, base)
    choice = select_level(spacing, base, planning_downsamples(reader), geometry.tolerance)
    side_um = geometry.requested_tile_size_px * geometry.requested_spacing_um
    return _View(
        level=choice.level,
        read_px=max(1, round(side_um / choice.spacing_um)),
        qc_px=max(1, round(side_um / spacing_um)),
    )


def tiles_at(
    reader: SlideReader,
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    geometry: TileGeometry,
    spacing_um: float,
) -> Iterator[tuple[int, Pixels]]:
    """(index, pixels) of every tile at a spacing, without what lies outside the slide; window by window."""
    view = _view(reader, geometry, spacing_um)
    downsample = reader.downsamples[view.level]
    width, height = reader.level_dimensions[view.level]
    px, py = (np.floor(origins * (1.0 / downsample)).astype(np.int64) for origins in (x, y))
    span = _WINDOW_TILES * view.read_px
    for left, top, members in _windows(px // span, py // span):
        x0, y0 = left * span, top * span
        size = (min(span + view.read_px, width - x0), min(span + view.read_px, height - y0))
        corner = (round(x0 * downsample), round(y0 * downsample))
        window = reader.read_region(corner, view.level, size)
        for index in members.tolist():
            yield index, _cut(window, int(px[index]) - x0, int(py[index]) - y0, view)


def _windows(
    columns: NDArray[np.int64], rows: NDArray[np.int64]
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """(column, row, indices of its tiles) of each window that holds tiles."""
    if not len(columns):
        return
    order = np.lexsort((rows, columns))
    changes = (np.diff(columns[order]) != 0) | (np.diff(rows[order]) != 0)
    for members in np.split(order, np.flatnonzero(changes) + 1):
        yield int(columns[members[0]]), int(rows[members[0]]), members


def _cut(window: Pixels, x: int, y: int, view: _View) -> Pixels:
    part = window[y : y + view.read_px, x : x + view.read_px]
    if view.read_px == view.qc_px:
        return part
    height, width = part.shape[:2]
    tile = np.zeros((view.read_px, view.read_px, 3), np.uint8)
    tile[:height, :width] = part
    way = cv2.INTER_AREA if view.qc_px <= view.read_px else cv2.INTER_LINEAR
    small = np.asarray(cv2.resize(tile, (view.qc_px, view.qc_px), interpolation=way), np.uint8)
    return small[: _inside(height, view), : _inside(width, view)]


def _inside(count: int, view: _View) -> int:
    """How many of the resized pixels begin in the first `count` ones that were read."""
    begins = np.floor(np.arange(view.qc_px) * (1.0 / (view.qc_px / view.read_px)))
    return int((begins < count).sum())
