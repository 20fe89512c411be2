"""Tiles on a picture are where they are, to a fraction of a pixel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slide2vec.pictures import lay_squares

Plane = NDArray[np.float32]
SLIDE = (1000, 800)


def laid(x: list[int], y: list[int], side: int, values: list[float]) -> tuple[Plane, Plane]:
    colours = np.array(values, float).reshape(-1, 1)
    paint, covered = lay_squares((40, 50), np.array(x), np.array(y), side, SLIDE, colours)
    return paint[..., 0], covered[..., 0]


def test_an_edge_within_a_pixel_has_a_share_of_it() -> None:
    paint, covered = laid([105], [210], 50, [3.0])  # 20 px of the slide are one of the picture
    np.testing.assert_allclose(covered[10], np.r_[np.zeros(5), 0.375, 0.5, 0.375, np.zeros(42)], atol=1e-6)
    np.testing.assert_allclose(covered[10:14, 6], [0.5, 1.0, 1.0, 0.0], atol=1e-6)
    assert np.allclose(paint[covered > 0], 3.0) and not paint[covered == 0].any()


def test_neighbours_leave_no_seam_and_overlaps_mix() -> None:
    paint, covered = laid([0, 33, 66], [0, 0, 0], 33, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(covered[0, :4], 1.0, atol=1e-6)
    paint, covered = laid([0, 20], [0, 0], 40, [1.0, 3.0])
    np.testing.assert_allclose(paint[0, :3], [1.0, 2.0, 3.0], atol=1e-6)
    assert covered.max() == 1.0


@pytest.mark.parametrize(("x", "y"), [(0, 0), (995, 795), (500, 400)])
def test_less_than_a_pixel_is_drawn_as_one(x: int, y: int) -> None:
    _, covered = laid([x], [y], 4, [1.0])
    assert covered.sum() == pytest.approx(1.0)
    rows, columns = np.nonzero(covered > 0.2)
    assert abs(columns.mean() - x / 20) <= 1 and abs(rows.mean() - y / 20) <= 1


def test_what_overhangs_the_slide_is_cut() -> None:
    _, covered = laid([960, 1200], [780, 0], 100, [1.0, 1.0])
    assert covered[39, 48:].tolist() == [1.0, 1.0] and covered.sum() == pytest.approx(2.0)
    paint, covered = laid([], [], 100, [])
    assert not covered.any() and paint.shape == (40, 50)
