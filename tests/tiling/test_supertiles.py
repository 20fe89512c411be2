"""Supertiles hold every tile once, and cutting them gives the pixels of reading tile by tile."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slide2vec.geometry import TileGeometry, floor_to_level, tile_geometry
from slide2vec.tiling.supertiles import MAX_SIDE_PX, MAX_SIDE_TILES, plan_supertiles


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


def test_far_tiles_are_not_read_together() -> None:
    corners = np.array([0, 0, 7, 7]) * 448, np.array([0, 7, 0, 7]) * 448
    supertiles = plan_supertiles(*corners, geometry(), 1.0)
    assert [s.size for s in supertiles] == [(448, 448)] * 4


@pytest.mark.parametrize(("gap", "reads"), [(16, 1), (64, 1), (80, 2), (96, 2)])
def test_tiles_are_read_apart_where_that_saves_more_than_a_read_costs(gap: int, reads: int) -> None:
    """Two tiles of 64 px; a gap of 64 x 64 px decodes as much as a read costs."""
    x, y = np.array([0, 64 + gap]), np.array([0, 0])
    flat = tile_geometry(
        requested_tile_size_px=64, requested_spacing_um=0.25, base_spacing_um=0.25, downsamples=[1.0]
    )
    for first, second in ((x, y), (y, x)):
        assert len(plan_supertiles(first, second, flat, 1.0, file_tile=(16, 16))) == reads


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
