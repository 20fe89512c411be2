"""Areas as rasters: a pixel is in an area when its middle is (checked against OpenCV, and by areas)."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from slide2vec.tiling.geojson import Area
from slide2vec.tiling.polygons import draw_areas

DIMENSIONS = (4000, 3000)


def area(
    *rings: NDArray[np.float64] | list[tuple[float, float]], label: str | None = "a", no: int = 1
) -> Area:
    return Area(label, tuple(np.array(ring, np.float64) for ring in rings), f"feature {no}")


def square(x: float, y: float, side: float) -> list[tuple[float, float]]:
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def star(rng: np.random.Generator, points: int) -> NDArray[np.float64]:
    """An outline that reaches beyond the slide now and then."""
    angle, far = np.sort(rng.uniform(0, 2 * np.pi, points)), rng.uniform(200, 1800, points)
    centre = rng.uniform(0, 1, 2) * DIMENSIONS
    return np.stack([np.cos(angle) * far, np.sin(angle) * far], 1) + centre


def middles_inside(outline: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    scale = np.array(size) / np.array(DIMENSIONS)
    polygon = (outline * scale).astype(np.float32).reshape(-1, 1, 2)
    return np.array(
        [
            [cv2.pointPolygonTest(polygon, (x + 0.5, y + 0.5), False) > 0 for x in range(size[0])]
            for y in range(size[1])
        ]
    )


@pytest.mark.parametrize("size", [(100, 75), (63, 47), (61, 90)])
def test_pixels_whose_middles_are_inside(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    for _ in range(6):
        outline = star(rng, 30)
        drawn = draw_areas([area(outline)], {"a": (3,)}, size, DIMENSIONS)
        assert set(np.unique(drawn)) <= {0, 3}
        np.testing.assert_array_equal(drawn == 3, middles_inside(outline, size))


def test_holes_and_parts_of_one_feature() -> None:
    rings = square(400, 400, 800), square(600, 600, 200)
    other = area(square(2000, 400, 400))
    drawn = draw_areas([area(*rings), other], {"a": (1,)}, (400, 300), DIMENSIONS)
    assert drawn.sum() == 80 * 80 - 20 * 20 + 40 * 40
    assert drawn[70, 70] == 0 and drawn[50, 50] == drawn[50, 210] == 1


def test_an_area_has_its_size_whatever_the_raster() -> None:
    outline = star(np.random.default_rng(1), 50) * 0.2 + 1200
    exact = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise([*outline, outline[0]]))) / 2
    for side in (4000, 1000, 250):
        drawn = draw_areas([area(outline)], {"a": (1,)}, (side, side * 3 // 4), DIMENSIONS)
        assert drawn.sum() * (4000 / side) ** 2 == pytest.approx(exact, rel=0.02 * 4000 / side / 16 + 1e-3)


def test_later_labels_lie_over_earlier_ones_and_zero_takes_away() -> None:
    areas = [
        area(square(0, 0, 100), label="none"),
        area(square(0, 0, 400), label="Tumor", no=2),
        area(square(200, 0, 400), label="stroma", no=3),
    ]
    labels = {"none": (0,), "tumor": (1,), "stroma": (2, 5)}
    drawn = draw_areas(areas, labels, (40, 30), DIMENSIONS)
    assert drawn[3].tolist()[:8] == [1, 1, 2, 2, 2, 2, 0, 0] and drawn[0, 0] == 0 and drawn[0, 1] == 1


def test_an_area_without_class_is_tissue() -> None:
    drawn = draw_areas([area(square(0, 0, 400), label=None)], {"tissue": (1,)}, (40, 30), DIMENSIONS)
    assert drawn.sum() == 16
    with pytest.raises(ValueError, match=r"feature 1 has no class; give it one of tumor"):
        draw_areas([area(square(0, 0, 400), label=None)], {"tumor": (1,)}, (40, 30), DIMENSIONS)


def test_a_class_that_is_no_label() -> None:
    with pytest.raises(ValueError, match=r"feature 1 has the class 'Stroma', and .* has tissue, tumor: add"):
        draw_areas(
            [area(square(0, 0, 9), label="Stroma")], {"tissue": (1,), "tumor": (2,)}, (4, 3), DIMENSIONS
        )


def test_a_feature_that_is_not_on_the_slide() -> None:
    off = area(square(5000, 10, 50), no=2)
    with pytest.raises(
        ValueError, match=r"feature 2 is not on the slide: x from 5000 to 5050, .* 4000x3000 px"
    ):
        draw_areas([area(square(0, 0, 9)), off], {"a": (1,)}, (40, 30), DIMENSIONS)
    partly = [area(square(0, 0, 400), no=2), off]
    assert draw_areas(partly, {"a": (1,)}, (40, 30), DIMENSIONS).sum() == 16
