"""Level choice and sizes against values worked out by hand from the rules of HS2P."""

from __future__ import annotations

import numpy as np
import pytest

from slide2vec.errors import SpacingError
from slide2vec.geometry import (
    floor_to_level,
    is_plausible_spacing,
    nearest_downsample_level,
    select_level,
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
    ],
)
def test_level(requested: float, base: float, downsamples: list[float], level: int, within: bool) -> None:
    choice = select_level(requested, base, downsamples)
    assert (choice.level, choice.is_within_tolerance) == (level, within)
    assert choice.spacing_um == pytest.approx(base * downsamples[level])


def test_no_upsampling() -> None:
    with pytest.raises(SpacingError, match="spacing_at_level_0"):
        select_level(0.25, 0.5, [1, 4])


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


def test_floor_to_level() -> None:
    found = floor_to_level(np.array([[-1, 0], [7, 8]]), 4.0001)
    assert found.tolist() == [[-1, 0], [1, 1]]
    assert found.dtype == np.int64


def test_nearest_downsample_prefers_the_finer_on_a_tie() -> None:
    assert nearest_downsample_level(64, [1, 4, 16]) == 2
    assert nearest_downsample_level(10, [1, 4, 16]) == 1


@pytest.mark.parametrize(
    ("spacing", "plausible"), [(0.25, True), (0.00499, False), (352.8, False), (None, False)]
)
def test_plausible_spacing(spacing: float | None, plausible: bool) -> None:
    assert is_plausible_spacing(spacing) is plausible
