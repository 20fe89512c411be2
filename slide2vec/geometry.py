"""Spacing, levels, sizes and boxes: pure arithmetic on numbers, no I/O.

Units: spacings in µm/px; `*_px` sizes in pixels of the level they name; `*_lv0` in level-0 pixels.
The rules (nearest level, no upsampling, rounding half to even) are those of HS2P, so that
coordinates computed here and there are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SpacingError

__all__ = [
    "PLAUSIBLE_SPACING_UM",
    "LevelChoice",
    "TileGeometry",
    "floor_to_level",
    "is_plausible_spacing",
    "nearest_downsample_level",
    "select_level",
    "tile_geometry",
]

#: A slide scanned at 80x has about 0.12 µm/px and a 0.5x overview 20; files that claim values
#: outside (0.00499 and 352.8 have been seen) are wrong, not extreme.
PLAUSIBLE_SPACING_UM = (0.05, 20.0)


def is_plausible_spacing(spacing_um: float | None) -> bool:
    """Whether a level-0 spacing in µm/px can be true (within `PLAUSIBLE_SPACING_UM`)."""
    low, high = PLAUSIBLE_SPACING_UM
    return spacing_um is not None and low <= spacing_um <= high


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """The pyramid level to read for a requested spacing."""

    level: int
    spacing_um: float
    is_within_tolerance: bool


def select_level(
    requested_spacing_um: float,
    base_spacing_um: float,
    downsamples: Sequence[float],
    tolerance: float = 0.05,
) -> LevelChoice:
    """The level nearest to the requested spacing, or a finer one when the nearest is too coarse.

    Args:
        requested_spacing_um: µm/px wanted.
        base_spacing_um: µm/px of level 0.
        downsamples: of each level along x, width0 / width_l, level 0 first.
        tolerance: relative difference up to which a level counts as the requested spacing.

    Raises:
        SpacingError: the request is finer than level 0 beyond the tolerance (images are never
            upsampled).
    """
    spacings = [base_spacing_um * ds for ds in downsamples]

    def within(level: int) -> bool:
        return abs(spacings[level] - requested_spacing_um) / requested_spacing_um <= tolerance

    level = min(range(len(spacings)), key=lambda i: abs(spacings[i] - requested_spacing_um))
    while not within(level) and level > 0 and spacings[level] > requested_spacing_um:
        level -= 1
    if requested_spacing_um < base_spacing_um and not within(level):
        raise SpacingError(
            f"{requested_spacing_um} µm/px was requested but level 0 has {base_spacing_um:.4g} µm/px: images "
            "are not upsampled. Request a coarser spacing, or give spacing_at_level_0 if the file's is wrong"
        )
    return LevelChoice(level=level, spacing_um=spacings[level], is_within_tolerance=within(level))


def nearest_downsample_level(downsample: float, downsamples: Sequence[float]) -> int:
    """The level whose downsample (along x) is nearest to the one asked for; the finer on a tie."""
    return min(range(len(downsamples)), key=lambda i: abs(downsamples[i] - downsample))


@dataclass(frozen=True, kw_only=True)
class TileGeometry:
    """Where a tile of the requested size and spacing lies in the pyramid of one slide."""

    requested_tile_size_px: int
    requested_spacing_um: float
    base_spacing_um: float
    read_level: int
    read_spacing_um: float
    read_tile_size_px: int
    tile_size_lv0: int
    read_step_px: int
    step_px_lv0: int
    tolerance: float
    overlap: float
    is_within_tolerance: bool


def tile_geometry(
    *,
    requested_tile_size_px: int,
    requested_spacing_um: float,
    base_spacing_um: float,
    downsamples: Sequence[float],
    tolerance: float = 0.05,
    overlap: float = 0.0,
) -> TileGeometry:
    """Resolve level, read size, level-0 size and steps of the tiles of one slide.

    `overlap` is a fraction of the tile. `downsamples` are those along x, level 0 first.

    Raises:
        SpacingError: see `select_level`.
    """
    choice = select_level(requested_spacing_um, base_spacing_um, downsamples, tolerance)
    read = requested_tile_size_px
    if not choice.is_within_tolerance:
        read = round(requested_tile_size_px * (requested_spacing_um / choice.spacing_um))
    lv0 = round(read * choice.spacing_um / base_spacing_um)
    read_step = max(1, round(read * (1.0 - overlap)))
    return TileGeometry(
        requested_tile_size_px=requested_tile_size_px,
        requested_spacing_um=requested_spacing_um,
        base_spacing_um=base_spacing_um,
        read_level=choice.level,
        read_spacing_um=choice.spacing_um,
        read_tile_size_px=read,
        tile_size_lv0=lv0,
        read_step_px=read_step,
        step_px_lv0=max(1, round(read_step * lv0 / read)),
        tolerance=tolerance,
        overlap=overlap,
        is_within_tolerance=choice.is_within_tolerance,
    )


def floor_to_level(coordinates_lv0: NDArray[np.int64], downsample: float) -> NDArray[np.int64]:
    """Level-0 coordinates of any shape -> the level's pixel that holds each: floor(c / downsample)."""
    return np.floor(np.asarray(coordinates_lv0, np.float64) / downsample).astype(np.int64)
