"""Pictures of deep zoom are the slide's own pixels, whatever levels its file has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.viewer import deep_zoom
from slide2vec.viewer.deep_zoom import DeepZoom

SIDE_PX = 1536


@pytest.fixture(scope="module")
def slide(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoom") / "s.svs"
    return generated_slide(path, size_px=SIDE_PX, seed=0, levels=2)


def whole(zoom: DeepZoom, level: int) -> NDArray[np.uint8]:
    """All pictures of a level, put together."""
    width, height = zoom.size(level)
    columns, rows = -(-width // 256), -(-height // 256)
    return np.vstack(
        [np.hstack([zoom.picture(level, column, row) for column in range(columns)]) for row in range(rows)]
    )


def test_the_finest_level_is_openslides(slide: Path) -> None:
    with open_slide(Slide(sample_id="s", image_path=slide)) as reader, openslide.OpenSlide(slide) as other:
        zoom = DeepZoom(reader)
        assert zoom.last == 11 and zoom.size(zoom.last) == (SIDE_PX, SIDE_PX)
        for column, row in ((0, 0), (3, 2), (5, 5)):
            theirs = np.asarray(other.read_region((256 * column, 256 * row), 0, (256, 256)).convert("RGB"))
            np.testing.assert_array_equal(zoom.picture(zoom.last, column, row), theirs)


def test_coarser_levels_are_means_of_the_slide(slide: Path) -> None:
    with open_slide(Slide(sample_id="s", image_path=slide)) as reader, openslide.OpenSlide(slide) as other:
        zoom = DeepZoom(reader)
        pixels = np.asarray(other.read_region((0, 0), 0, other.dimensions).convert("RGB"), np.float64)
        for level, step in ((zoom.last - 1, 2), (zoom.last - 3, 8), (zoom.last - 7, 128)):
            across = SIDE_PX // step
            means = pixels.reshape(across, step, across, step, 3).mean((1, 3))
            found = whole(zoom, level)
            assert found.shape == means.shape
            # the file's own second level is JPEG, of what was averaged before
            assert np.abs(found - means).mean() < (0.3 if step == 2 else 3.0)
        assert whole(zoom, 0).shape == (1, 1, 3)


def test_slides_without_coarse_levels_are_read_in_parts(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(Slide(sample_id="s", image_path=slide)) as reader:
        zoom = DeepZoom(reader)
        expected = zoom.picture(7, 0, 0)
        reads: list[int] = []
        original = reader.read_region

        def watched(location: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
            reads.append(max(size))
            return original(location, level, size)

        monkeypatch.setattr(reader, "read_region", watched)
        monkeypatch.setattr(deep_zoom, "MOST_READ_PX", 128)
        found = zoom.picture(7, 0, 0)
        assert len(reads) > 4 and max(reads) <= 128
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 2


def test_sizes_that_are_no_powers_of_two(real_slide: Callable[[str], Path]) -> None:
    """Against OpenSlide's own deep zoom, at the size of each level and at its last, narrow pictures."""
    from openslide.deepzoom import DeepZoomGenerator

    path = real_slide("CMU-1-Small-Region.svs")
    with open_slide(Slide(sample_id="s", image_path=path)) as reader, openslide.OpenSlide(path) as other:
        zoom, theirs = DeepZoom(reader), DeepZoomGenerator(other, tile_size=256, overlap=0)
        assert [zoom.size(level) for level in range(zoom.last + 1)] == list(theirs.level_dimensions)
        for level in (zoom.last, zoom.last - 1, zoom.last - 3):
            columns, rows = theirs.level_tiles[level]
            pixels = np.asarray(theirs.get_tile(level, (columns - 1, rows - 1)).convert("RGB"), int)
            found = zoom.picture(level, columns - 1, rows - 1)
            assert found.shape == pixels.shape
            assert np.abs(found - pixels).mean() < 4  # they average by another filter
        said = ElementTree.fromstring(zoom.descriptor())
        assert said.attrib["TileSize"] == "256" and said[0].attrib == {
            "Width": str(reader.dimensions[0]),
            "Height": str(reader.dimensions[1]),
        }


def test_what_is_not_there_is_refused(slide: Path) -> None:
    with open_slide(Slide(sample_id="s", image_path=slide)) as reader:
        zoom = DeepZoom(reader)
        for place in ((12, 0, 0), (11, 6, 0), (11, 0, 6), (0, 1, 0)):
            with pytest.raises(ConfigError, match="deep zoom"):
                zoom.picture(*place)
