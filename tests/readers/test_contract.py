"""What every back end must do, on every real slide that it opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from slide2vec.errors import BackendError, SlideReadError
from slide2vec.readers import SlideReader, backends, open_slide
from slide2vec.slides import as_slide

VIPS_UP, ALL = ("tiff", "vips", "openslide"), ("tiff", "cucim", "vips", "openslide")
DICOM, EVERY = ("dicom", "openslide"), ("tiff", "dicom", "cucim", "vips", "openslide")
#: file -> (back ends that read it, in the order of "auto"; µm/px)
FILES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "CMU-1-Small-Region.svs": (ALL, 0.499),
    "aperio-jpeg-pyramid.svs": (ALL, 0.499),
    "generic-jpeg-bigtiff-pyramid.tiff": (ALL, 0.499),
    "generic-lzw-pyramid.tiff": (VIPS_UP, 1.996),
    "generic-pyramid.ome.tiff": (ALL, 0.499),
    "aperio-nompp-appmag40.svs": (ALL, 0.25),
    "CMU-1-Small-Region.webp.tiff": (("tiff", "vips"), None),
    "rationai-CMU-1-small.tiff": (ALL, 3.1949),
    "XYC-half-mpp.tiff": (("tiff", "vips"), 0.5),
    "XYC-jpeg.ome.tiff": (("tiff",), None),  # RGB by its tags, YCbCr by its JPEGs, which are right
    "fluorescence-dapi.ndpi": (("openslide",), 0.22818),
    "camelyon-jpeg.dcm": (DICOM, None),
    "sm_image.dcm": (DICOM, 0.499),
}
PAIRS = [(name, backend) for name, (readers, _) in FILES.items() for backend in readers]
REFUSED = [
    (name, backend) for name, (readers, _) in FILES.items() for backend in EVERY if backend not in readers
]


def need(backend: str) -> None:
    if missing := backends()[backend]:
        pytest.skip(missing)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, real_slide: Callable[[str], Path]) -> tuple[Path, str]:
    need(request.param[1])
    return real_slide(request.param[0]), request.param[1]


@pytest.fixture
def path(pair: tuple[Path, str]) -> Path:
    return pair[0]


@pytest.fixture
def reader(pair: tuple[Path, str]) -> Iterator[SlideReader]:
    with open_slide(as_slide(pair[0]), pair[1]) as reader:
        assert reader.backend == pair[1]
        yield reader


def level_pixels(path: Path, reader: SlideReader, level: int) -> np.ndarray:
    """A whole level as OpenSlide reads it from its origin, or tifffile where OpenSlide sees no such level, or
    `reader` where neither opens the file."""
    size = reader.level_dimensions[level]
    try:
        with openslide.OpenSlide(path) as slide:
            if level >= slide.level_count:
                return np.asarray(tifffile.imread(path, series=0, level=level))
            picture = np.asarray(slide.read_region((0, 0), level, size)).astype(int)
    except openslide.OpenSlideError:
        if path.suffix in {".tiff", ".tif"}:
            return np.asarray(tifffile.imread(path, series=0, level=level))
        return reader.read_region((0, 0), level, size)
    return (picture[..., :3] + (255 - picture[..., 3:])).clip(0, 255).astype(np.uint8)


def regions(
    reader: SlideReader, level: int, count: int = 12
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Level-0 locations and sizes, at odd places and over every edge."""
    rng = np.random.default_rng(level)
    width, height = reader.dimensions
    for _ in range(count):
        location = int(rng.integers(-200, width + 100)), int(rng.integers(-200, height + 100))
        yield location, (int(rng.integers(1, 400)), int(rng.integers(1, 400)))


def crop(
    pixels: np.ndarray, location: tuple[int, int], downsample: float, size: tuple[int, int]
) -> np.ndarray:
    """The region of a whole level's pixels, white outside: the definition that readers must meet."""
    x, y = (int(np.floor(start / downsample)) for start in location)
    columns, rows = np.arange(x, x + size[0]), np.arange(y, y + size[1])
    height, width = pixels.shape[:2]
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    found = pixels[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    return np.where(inside[..., None], found, np.uint8(255))


def test_regions_are_crops_of_their_level(path: Path, reader: SlideReader) -> None:
    for level, downsample in enumerate(reader.downsamples):
        pixels = level_pixels(path, reader, level)
        for location, size in regions(reader, level):
            region = reader.read_region(location, level, size)
            assert region.dtype == np.uint8 and region.flags.c_contiguous and region.flags.writeable
            np.testing.assert_array_equal(
                region, crop(pixels, location, downsample, size), str((level, location))
            )


def test_outside_is_white(reader: SlideReader) -> None:
    width, height = reader.dimensions
    for location in [(-500, 0), (0, -500), (width + 1, 0), (0, height + 50)]:
        assert (reader.read_region(location, 0, (20, 30)) == 255).all()
    assert reader.read_region((-500, 0), 0, (20, 30)).shape == (30, 20, 3)


def test_levels_and_spacing(path: Path, reader: SlideReader) -> None:
    _, spacing = FILES[path.name]
    assert isinstance(reader, SlideReader)
    assert reader.level_dimensions[0] == reader.dimensions and reader.downsamples[0] == 1.0
    assert reader.downsamples == tuple(reader.dimensions[0] / width for width, _ in reader.level_dimensions)
    assert len(reader.tile_shapes) == len(reader.level_dimensions)
    assert reader.spacing_um == (None if spacing is None else pytest.approx(spacing, rel=1e-4))
    assert reader.spacing_source


def test_threads_share_a_reader(reader: SlideReader) -> None:
    level = len(reader.level_dimensions) - 1
    wanted = list(regions(reader, level))
    alone = [reader.read_region(location, level, size) for location, size in wanted]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: reader.read_region(item[0], level, item[1]), wanted))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_requests_and_close(reader: SlideReader) -> None:
    for level, size in [(99, (8, 8)), (-1, (8, 8)), (0, (0, 8))]:
        with pytest.raises(SlideReadError, match="levels 0 to"):
            reader.read_region((0, 0), level, size)
    reader.close()
    reader.close()
    with pytest.raises(SlideReadError, match="was closed"):
        reader.read_region((0, 0), 0, (8, 8))


@pytest.mark.parametrize("name", FILES)
def test_auto_takes_the_first_that_reads_it(
    name: str, real_slide: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = FILES[name][0][0]
    need(expected)
    caplog.set_level("INFO", "slide2vec.readers")
    with open_slide(as_slide(real_slide(name))) as reader:
        assert reader.backend == expected
    assert f"read with {expected}" in caplog.text
    for earlier in EVERY[: EVERY.index(expected)]:
        assert f"{earlier}: " in caplog.text


@pytest.mark.parametrize(("name", "backend"), REFUSED)
def test_an_explicit_backend_never_falls_back(
    name: str, backend: str, real_slide: Callable[[str], Path]
) -> None:
    need(backend)
    with pytest.raises(BackendError, match=f'backend "{backend}" cannot be used'):
        open_slide(as_slide(real_slide(name)), backend)
