"""Where the tissue of a synthetic slide is, which kind, and how its texture runs: coarse maps of a slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.synthetic.tissues import TISSUES

__all__ = ["Layout", "make_layout"]

_MAP_SIDE = 1024  # cells along the longer side, at most
_MIN_CELL_PX = 8
_BORDER_PX = 24  # over which one kind gives way to the next, raggedly
#: Share of the tissue that each kind takes where it is painted over what is there, in this order.
_BANDS = {"fat": 0.17, "muscle": 0.15, "glands": 0.24}  # from the deep to the luminal side
_SPOTS = {"tumour": (0.22, 4.0), "lymphoid": (0.07, 9.0), "blood": (0.03, 9.0)}  # share, spots per side

Plane: TypeAlias = NDArray[Any]  # float32


@dataclass(frozen=True)
class Layout:
    """Coarse maps of a slide, (rows, columns) cells of `cell_px` level-0 px.

    Attributes:
        tissue: float32, positive inside tissue, about 1 in the middle of a piece.
        weights: (kinds, rows, columns) float32, how much of each of `TISSUES`.
        texture_x, texture_y: float32, the place in the textures (level-0 px) that a cell shows.
        stain: (rows, columns, 2) float32, factor on haematoxylin and on eosin.
    """

    cell_px: int
    tissue: Plane
    weights: Plane
    texture_x: Plane
    texture_y: Plane
    stain: Plane

    def window(self, coarse: Plane, x: int, y: int, size: int) -> Plane:
        """A coarse map brought to the pixels of the square at (x, y), side `size`, all level-0 px."""
        left, right, across = _between(x, size, self.cell_px, coarse.shape[1])
        above, below, down = _between(y, size, self.cell_px, coarse.shape[0])
        across = across.reshape(-1, *[1] * (coarse.ndim - 2))
        down = down.reshape(-1, *[1] * (coarse.ndim - 1))
        band = coarse[above[0] : below[-1] + 1]
        wide = band[:, left] * (1 - across) + band[:, right] * across
        result: Plane = wide[above - above[0]] * (1 - down) + wide[below - above[0]] * down
        return result

    def cells(self, coarse: Plane, x: int, y: int, size: int) -> Plane:
        """The cells that touch the square at (x, y) and their neighbours, possibly none."""
        first_row, first_column = max(0, y // self.cell_px - 1), max(0, x // self.cell_px - 1)
        last_row, last_column = (y + size) // self.cell_px + 2, (x + size) // self.cell_px + 2
        return coarse[..., first_row:last_row, first_column:last_column]


def _between(start: int, size: int, cell_px: int, cells: int) -> tuple[NDArray[Any], NDArray[Any], Plane]:
    """Which two cells each of `size` pixels lies between, and how far (OpenCV's warps round to 1/32)."""
    at = np.clip((np.arange(start, start + size) + 0.5) / cell_px - 0.5, 0, cells - 1)
    low = at.astype(int)
    return low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32)


