"""Spacing, levels, sizes and boxes: pure arithmetic on numbers, no I/O.

Units: spacings in µm/px; `*_px` sizes in pixels of the level they name; `*_lv0` in level-0 pixels.
The rules (nearest level, no upsampling, rounding half to even) are those of HS2P, so that
coordinates computed here and there are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    "region_geometry",
    "select_level",
    "subtile_geometry",
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

    if requested_spacing_um < spacings[0] and not within(0):
        raise SpacingError(
            f"{requested_spacing_um} µm/px was requested but level 0 has {base_spacing_um:.4g} µm/px: images "
            "are not upsampled. Request a coarser spacing, or give spacing_at_level_0 if the file's is wrong"
        )
    level = min(range(len(spacings)), key=lambda i: abs(spacings[i] - requested_spacing_um))
    while spacings[level] > requested_spacing_um and not within(level):
        level -= 1
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
    read, lv0 = _sides(requested_tile_size_px, requested_spacing_um, base_spacing_um, choice)
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
        step_px_lv0=round(read_step * lv0 / read),
        tolerance=tolerance,
        overlap=overlap,
        is_within_tolerance=choice.is_within_tolerance,
    )


def _sides(size_px: int, spacing_um: float, base_spacing_um: float, choice: LevelChoice) -> tuple[int, int]:
    """Side of a tile at the level that is read, and at level 0, px."""
    read = size_px
    if not choice.is_within_tolerance:
        read = round(size_px * (spacing_um / choice.spacing_um))
    return read, round(read * choice.spacing_um / base_spacing_um)


def region_geometry(tile: TileGeometry, multiple: int) -> TileGeometry:
    """The geometry of regions of `multiple` x `multiple` tiles, side by side.

    Tile-first, as the original slide2vec has it: sizes of the tile are rounded, and a region is a
    whole number of them at every level.
    """
    return replace(
        tile,
        requested_tile_size_px=tile.requested_tile_size_px * multiple,
        read_tile_size_px=tile.read_tile_size_px * multiple,
        tile_size_lv0=tile.tile_size_lv0 * multiple,
        read_step_px=tile.read_tile_size_px * multiple,
        step_px_lv0=tile.tile_size_lv0 * multiple,
        overlap=0.0,
    )


def subtile_geometry(region: TileGeometry, multiple: int) -> TileGeometry:
    """The geometry of the `multiple` x `multiple` tiles of a region: the inverse of `region_geometry`.

    Of a region that another program has laid out region-first, a few px larger or smaller, too: its
    tiles have the size that tiles of this spacing have.
    """
    size = region.requested_tile_size_px // multiple
    choice = LevelChoice(
        level=region.read_level,
        spacing_um=region.read_spacing_um,
        is_within_tolerance=region.is_within_tolerance,
    )
    read, lv0 = _sides(size, region.requested_spacing_um, region.base_spacing_um, choice)
    return replace(
        region,
        requested_tile_size_px=size,
        read_tile_size_px=read,
        tile_size_lv0=lv0,
        read_step_px=read,
        step_px_lv0=lv0,
        overlap=0.0,
    )


def floor_to_level(coordinates_lv0: NDArray[np.int64], downsample: float) -> NDArray[np.int64]:
    """Level-0 coordinates of any shape -> the level's pixel that holds each: floor(c / downsample)."""
    return np.floor(np.asarray(coordinates_lv0, np.float64) / downsample).astype(np.int64)
