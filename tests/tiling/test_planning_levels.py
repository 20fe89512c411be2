"""Levels that HS2P does not see do not change grids: coordinates are those of the slide without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slide2vec.config import PreprocessingConfig
from slide2vec.readers import open_slide
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, tile_slide


def tiled(path: Path, backend: str, spacing_um: float, **options: object) -> Tiling:
    slide = Slide(sample_id="s", image_path=path)
    config = PreprocessingConfig(
        requested_spacing_um=spacing_um,
        requested_tile_size_px=112,
        **options,  # type: ignore[arg-type]
    )
    with open_slide(slide, backend) as reader:
        return tile_slide(reader, slide, 0.499, config)[0]


@pytest.mark.parametrize("spacing_um", [0.5, 2.0])
def test_levels_in_subifds_do_not_change_the_grid(
    spacing_um: float, real_slide: Callable[[str], Path]
) -> None:
    """OpenSlide, which HS2P reads it with, sees one level; at 2 µm/px the second would be read."""
    path = real_slide("generic-pyramid.ome.tiff")
    with open_slide(Slide(sample_id="s", image_path=path)) as reader:
        assert (reader.backend, len(reader.downsamples)) == ("tiff", 3)
        assert planning_downsamples(reader) == (1.0,)
    filtering = {"filter_white": True, "qc_spacing_um": 2.0}
    ours = tiled(path, "auto", spacing_um, filtering=filtering)
    theirs = tiled(path, "openslide", spacing_um, filtering=filtering)
    assert len(ours) > 10
    np.testing.assert_array_equal(ours.x, theirs.x)
    np.testing.assert_array_equal(ours.y, theirs.y)
    np.testing.assert_array_equal(ours.tissue_fractions, theirs.tissue_fractions)
    assert ours.geometry == theirs.geometry and ours.geometry.read_level == 0
    assert ours.downsamples == theirs.downsamples == (1.0,)
    assert ours.segmentation == theirs.segmentation