def make_layout(size_px: tuple[int, int], seed: int) -> Layout:
    """The layout of a slide of `size_px` (width, height) level-0 px: two or three pieces of tissue."""
    rng = np.random.default_rng(seed)
    cell = max(_MIN_CELL_PX, -(-max(size_px) // _MAP_SIDE))
    shape = (-(-size_px[1] // cell), -(-size_px[0] // cell))
    tissue, depth, angle = _pieces(rng, shape)
    weights = _weights(rng, tissue, depth, blur=max(1.0, _BORDER_PX / cell))
    texture_x, texture_y = _texture_place(rng, shape, cell, angle)
    stain = 1.0 + 0.06 * np.stack([_noise(rng, shape, 5.0), _noise(rng, shape, 5.0)], axis=-1)
    stain *= rng.uniform(0.88, 1.12, 2)
    return Layout(cell, tissue, weights, texture_x, texture_y, stain.astype(np.float32))


def _pieces(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Plane, Plane, Plane]:
    """Tissue field, depth (-1 luminal … 1 deep) and the direction of every piece (radians)."""
    rows, columns = shape
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    count = int(rng.integers(2, 4))
    split_columns = columns >= rows
    long, short = max(shape), min(shape)
    tissue = np.full(shape, -1.0, np.float32)
    depth, angle = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for piece in range(count):
        along = long * (piece + 0.5 + rng.uniform(-0.04, 0.04)) / count
        across = short * (0.5 + rng.uniform(-0.08, 0.08))
        cx, cy = (along, across) if split_columns else (across, along)
        a, b = 0.42 * long / count * rng.uniform(0.9, 1.0), 0.36 * short * rng.uniform(0.8, 1.0)
        rx, ry = (a, b) if split_columns else (b, a)
        phi = np.arctan2((y - cy) / ry, (x - cx) / rx)
        wobble = sum(rng.normal(0, 0.07) * np.cos(k * phi + rng.uniform(0, 6.28)) for k in (2, 3, 4, 5, 7))
        field = 1.0 - np.hypot((x - cx) / rx, (y - cy) / ry) / (1.0 + np.asarray(wobble, np.float32))
        direction = rng.uniform(0, 2 * np.pi)
        inside = field > tissue
        depth[inside] = (((x - cx) / rx) * np.cos(direction) + ((y - cy) / ry) * np.sin(direction))[inside]
        angle[inside] = direction - np.pi / 2
        tissue = np.maximum(tissue, field.astype(np.float32))
    return tissue + 0.05 * _noise(rng, shape, 14.0) + 0.02 * _noise(rng, shape, 45.0), depth, angle


def _weights(rng: np.random.Generator, tissue: Plane, depth: Plane, blur: float) -> Plane:
    """(kinds, rows, columns) float32: layers from the luminal to the deep side, and spots in them."""
    inside = tissue > 0
    labels = np.zeros(tissue.shape, np.uint8)
    level = depth + 0.13 * _noise(rng, tissue.shape, 6.0) + 0.05 * _noise(rng, tissue.shape, 20.0)
    luminal, deep, deeper = np.quantile(
        level[inside], [_BANDS["glands"], 1 - _BANDS["fat"] - _BANDS["muscle"], 1 - _BANDS["fat"]]
    )
    labels[level > deep] = TISSUES.index("muscle")
    labels[level > deeper] = TISSUES.index("fat")
    labels[level < luminal] = TISSUES.index("glands")
    for name, (share, frequency) in _SPOTS.items():
        spots = _noise(rng, tissue.shape, frequency)
        labels[spots > np.quantile(spots[inside], 1 - share)] = TISSUES.index(name)
    planes = [(labels == kind).astype(np.float32) for kind in range(len(TISSUES))]
    return np.stack([cv2.GaussianBlur(plane, (0, 0), blur) for plane in planes])


def _texture_place(
    rng: np.random.Generator, shape: tuple[int, int], cell: int, angle: Plane
) -> tuple[Plane, Plane]:
    """Rotated by piece and bent, so that neither fibres nor repeats of a texture line up."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32) * cell
    x = columns * np.cos(angle) + rows * np.sin(angle)
    y = rows * np.cos(angle) - columns * np.sin(angle)
    side = max(shape) * cell
    for frequency in (5.0, 12.0):
        # the displacement's slope, and with it the distortion of nuclei, stays about 0.15
        reach = 0.15 * side / (2 * np.pi * frequency)
        x += reach * _noise(rng, shape, frequency)
        y += reach * _noise(rng, shape, frequency)
    offset = rng.uniform(0, 1e4, 2)
    return (x + offset[0]).astype(np.float32), (y + offset[1]).astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], frequency: float) -> Plane:
    """Smooth noise of unit variance with about `frequency` bumps along the longer side."""
    knots = [max(4, int(2 * frequency * side / max(shape)) + 3) for side in shape]
    values = rng.standard_normal(tuple(knots)).astype(np.float32)
    smooth = cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)
    scaled: Plane = (smooth - smooth.mean()) / smooth.std()
    return scaled
