"""From a slide's layout to pixels: textures are placed, blended, stained and photographed."""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.synthetic.layout import make_layout
from slide2vec.synthetic.tissues import CONCENTRATION_SCALE, detail_noise, tissue_textures

__all__ = ["GLASS_RGB", "Painter"]

#: Light through bare glass.
GLASS_RGB = (243, 243, 242)
#: Optical density per concentration of haematoxylin, eosin (Ruifrok and Johnston 2001; eosin with the
#: share of blue absorption that scanned eosin has) and of red cells, for red, green and blue light.
_OPTICAL_DENSITY = np.array([[0.65, 0.70, 0.29], [0.06, 0.77, 0.36], [0.10, 0.80, 0.62]], np.float32)
_FRAY_PX = 24.0  # how far noise moves the outline of tissue
_FRAY_KINDS = 0.15  # and borders between kinds, in units of their weights
_SHARPNESS = 16.0  # of borders between kinds
_EDGE_PX = 3.0  # width of the transition from tissue to glass
_SENSOR_NOISE = 1.6  # standard deviation, grey levels

Pixels: TypeAlias = NDArray[Any]  # (h, w, 3) uint8 RGB
Plane: TypeAlias = NDArray[Any]  # float32


class Painter:
    """Paints any square of one slide; every call is independent, so threads may share a painter."""

    def __init__(self, size_px: tuple[int, int], seed: int, spacing_um: float) -> None:
        self._size = size_px
        self._layout = make_layout(size_px, seed)
        self._textures = tissue_textures(spacing_um)
        self._detail = detail_noise()
        noise = np.random.default_rng(seed).normal(0, _SENSOR_NOISE, (*self._detail.shape, 1))
        self._sensor = np.repeat(np.round(noise), 3, axis=-1).astype(np.int8)
        rows, columns = np.gradient(self._layout.tissue)
        self._slope = float(np.median(np.hypot(rows, columns))) / self._layout.cell_px

    def is_glass(self, x: int, y: int, size: int) -> bool:
        """Whether the square at (x, y) holds no tissue at all."""
        cells = self._layout.cells(self._layout.tissue, x, y, size)
        return not cells.size or float(cells.max()) < -5 * _FRAY_PX * self._slope

    def glass(self, size: int) -> Pixels:
        """A (size, size, 3) square of bare glass, the same everywhere."""
        return self._photograph(np.full((size, size, 3), GLASS_RGB, np.float32), 0, 0)

    def paint(self, x: int, y: int, size: int) -> Pixels:
        """The (size, size, 3) uint8 RGB square whose corner is at (x, y) level-0 px."""
        layout = self._layout
        detail = _wrapped(self._detail, x, y, size)
        tissue = layout.window(layout.tissue, x, y, size)
        distance = tissue / self._slope + _FRAY_PX * detail
        alpha = np.clip(distance / _EDGE_PX, 0.0, 1.0)
        concentration = self._concentration(x, y, size)
        alpha *= 1.0 / CONCENTRATION_SCALE
        stain = layout.window(layout.stain, x, y, size)
        concentration *= cv2.merge([alpha * stain[..., 0], alpha * stain[..., 1], alpha])
        light = cv2.exp(cv2.transform(concentration, -_OPTICAL_DENSITY.T))
        light *= np.asarray(GLASS_RGB, np.float32)
        self._clear_outside(light, x, y)
        return self._photograph(light, x, y)

    def _concentration(self, x: int, y: int, size: int) -> Plane:
        """(size, size, 3) float32 concentrations times their scale, as if tissue were everywhere."""
        layout = self._layout
        kinds = [k for k, cells in enumerate(layout.cells(layout.weights, x, y, size)) if cells.any()]
        place = self._place(x, y, size)
        if len(kinds) == 1:
            return self._sample(kinds[0], place).astype(np.float32)
        total = np.zeros((size, size), np.float32)
        blend = np.zeros((size, size, 3), np.float32)
        for kind in kinds:
            share = layout.window(layout.weights[kind], x, y, size)
            fray = _wrapped(self._detail, x + 977 * kind, y + 331 * kind, size)
            # times the share itself: a kind that is absent stays absent, in every square alike
            share *= cv2.exp(_SHARPNESS * (share + _FRAY_KINDS * fray))
            total += share
            blend += self._sample(kind, place) * cv2.merge([share] * 3)
        return cv2.divide(blend, cv2.merge([total] * 3))

    def _place(self, x: int, y: int, size: int) -> tuple[Plane, Plane]:
        """Texture coordinates, moved by whole textures to be small (cv2.remap needs less than 2^15)."""
        side = self._textures[0].shape[0]
        planes = []
        for coarse in (self._layout.texture_x, self._layout.texture_y):
            plane = self._layout.window(coarse, x, y, size)
            planes.append(plane - np.floor(plane.min() / side) * side)
        return planes[0], planes[1]

    def _sample(self, kind: int, place: tuple[Plane, Plane]) -> Pixels:
        return cv2.remap(self._textures[kind], *place, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)

    def _clear_outside(self, light: Plane, x: int, y: int) -> None:
        """Glass beyond the slide's edge: what pads the last tiles."""
        width, height = self._size
        light[max(0, height - y) :] = GLASS_RGB
        light[:, max(0, width - x) :] = GLASS_RGB

    def _photograph(self, light: Plane, x: int, y: int) -> Pixels:
        noise = _wrapped(self._sensor, x, y, light.shape[0])
        return cv2.add(light, noise, dtype=cv2.CV_8U)


def _wrapped(plane: NDArray[Any], x: int, y: int, size: int) -> NDArray[Any]:
    """A square of a seamless plane."""
    top, left = y % plane.shape[0], x % plane.shape[1]
    if max(top, left) + size <= plane.shape[0]:
        return plane[top : top + size, left : left + size]
    rows = np.arange(top, top + size) % plane.shape[0]
    columns = np.arange(left, left + size) % plane.shape[1]
    square: NDArray[Any] = plane.take(rows, axis=0).take(columns, axis=1)
    return square
