"""Averages of cells whose pixels come in pieces."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from slide2vec.readers.averaged_box import AveragedBox, AveragedBoxes

LEVEL = np.random.default_rng(1).integers(0, 256, (97, 131, 3), np.uint8)
WHITE = np.pad(LEVEL, ((50, 50), (50, 50), (0, 0)), constant_values=255)


def box(x: int, y: int, width: int, height: int, ratio: int) -> AveragedBox:
    return AveragedBox(np.full((height, width, 3), 7, np.uint8), x, y, ratio)


def give(target: AveragedBox | AveragedBoxes, wide: int, high: int, order: int = 1) -> None:
    target.blank()
    pieces = [(x, y) for y in range(0, len(LEVEL), high) for x in range(0, LEVEL.shape[1], wide)]
    for x, y in pieces[::order]:
        target.put(LEVEL[y : y + high, x : x + wide], x, y)
    target.finish()


def expected(found: AveragedBox) -> np.ndarray:
    height, width = (side * found.ratio for side in found.canvas.shape[:2])
    part = WHITE[found.y + 50 : found.y + 50 + height, found.x + 50 : found.x + 50 + width]
    return cv2.resize(part, found.canvas.shape[1::-1], interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("wide", "high"), [(16, 16), (17, 13), (131, 5), (2, 97), (200, 200)])
@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (5, 3), (-9, -2), (100, 80), (-20, 60)])
def test_cells_are_those_of_the_whole_level(
    x: int, y: int, ratio: int, wide: int, high: int, order: int
) -> None:
    """However it is divided, even into pieces thinner than a cell, and in whatever order they come."""
    found = box(x, y, 6, 5, ratio)
    give(found, wide, high, order)
    np.testing.assert_array_equal(found.canvas, expected(found))


def test_several_boxes_are_filled_at_once() -> None:
    boxes = [box(0, 0, 20, 20, 2), box(1, 1, 12, 9, 3), box(10, 7, 40, 30, 1)]
    give(AveragedBoxes(boxes), 16, 16)
    for each in boxes:
        np.testing.assert_array_equal(each.canvas, expected(each))


def test_pieces_that_are_averaged_already_are_copied() -> None:
    """What lies beside the box is left out."""
    whole, found = box(-3, -3, 40, 30, 3), box(6, 9, 7, 5, 3)
    give(whole, 16, 16)
    found.put(whole.canvas[:5], whole.x, whole.y, 3)
    found.put(whole.canvas[5:], whole.x, whole.y + 15, 3)
    found.put(whole.canvas, 500, 0, 3)
    found.finish()
    np.testing.assert_array_equal(found.canvas, expected(found))


def test_what_is_white_in_one_box_is_not_left_for_the_next() -> None:
    """Cells in full resolution are given up once they are averaged."""
    found = box(1, 1, 10, 10, 2)
    give(found, 16, 16)
    assert not found._strips
