"""Which tiles of a slide are embedded: tissue, grid, coordinate files, previews, supertiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes
from slide2vec.tiling.types import BadTile, Segmentation, Tiling, TissueMask, TissuePiece

if TYPE_CHECKING:
    from slide2vec.tiling.coordinates import load_coordinates, read_coordinates, write_coordinates
    from slide2vec.tiling.previews import write_mask_preview, write_tiling_preview
    from slide2vec.tiling.tile import TissueOnce, tile_slide

__all__ = [
    "BadTile",
    "Segmentation",
    "Tiling",
    "TissueMask",
    "TissueOnce",
    "TissuePiece",
    "load_coordinates",
    "read_coordinates",
    "tile_slide",
    "write_coordinates",
    "write_mask_preview",
    "write_tiling_preview",
]

#: Loaded on first use: OpenCV is slow to import, and loading coordinates does without it.
_HOMES = {
    "TissueOnce": "tile",
    "load_coordinates": "coordinates",
    "read_coordinates": "coordinates",
    "tile_slide": "tile",
    "write_coordinates": "coordinates",
    "write_mask_preview": "previews",
    "write_tiling_preview": "previews",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
