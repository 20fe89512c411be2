"""Boxes put together from parts of tiles: equal to cutting them out of the whole level, white around it."""

from __future__ import annotations

import numpy as np
import pytest

from slide2vec.prepare.tile_parts import parts_of_boxes

WIDTH, HEIGHT, TILE_W, TILE_H = 50, 43, 16, 8
ACROSS, DOWN = -(-WIDTH // TILE_W), -(-HEIGHT // TILE_H)


@pytest.mark.parametrize("box", [(5, 5), (16, 8), (33, 20), (60, 60), (1, 1)])
@pytest.mark.parametrize("left_out", [(), (0, 9)])
def test_pasting_the_parts_gives_the_boxes(box: tuple[int, int], left_out: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    grid = rng.integers(
        0, 200, (DOWN * TILE_H, ACROSS * TILE_W), np.uint8
    )  # tiles are whole at the edges, too
    stored = np.setdiff1d(np.arange(ACROSS * DOWN), left_out)
    level = np.full((400, 400), 255, np.uint8)
    level[100 : 100 + HEIGHT, 100 : 100 + WIDTH] = grid[:HEIGHT, :WIDTH]
    for tile in left_out:
        x, y = 100 + tile % ACROSS * TILE_W, 100 + tile // ACROSS * TILE_H
        level[y : y + TILE_H, x : x + TILE_W] = 255
    corners = rng.integers(-70, 70, (300, 2))
    corners[:3] = (0, 0), (-60, -60), (WIDTH - 1, HEIGHT - 1)
    parts = parts_of_boxes(corners, box, (WIDTH, HEIGHT), (TILE_W, TILE_H), stored)

    assert set(parts.tiles.tolist()) <= set(stored.tolist()) and parts.is_white
    tiles = [
        grid[tile // ACROSS * TILE_H :, tile % ACROSS * TILE_W :][:TILE_H, :TILE_W]
        for tile in parts.tiles.tolist()
    ]
    tiles.append(np.full(box[::-1], 255, np.uint8))
    assert (parts.at >= 0).all() and (parts.to >= 0).all() and (parts.shape > 0).all()
    for number, (x, y) in enumerate(corners + 100):
        found = np.zeros(box[::-1], np.uint8)
        for tile, at, shape, to in zip(
            parts.tile[number], parts.at[number], parts.shape[number], parts.to[number], strict=True
        ):
            part = tiles[tile][at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]]
            assert part.shape == tuple(shape)  # DALI refuses what reaches out of a tile
            found[to[0] : to[0] + shape[0], to[1] : to[1] + shape[1]] = part
        np.testing.assert_array_equal(found, level[y : y + box[1], x : x + box[0]])


def test_inside_the_level_nothing_is_white_and_no_other_tile_is_asked_for() -> None:
    parts = parts_of_boxes(
        np.array([[16, 8], [20, 10]]), (12, 6), (WIDTH, HEIGHT), (TILE_W, TILE_H), np.arange(ACROSS * DOWN)
    )
    assert not parts.is_white
    assert parts.tiles.tolist() == [ACROSS + 1]
