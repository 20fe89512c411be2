"""Tiles at places that somebody names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import TilingError
from slide2vec.geometry import tile_geometry
from slide2vec.readers import SlideReader, resolve_spacing
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide
from slide2vec.tiling.coordinates import check_places
from slide2vec.tiling.types import Segmentation, Tiling

__all__ = ["tiling_at"]


def tiling_at(
    reader: SlideReader, slide: Slide, config: PreprocessingConfig, at: Sequence[tuple[int, int]]
) -> Tiling:
    """A tiling of the tiles at some places, whether there is tissue or not.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        at: (x, y) of their top-left corners, level-0 px, in any order.

    Raises:
        TilingError: a place is not on the slide.
        SpacingError: the slide has no spacing, or none so fine.
    """
    assert config.requested_spacing_um is not None and config.requested_tile_size_px is not None
    places = np.unique(np.asarray(at).reshape(-1, 2), axis=0)  # by x, then y
    try:
        check_places(places[:, 0], places[:, 1], reader.dimensions)
    except ValueError as error:
        raise TilingError(f"slide {slide.sample_id}: of the places asked for {error}") from error
    geometry = tile_geometry(
        requested_tile_size_px=config.requested_tile_size_px,
        requested_spacing_um=config.requested_spacing_um,
        base_spacing_um=resolve_spacing(reader, slide),
        downsamples=planning_downsamples(reader),
        tolerance=config.tolerance,
    )
    return Tiling(
        sample_id=slide.sample_id,
        image_path=slide.image_path,
        mask_path=slide.mask_path,
        spacing_at_level_0=slide.spacing_at_level_0,
        backend=reader.backend,
        requested_backend=config.backend,
        dimensions=reader.dimensions,
        downsamples=planning_downsamples(reader),
        geometry=geometry,
        x=places[:, 0].astype(np.int64),
        y=places[:, 1].astype(np.int64),
        tissue_fractions=np.ones(len(places), np.float32),
        tissue_threshold=0.0,
        segmentation=Segmentation(
            method=config.segmentation.method,
            requested_downsample=1.0,
            downsample=1,
            level=0,
            spacing_um=geometry.base_spacing_um,
        ),
        filtering=config.filtering,
    )
