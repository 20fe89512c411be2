"""Regions for hierarchical extraction: which tiles they are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slide2vec.geometry import subtile_geometry
from slide2vec.tiling.records import Tiling

__all__ = ["unroll"]


def unroll(regions: Tiling, multiple: int) -> Tiling:
    """The tiles of regions: tile k of a region is in its row k // multiple, column k % multiple.

    Args:
        regions: (R,) regions of `multiple` tiles a side.

    Returns:
        The R · multiple² tiles, region by region, with the tissue fraction of their region; `regions`
        are in it.
    """
    geometry = subtile_geometry(regions.geometry, multiple)
    rows, columns = np.divmod(np.arange(multiple**2, dtype=np.int64), multiple)
    return replace(
        regions,
        geometry=geometry,
        x=(regions.x[:, None] + columns * geometry.tile_size_lv0).ravel(),
        y=(regions.y[:, None] + rows * geometry.tile_size_lv0).ravel(),
        tissue_fractions=regions.tissue_fractions.repeat(multiple**2),
        regions=regions,
    )
