"""Tiles cut from supertiles are, to the bit, the tiles read one by one: on every real slide, every
level, with overlap, and over all four edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slide2vec.errors import BackendError
from slide2vec.geometry import tile_geometry
from slide2vec.readers import SlideReader, open_slide
from slide2vec.slides import Slide
from slide2vec.tiling.supertiles import plan_supertiles

NAMES = [
    "CMU-1-Small-Region.svs",
    "CMU-1-Small-Region.webp.tiff",
    "XYC-half-mpp.tiff",
    "XYC-jpeg.ome.tiff",
    "aperio-jpeg-pyramid.svs",
    "aperio-nompp-appmag40.svs",
    "camelyon-jpeg.dcm",
    "fluorescence-dapi.ndpi",
    "generic-jpeg-bigtiff-pyramid.tiff",
    "generic-lzw-pyramid.tiff",
    "generic-pyramid.ome.tiff",
    "rationai-CMU-1-small.tiff",
    "sm_image.dcm",
]


def opened(path: Path, backend: str) -> SlideReader:
    try:
        return open_slide(Slide(sample_id=path.stem, image_path=path), backend)
    except BackendError as error:  # OpenSlide does not open every file that "auto" finds a reader for
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", ["auto", "openslide"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_cut_equals_read(slides_dir: Path, name: str, backend: str, overlap: float) -> None:
    with opened(slides_dir / name, backend) as reader:
        for level, downsample in enumerate(reader.downsamples):
            geometry = tile_geometry(
                requested_tile_size_px=37,
                requested_spacing_um=downsample,
                base_spacing_um=1.0,
                downsamples=reader.downsamples,
                overlap=overlap,
            )
            assert geometry.read_level == level
            x, y = some_tiles(reader.dimensions, geometry.tile_size_lv0, geometry.step_px_lv0)
            supertiles = plan_supertiles(x, y, geometry, downsample, file_tile=reader.tile_shapes[level])
            assert len(supertiles) < len(x)
            side = geometry.read_tile_size_px
            for supertile in supertiles:
                block = reader.read_region(supertile.location_lv0, level, supertile.size)
                for tile, (left, top) in zip(supertile.tiles, supertile.offsets, strict=True):
                    own = reader.read_region((int(x[tile]), int(y[tile])), level, (side, side))
                    assert np.array_equal(block[top : top + side, left : left + side], own), (level, tile)


def some_tiles(dimensions: tuple[int, int], size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A 3 x 3 grid over each corner of the slide, reaching outside, and one somewhere within."""
    width, height = dimensions
    starts = [(-size // 2, -size // 3), (width - 2 * size, -size // 2), (-size // 3, height - 2 * size)]
    starts += [(width - 2 * size, height - 2 * size), (width // 3 + 1, height // 3 + 1)]
    found = {(x + i * step, y + j * step) for x, y in starts for i in range(3) for j in range(3)}
    coordinates = np.array(sorted(found), np.int64)
    return coordinates[:, 0], coordinates[:, 1]
