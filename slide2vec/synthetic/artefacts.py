"""What is on slides besides tissue: pen, folds, bubbles, edges of coverslips, dust, blur, black borders.

All at 4 µm/px. Ink and dirt absorb light (their optical densities add up with the tissue's); the glass, the
coverslip and the lamp scale it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.synthetic.stained import smooth_noise

__all__ = [
    "INKS",
    "Scene",
    "blacken_border",
    "blow_bubbles",
    "blur",
    "draw_pen",
    "fold",
    "lay_coverslip",
    "scatter_dust",
]

Plane: TypeAlias = NDArray[Any]  # (h, w) float32

#: Optical densities (red, green, blue) of markers that laboratories use, one layer of ink.
INKS = {
    "black": (0.95, 0.97, 0.95),
    "blue": (0.85, 0.60, 0.20),
    "green": (0.85, 0.30, 0.55),
    "red": (0.10, 0.85, 0.75),
}


@dataclass(eq=False)
class Scene:
    """A slide before it is scanned, changed in place; planes at 4 µm/px.

    Attributes:
        light: (h, w, 3) float32, what the lamp sends through bare glass, grey levels.
        density: (h, w, 3) float32, optical density of tissue and dirt.
        tissue: (h, w) float32, cover by tissue, 0 to 1.
        ink: (h, w) float32, cover by pen.
        black: (h, w) bool, not scanned.
        uncertain: (h, w) float32 px, how far from an outline nobody can say what is tissue: blur.
        marks: what else there is, by name, (h, w) bool: "fold", "bubble", "blur".
    """

    light: Plane
    density: Plane
    tissue: Plane
    ink: Plane
    black: Plane
    uncertain: Plane
    marks: dict[str, Plane]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.tissue.shape[0], self.tissue.shape[1]


def draw_pen(rng: np.random.Generator, scene: Scene, inks: tuple[str, ...]) -> None:
    """One to four marks of one marker: rings around tissue, lines, dots; some across tissue."""
    ink = np.asarray(INKS[str(rng.choice(inks))], np.float32) * rng.uniform(0.75, 1.4)
    amount = np.zeros(scene.shape, np.float32)
    for _ in range(int(rng.integers(1, 5))):
        stroke = np.zeros(scene.shape, np.uint8)
        tip = int(rng.uniform(90, 230))
        kind = str(rng.choice(["ring", "line", "line", "dot"]))
        _STROKES[kind](rng, stroke, tip)
        soft = cv2.GaussianBlur(stroke, (0, 0), 2.5).astype(np.float32) / 255
        edge = cv2.distanceTransform((stroke > 127).astype(np.uint8), cv2.DIST_L2, 3)
        pooled = 1 + 0.35 * np.exp(-edge / 8)  # ink dries at its rim
        streaks = 1 + 0.12 * smooth_noise(rng, scene.shape, 30) + 0.05 * smooth_noise(rng, scene.shape, 5)
        amount += soft * pooled * np.clip(streaks, 0.4, None)
    scene.density += amount[..., None] * ink
    np.maximum(scene.ink, np.clip(amount, 0, 1), out=scene.ink)


def _point(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.array([rng.uniform(0.05, 0.95) * shape[1], rng.uniform(0.05, 0.95) * shape[0]])


def _ring(rng: np.random.Generator, stroke: Plane, tip: int) -> None:
    t = np.linspace(0, rng.uniform(5.2, 6.6), 80) + rng.uniform(0, 7)
    radius = rng.uniform(0.12, 0.3) * stroke.shape[0] * (1 + 0.06 * np.cos(2 * t) + 0.04 * np.sin(3 * t + 1))
    points = np.stack([np.cos(t) * radius * rng.uniform(1, 1.5), np.sin(t) * radius], 1)
    cv2.polylines(
        stroke, [(points + _point(rng, stroke.shape)).astype(np.int32)], False, 255, tip, cv2.LINE_AA
    )


def _line(rng: np.random.Generator, stroke: Plane, tip: int) -> None:
    start, end = _point(rng, stroke.shape), _point(rng, stroke.shape)
    middle = (start + end) / 2 + rng.normal(0, 120, 2)
    t = np.linspace(0, 1, 40)[:, None]
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    cv2.polylines(stroke, [points.astype(np.int32)], False, 255, tip, cv2.LINE_AA)


def _dot(rng: np.random.Generator, stroke: Plane, tip: int) -> None:
    centre = tuple(map(int, _point(rng, stroke.shape)))
    cv2.ellipse(stroke, centre, (tip, int(tip * rng.uniform(0.6, 1))), 20, 0, 360, 255, -1, cv2.LINE_AA)


_STROKES = {"ring": _ring, "line": _line, "dot": _dot}


def fold(rng: np.random.Generator, scene: Scene) -> None:
    """Two to six creases in which tissue lies two- or threefold; it stays tissue."""
    folded = np.zeros(scene.shape, np.float32)
    rows, columns = np.nonzero(scene.tissue > 0.5)
    for index in rng.integers(len(rows), size=int(rng.integers(2, 7))) if len(rows) else ():
        crease = np.zeros(scene.shape, np.uint8)
        heading, length = rng.uniform(0, 7), rng.uniform(100, 500)
        t = np.linspace(-0.5, 0.5, 30)
        bend = rng.uniform(-60, 60) * np.cos(3 * t)
        x = columns[index] + length * t * np.cos(heading) - bend * np.sin(heading)
        y = rows[index] + length * t * np.sin(heading) + bend * np.cos(heading)
        for k in range(29):
            caliber = max(2, int(rng.uniform(14, 46) * np.cos(np.pi * t[k])))
            cv2.line(
                crease, (int(x[k]), int(y[k])), (int(x[k + 1]), int(y[k + 1])), 255, caliber, cv2.LINE_AA
            )
        folded += rng.uniform(0.8, 2) * cv2.GaussianBlur(crease, (0, 0), 2).astype(np.float32) / 255
    scene.density *= 1 + folded[..., None]
    _mark(scene, "fold", (folded > 0.4) & (scene.tissue > 0.5))


def blow_bubbles(rng: np.random.Generator, scene: Scene) -> None:
    """One to five air bubbles under the coverslip: a dark rim, a brighter or darker inside."""
    rows, columns = np.mgrid[0 : scene.shape[0], 0 : scene.shape[1]].astype(np.float32)
    for _ in range(int(rng.integers(1, 6))):
        x, y = _point(rng, scene.shape)
        radius = rng.uniform(80, 380)
        angle = np.arctan2(rows - y, columns - x)
        lobed = radius * (1 + 0.05 * np.cos(2 * angle + rng.uniform(0, 7)) + 0.03 * np.cos(3 * angle))
        inside = lobed - np.hypot(columns - x, (rows - y) * rng.uniform(0.8, 1.2))
        rim = rng.uniform(0.15, 0.5) * np.exp(-((inside / rng.uniform(3, 7)) ** 2))
        scene.density += rim[..., None].astype(np.float32)
        scene.light *= 1 + (rng.uniform(-0.05, 0.03) * np.clip(inside / 6, 0, 1))[..., None].astype(
            np.float32
        )
        _mark(scene, "bubble", inside > -6)


def lay_coverslip(rng: np.random.Generator, scene: Scene) -> None:
    """The edge of the coverslip crosses the slide: a dark line, other light beyond it, mountant that ran
    out."""
    height, width = scene.shape
    side = int(rng.integers(4))
    slope = rng.uniform(-0.03, 0.03)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    across, along = (rows, columns) if side % 2 else (columns, rows)
    length = height if side % 2 else width
    if side >= 2:
        across = length - 1 - across
    beyond = rng.uniform(0.05, 0.18) * length + slope * along - across
    line = rng.uniform(0.2, 0.7) * np.exp(-((beyond / rng.uniform(4, 12)) ** 2))
    line += rng.uniform(0.05, 0.25) * np.exp(-(((beyond - rng.uniform(15, 40)) / rng.uniform(3, 6)) ** 2))
    scene.density += line[..., None].astype(np.float32)
    outside = np.clip(beyond / 3, 0, 1)
    cast = rng.uniform(-0.05, 0.04) + rng.normal(0, 0.006, 3)
    scene.light *= (1 + outside[..., None] * cast).astype(np.float32)
    ran = np.clip(smooth_noise(rng, scene.shape, 120) - 0.6, 0, 1) * outside * rng.uniform(0, 0.12)
    scene.density += ran[..., None].astype(np.float32)


def scatter_dust(rng: np.random.Generator, scene: Scene) -> None:
    """Grey specks of 10 to 80 µm and fibres, out of focus, as on every slide."""
    dirt = np.zeros(scene.shape, np.float32)
    for _ in range(int(rng.integers(20, 90))):
        x, y = map(int, _point(rng, scene.shape))
        axes = int(rng.integers(1, 10)), int(rng.integers(1, 7))
        cv2.ellipse(dirt, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.05, 0.6)), -1)
    for _ in range(int(rng.integers(2, 9))):
        at = _point(rng, scene.shape)
        heading = rng.uniform(0, 7) + np.cumsum(rng.normal(0, 0.25, int(rng.integers(8, 30))))
        points = at + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1) * 14, 0)
        shade = float(rng.uniform(0.03, 0.2))
        cv2.polylines(dirt, [points.astype(np.int32)], False, shade, int(rng.integers(2, 5)), cv2.LINE_AA)
    scene.density += cv2.GaussianBlur(dirt, (0, 0), 1.5)[..., None] * np.array([1.0, 0.98, 1.02], np.float32)


def blur(rng: np.random.Generator, scene: Scene, picture: Plane) -> Plane:
    """The picture with one to three strips of the scan out of focus, by 10 to 40 µm; tissue stays tissue."""
    height, width = scene.shape
    for _ in range(int(rng.integers(1, 4))):
        sigma = float(rng.uniform(2.5, 10))
        strip = np.zeros(scene.shape, np.float32)
        left, high = int(rng.uniform(0, 0.7) * width), int(rng.uniform(0, 0.7) * height)
        strip[
            high : high + int(rng.uniform(0.2, 0.6) * height),
            left : left + int(rng.uniform(0.2, 0.6) * width),
        ] = 1
        soft = cv2.GaussianBlur(picture, (0, 0), sigma)
        alpha = cv2.GaussianBlur(strip, (0, 0), 3)[..., None]
        picture = picture * (1 - alpha) + soft * alpha
        np.maximum(scene.uncertain, strip * sigma, out=scene.uncertain)
        _mark(scene, "blur", strip > 0.5)
    return picture


def blacken_border(rng: np.random.Generator, scene: Scene) -> None:
    """What was not scanned is black: whole sides, or around a union of scanned fields."""
    height, width = scene.shape
    scanned = np.zeros(scene.shape, bool)
    if rng.random() < 0.5:
        top, bottom = (int(rng.uniform(0, 0.16) * height) for _ in range(2))
        left, right = (int(rng.uniform(0, 0.16) * width) for _ in range(2))
        scanned[top : height - bottom, left : width - right] = True
    else:
        for row in range(0, height, 200):
            left, right = (int(rng.uniform(0, 0.2) * width) for _ in range(2))
            scanned[row : row + 200, left : width - right] = True
    scene.black |= ~scanned


def _mark(scene: Scene, name: str, where: Plane) -> None:
    scene.marks[name] = scene.marks.get(name, np.zeros(scene.shape, bool)) | where
