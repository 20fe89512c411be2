"""Level choice and sizes against values worked out by hand from the rules of HS2P."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slide2vec.errors import SpacingError
from slide2vec.geometry import (
    floor_to_level,
    is_plausible_spacing,
    nearest_downsample_level,
    region_geometry,
    select_level,
    subtile_geometry,
    tile_geometry,
)


@pytest.mark.parametrize(
    ("requested", "base", "downsamples", "level", "within"),
    [
        (0.5, 0.25, [1, 4, 16], 0, False),  # nearest is level 0: read finer, then reduce
        (1.0, 0.25, [1, 4, 16], 1, True),
        (1.04, 0.25, [1, 4, 16], 1, True),  # 4% off: within 5%
        (0.9, 0.25, [1, 4, 16], 0, False),  # nearest (1.0) is too coarse: step finer
        (0.5, 0.499, [1, 2], 0, True),
        (0.48, 0.5, [1, 2], 0, True),  # finer than level 0, but within tolerance
        (2.0, 0.25, [1, 2, 4, 8], 3, True),
        # 5 % is of the request: of these levels it would take the first in, and leave the second out.
        (1.0, 0.5263, [1, 2], 0, False),
        (1.0, 0.4755, [1, 2], 1, True),
        (0.5, 0.125, [1, 3.7], 1, False),  # nearest is finer than asked for, by 7.5 %: read, then reduce
    ],
)
def test_level(requested: float, base: float, downsamples: list[float], level: int, within: bool) -> None:
    choice = select_level(requested, base, downsamples)
    assert (choice.level, choice.is_within_tolerance) == (level, within)
    assert choice.spacing_um == pytest.approx(base * downsamples[level])


def test_a_level_just_as_far_off_as_allowed_is_read_as_it_is() -> None:
    choice = select_level(1.0, 0.625, [1, 2], tolerance=0.25)
    assert (choice.level, choice.spacing_um, choice.is_within_tolerance) == (1, 1.25, True)


@pytest.mark.parametrize("requested", [0.25, 0.47])
def test_no_upsampling(requested: float) -> None:
    with pytest.raises(SpacingError, match="spacing_at_level_0"):
        select_level(requested, 0.5, [1, 4])


def test_reduced_tile() -> None:
    geometry = tile_geometry(
        requested_tile_size_px=224, requested_spacing_um=0.5, base_spacing_um=0.25, downsamples=[1, 4]
    )
    assert (geometry.read_level, geometry.read_tile_size_px, geometry.tile_size_lv0) == (0, 448, 448)
    assert (geometry.read_step_px, geometry.step_px_lv0) == (448, 448)


def test_coarse_level_with_overlap() -> None:
    geometry = tile_geometry(
        requested_tile_size_px=225,
        requested_spacing_um=1.0,
        base_spacing_um=0.25,
        downsamples=[1, 4],
        overlap=0.5,
    )
    # 225 * 0.5 = 112.5 rounds half to even: 112; 112 * 900 / 225 = 448
    assert (geometry.read_tile_size_px, geometry.tile_size_lv0) == (225, 900)
    assert (geometry.read_step_px, geometry.step_px_lv0) == (112, 448)


def test_within_tolerance_keeps_size_and_scales_by_true_spacing() -> None:
    geometry = tile_geometry(
        requested_tile_size_px=224, requested_spacing_um=0.5, base_spacing_um=0.26, downsamples=[1, 2]
    )
    assert geometry.is_within_tolerance
    assert (geometry.read_tile_size_px, geometry.tile_size_lv0) == (224, 448)


def test_sizes_and_steps_are_rounded_not_cut() -> None:
    finer = tile_geometry(
        requested_tile_size_px=224, requested_spacing_um=0.5, base_spacing_um=0.3, downsamples=[1]
    )
    assert (finer.read_tile_size_px, finer.tile_size_lv0) == (373, 373)  # 373.3
    coarser = tile_geometry(
        requested_tile_size_px=224,
        requested_spacing_um=1.0,
        base_spacing_um=0.25,
        downsamples=[1, 4.003],
        overlap=0.3,
    )
    assert (coarser.read_tile_size_px, coarser.tile_size_lv0) == (224, 897)  # 896.7
    assert (coarser.read_step_px, coarser.step_px_lv0) == (157, 629)  # 156.8, 628.7


def test_the_least_step_is_one_pixel() -> None:
    geometry = tile_geometry(
        requested_tile_size_px=224,
        requested_spacing_um=0.5,
        base_spacing_um=0.5,
        downsamples=[1],
        overlap=0.999,
    )
    assert (geometry.read_step_px, geometry.step_px_lv0) == (1, 1)


def test_regions_are_whole_tiles_side_by_side_and_back() -> None:
    tile = tile_geometry(
        requested_tile_size_px=224,
        requested_spacing_um=1.0,
        base_spacing_um=0.25,
        downsamples=[1, 4.003],
        overlap=0.3,
    )
    region = region_geometry(tile, 3)
    assert region.requested_tile_size_px == region.read_tile_size_px == region.read_step_px == 672
    assert region.tile_size_lv0 == region.step_px_lv0 == 3 * 897
    assert region.overlap == 0.0 and region.read_level == 1
    again = subtile_geometry(region, 3)
    assert again == replace(tile, read_step_px=224, step_px_lv0=897, overlap=0.0)
    assert isinstance(again.requested_tile_size_px, int)


def test_floor_to_level() -> None:
    assert floor_to_level(np.array(11), 1.1) == 10  # as HS2P: the quotient is 10.0, though 1.1 * 10 > 11
    found = floor_to_level(np.array([[-1, 0], [7, 8]]), 4.0001)
    assert found.tolist() == [[-1, 0], [1, 1]]
    assert found.dtype == np.int64


def test_nearest_downsample_prefers_the_finer_on_a_tie() -> None:
    assert nearest_downsample_level(64, [1, 4, 16]) == 2
    assert nearest_downsample_level(10, [1, 4, 16]) == 1


@pytest.mark.parametrize(
    ("spacing", "plausible"),
    [
        (0.25, True),
        *((0.05, True), (20.0, True), (20.5, False)),
        *((0.00499, False), (352.8, False), (None, False)),
    ],
)
def test_plausible_spacing(spacing: float | None, plausible: bool) -> None:
    assert is_plausible_spacing(spacing) is plausible
