"""Supertiles hold every tile once, and cutting them gives the pixels of reading tile by tile."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slide2vec.geometry import TileGeometry, floor_to_level, tile_geometry
from slide2vec.tiling.supertiles import (
    MAX_SIDE_PX,
    MAX_SIDE_TILES,
    READ_OVERHEAD_PX,
    _Cost,
    _Group,
    _group,
    _split,
    plan_supertiles,
)


def geometry(
    tile: int = 224, spacing: float = 0.5, overlap: float = 0.0, downsample: float = 1.0
) -> TileGeometry:
    return tile_geometry(
        requested_tile_size_px=tile,
        requested_spacing_um=spacing,
        base_spacing_um=0.25,
        downsamples=[1.0, downsample] if downsample != 1 else [1.0],
        overlap=overlap,
    )


def grid(
    columns: int, rows: int, step: int, origin: tuple[int, int] = (0, 0)
) -> tuple[NDArray[np.int64], ...]:
    x, y = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
    return (x.ravel() * step + origin[0]).astype(np.int64), (y.ravel() * step + origin[1]).astype(np.int64)


CASES = {
    "whole rectangle": (*grid(20, 13, 448, (37, 1001)), geometry(), 1.0),
    "single tile": (*grid(1, 1, 448), geometry(), 1.0),
    "overlap": (*grid(12, 9, 224), geometry(overlap=0.5), 1.0),
    "small tiles": (*grid(90, 50, 128), geometry(tile=64), 1.0),
    "large tiles": (*grid(3, 2, 10_000), geometry(tile=5000), 1.0),
    "non-integer downsample": (
        *grid(30, 17, 897, (11, 5)),
        geometry(spacing=1.0, downsample=4.00361),
        4.00361,
    ),
    "over the edge": (*grid(6, 6, 448, (-100, -300)), geometry(), 1.0),
}


def ragged() -> tuple[NDArray[np.int64], NDArray[np.int64], TileGeometry, float]:
    x, y = grid(60, 60, 448)
    keep = np.random.default_rng(0).random(len(x)) < 0.3
    keep &= (x - 13_000) ** 2 + (y - 12_000) ** 2 < 11_000**2
    return x[keep], y[keep], geometry(), 1.0


CASES["ragged"] = ragged()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("grouped", [True, False])
def test_every_tile_once_at_its_own_origin(case: tuple[NDArray[np.int64], ...], grouped: bool) -> None:
    x, y, geo, downsample = case
    supertiles = plan_supertiles(x, y, geo, downsample, grouped=grouped)  # type: ignore[arg-type]
    assert sorted(np.concatenate([s.tiles for s in supertiles]).tolist()) == list(range(len(x)))
    for supertile in supertiles:
        location = np.array(supertile.location_lv0)
        origin = floor_to_level(location, downsample)  # type: ignore[arg-type]
        own = np.stack([floor_to_level(v[supertile.tiles], downsample) for v in (x, y)], axis=1)  # type: ignore[arg-type]
        assert np.array_equal(origin + supertile.offsets, own)
        assert (supertile.offsets >= 0).all()
        side = geo.read_tile_size_px  # type: ignore[attr-defined]
        assert ((supertile.offsets + side).max(axis=0) == supertile.size).all()
        assert max(supertile.size) <= max(MAX_SIDE_PX, side)
        assert len(supertile.tiles) <= (MAX_SIDE_TILES**2 if grouped else 1)


def test_whole_tissue_is_read_in_large_blocks() -> None:
    x, y, geo, downsample = CASES["whole rectangle"]
    supertiles = plan_supertiles(x, y, geo, downsample)
    assert len(supertiles) == 3 * 2
    assert max(len(s.tiles) for s in supertiles) == 49


def flat(tile: int, overlap: float = 0.0) -> TileGeometry:
    """Tiles of as many px at level 0, read as they are."""
    return tile_geometry(
        requested_tile_size_px=tile,
        requested_spacing_um=0.25,
        base_spacing_um=0.25,
        downsamples=[1.0],
        overlap=overlap,
    )


@pytest.mark.parametrize(
    ("tile", "overlap", "count", "blocks"),
    [
        (448, 0.0, 20, [7, 7, 6]),  # 3136 px of at most 3200
        (448, 0.5, 30, [13, 13, 4]),  # 12 steps of 224 and a tile: 3136
        (200, 0.0, 33, [16, 16, 1]),  # 16 tiles are 3200
        (128, 0.0, 40, [16, 16, 8]),  # no more than 16, though 25 would fit
        (1600, 0.0, 5, [2, 2, 1]),
        (1067, 0.0, 3, [2, 1]),  # 3 would be 3201 px
        (1601, 0.0, 3, [1, 1, 1]),
        (3200, 0.0, 2, [1, 1]),
        (5000, 0.0, 2, [1, 1]),
    ],
)
def test_a_block_has_as_many_whole_steps_as_fit(
    tile: int, overlap: float, count: int, blocks: list[int]
) -> None:
    geo = flat(tile, overlap)
    along = np.arange(count) * geo.read_step_px + 37
    for x, y in ((along, along * 0 - 5), (along * 0 - 5, along)):
        assert [len(s.tiles) for s in plan_supertiles(x, y, geo, 1.0)] == blocks


def test_blocks_go_from_top_to_bottom_in_each_column_of_blocks() -> None:
    x, y = grid(4, 6, 1600, (-100, 37))
    supertiles = plan_supertiles(x, y, flat(1600), 1.0)
    corners = [(x, y) for x in (-100, 3100) for y in (37, 3237, 6437)]
    assert [s.location_lv0 for s in supertiles] == corners
    assert {s.size for s in supertiles} == {(3200, 3200)}
    assert supertiles[0].tiles.tolist() == [0, 1, 6, 7]
    assert supertiles[0].offsets.tolist() == [[0, 0], [0, 1600], [1600, 0], [1600, 1600]]
    assert len(plan_supertiles(*grid(4, 4, 1600), flat(1600), 1.0)) == 4


def test_neighbours_in_different_blocks_are_not_read_together() -> None:
    """Of blocks of 16 x 16 tiles: one tile in the last corner of a block, one in the first of the next."""
    x, y = np.array([0, 240, 256]), np.array([0, 256, 240])
    supertiles = plan_supertiles(x, y, flat(16), 1.0, file_tile=(16, 16))
    assert [s.tiles.tolist() for s in supertiles] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("left", "right", "top", "bottom", "decoded"),
    [
        (0, 0, 0, 0, 16 * 32),
        (1, 1, 0, 0, 32 * 32),  # a tile that lies across two of the file's
        (0, 16, 0, 0, 32 * 32),
        (31, 32, 0, 0, 32 * 32),
        (0, 0, 16, 16, 16 * 32),
        (0, 0, 16, 17, 16 * 64),
        (-16, 0, -32, 16, 32 * 64),
    ],
)
def test_a_read_costs_the_whole_tiles_of_the_file_that_it_touches(
    left: int, right: int, top: int, bottom: int, decoded: int
) -> None:
    """Of tiles of 16 px in a file with tiles of 16 x 32 px."""
    assert _Cost(16, (16, 32)).of(_Group([0], left, right, top, bottom)) == decoded + READ_OVERHEAD_PX


def without(x: NDArray[np.int64], y: NDArray[np.int64], *left_out: int) -> tuple[NDArray[np.int64], ...]:
    return np.delete(x, left_out), np.delete(y, left_out)


def test_a_block_with_hardly_a_gap_is_read_whole() -> None:
    """49 tiles of 50, though reading it in parts would decode a tile less; not 48."""
    x, y = grid(10, 5, 200)
    of_file = {"file_tile": (200, 200)}
    for corner in (0, 4, 45, 49):
        assert len(plan_supertiles(*without(x, y, corner), flat(200), 1.0, **of_file)) == 1  # type: ignore[arg-type]
    wider = without(*grid(12, 5, 200), 0)
    assert len(plan_supertiles(*wider, flat(200), 1.0, **of_file)) == 1  # type: ignore[arg-type]
    parts = plan_supertiles(*without(x, y, 0, 1), flat(200), 1.0, **of_file)  # type: ignore[arg-type]
    assert len(parts) > 1
    decoded = sum(width * height for width, height in (part.size for part in parts))
    assert decoded + len(parts) * READ_OVERHEAD_PX < 50 * 200 * 200 + READ_OVERHEAD_PX


def test_a_group_is_cut_at_the_middle_of_its_longer_side() -> None:
    """One that begins behind the middle, 500.5, belongs to the second half: of tiles of 10 px at 0 to 1001,
    and at 0 to 1000."""
    first_half, second_half = [[0, 1], [2]], [[0], [1, 2]]
    for at, halves in (
        ([0, 500, 1001], first_half),
        ([0, 501, 1001], second_half),
        ([0, 500, 1000], first_half),
        ([0, 501, 1000], second_half),
    ):
        for columns, rows in ((at, [0, 300, 0]), ([0, 300, 0], at)):
            group = _group([0, 1, 2], columns, rows)
            free = _Cost(10, (1, 1))
            assert [part.tiles for part in _split(group, columns, rows, free)] == [[0], [1], [2]]
            whole = [part.tiles for part in _split(group, columns, rows, OneCut())]
            assert whole == halves


def test_a_square_group_is_cut_into_left_and_right() -> None:
    columns, rows = [0, 0, 1001], [0, 1001, 1001]
    halves = _split(_group([0, 1, 2], columns, rows), columns, rows, OneCut())
    assert [part.tiles for part in halves] == [[0, 1], [2]]


class OneCut(_Cost):
    """A group of three is dear, one of two cheap, so that a group is cut once."""

    def __init__(self) -> None:
        super().__init__(10, (1, 1))

    def of(self, group: _Group) -> float:
        return {1: 2.0, 2: 3.0, 3: 9.0}[len(group.tiles)]


def test_without_a_files_tiles_they_are_taken_as_256_px() -> None:
    x, y, geo, _ = CASES["ragged"]
    plans = [plan_supertiles(x, y, geo, 1.0, file_tile=tile) for tile in (None, (256, 256), (250, 256))]  # type: ignore[arg-type]
    ours, same, other = ([each.tiles.tolist() for each in plan] for plan in plans)
    assert ours == same != other


def test_far_tiles_are_not_read_together() -> None:
    corners = np.array([0, 0, 7, 7]) * 448, np.array([0, 7, 0, 7]) * 448
    supertiles = plan_supertiles(*corners, geometry(), 1.0)
    assert [s.size for s in supertiles] == [(448, 448)] * 4


@pytest.mark.parametrize(("gap", "reads"), [(16, 1), (64, 1), (80, 2), (96, 2)])
def test_tiles_are_read_apart_where_that_saves_more_than_a_read_costs(gap: int, reads: int) -> None:
    """Two tiles of 64 px; a gap of 64 x 64 px decodes as much as a read costs."""
    x, y = np.array([0, 64 + gap]), np.array([0, 0])
    for first, second in ((x, y), (y, x)):
        assert len(plan_supertiles(first, second, flat(64), 1.0, file_tile=(16, 16))) == reads


def test_a_read_costs_4096_px() -> None:
    """A gap of 17 x 241 px is a pixel more."""
    x, y = np.array([0, 17 + 241]), np.array([0, 0])
    assert len(plan_supertiles(x, y, flat(17), 1.0, file_tile=(1, 1))) == 2


def test_reads_less_than_tile_by_tile_where_tissue_is_ragged() -> None:
    """Decoded pixels of the file's 256 px tiles: every grouping must save, none may waste."""
    x, y, geo, _ = CASES["ragged"]

    def decoded(supertiles: list[object]) -> int:
        total = 0
        for s in supertiles:
            (left, top), (width, height) = s.location_lv0, s.size  # type: ignore[attr-defined]
            total += ((left + width - 1) // 256 - left // 256 + 1) * (
                (top + height - 1) // 256 - top // 256 + 1
            )
        return total

    grouped = decoded(plan_supertiles(x, y, geo, 1.0))  # type: ignore[arg-type]
    single = decoded(plan_supertiles(x, y, geo, 1.0, grouped=False))  # type: ignore[arg-type]
    assert grouped < 0.95 * single


def test_no_tiles() -> None:
    empty = np.empty(0, np.int64)
    assert plan_supertiles(empty, empty, geometry(), 1.0) == []
