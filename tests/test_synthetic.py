"""Synthetic slides: every reader opens them, the pixels are those that were painted, tissue is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.synthetic import TISSUES, write_synthetic_slide
from slide2vec.synthetic.layout import make_layout
from slide2vec.synthetic.painting import GLASS_RGB, Painter

SIZE = (4000, 3100)  # not a multiple of any tile
SEED = 3
#: JPEG at quality 80 with halved chroma moves single pixels; a channel's mean stays within a grey level
#: or so unless channels are swapped or YCbCr is read as RGB (tens of levels).
MEAN_TOLERANCE = 1.5
#: Two JPEG decoders may round differently.
DECODER_TOLERANCE = 3


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_slide(tmp_path_factory.mktemp("synthetic") / "slide.svs", size_px=SIZE, seed=SEED)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(SIZE, SEED, 0.25)


def pixels_of(slide: openslide.OpenSlide, x: int, y: int, level: int, side: int) -> NDArray[np.uint8]:
    return np.asarray(slide.read_region((x, y), level, (side, side)).convert("RGB"))


def tissue_square(painter: Painter, side: int) -> tuple[int, int]:
    """The corner, on the grid of tiles, of the square with the most tissue."""
    tissue = painter._layout.tissue
    cells = side // painter._layout.cell_px
    corners = [(x, y) for y in range(0, SIZE[1] - side, 256) for x in range(0, SIZE[0] - side, 256)]

    def share(corner: tuple[int, int]) -> float:
        column, row = (value // painter._layout.cell_px for value in corner)
        return float((tissue[row : row + cells, column : column + cells] > 0).mean())

    return max(corners, key=share)


def test_openslide_sees_an_aperio_slide(slide: Path) -> None:
    with openslide.OpenSlide(slide) as opened:
        assert opened.properties["openslide.vendor"] == "aperio"
        assert float(opened.properties["openslide.mpp-x"]) == 0.25
        assert opened.properties["openslide.objective-power"] == "40"
        assert opened.level_dimensions == (SIZE, (1000, 775))
        assert opened.associated_images["thumbnail"].size == (250, 193)


def test_pixels_are_those_painted(slide: Path, painter: Painter) -> None:
    x, y = tissue_square(painter, 512)
    rows = [np.hstack([painter.paint(x + dx, y + dy, 256) for dx in (0, 256)]) for dy in (0, 256)]
    painted = np.vstack(rows).astype(float)
    with openslide.OpenSlide(slide) as opened:
        read = pixels_of(opened, x, y, 0, 512).astype(float)
        quarter = pixels_of(opened, x, y, 1, 128).astype(float)
    assert np.abs((read - painted).mean(axis=(0, 1))).max() < MEAN_TOLERANCE
    shuffled = painted[..., ::-1]
    assert np.abs(read - painted).mean() < 0.5 * np.abs(read - shuffled).mean()
    reduced = cv2.resize(painted, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs((quarter - reduced).mean(axis=(0, 1))).max() < MEAN_TOLERANCE


def test_cucim_reads_the_same(slide: Path, painter: Painter) -> None:
    cucim = pytest.importorskip("cucim")
    image = cucim.CuImage(str(slide))
    assert tuple(map(tuple, image.resolutions["level_dimensions"])) == (SIZE, (1000, 775))
    assert image.metadata["aperio"]["MPP"] == "0.25"
    x, y = tissue_square(painter, 512)
    with openslide.OpenSlide(slide) as opened:
        for level, side in ((0, 512), (1, 128)):
            expected = pixels_of(opened, x, y, level, side).astype(int)
            read = np.asarray(image.read_region((x, y), (side, side), level))[..., :3].astype(int)
            assert np.abs(read - expected).max() <= DECODER_TOLERANCE


def test_edges_are_tissue_and_glass_without_seams(painter: Painter) -> None:
    """A square painted whole is the same as one painted in four."""
    x, y = tissue_square(painter, 512)
    whole = painter.paint(x, y, 512).astype(int)
    quarters = [np.hstack([painter.paint(x + dx, y + dy, 256) for dx in (0, 256)]) for dy in (0, 256)]
    difference = np.abs(whole - np.vstack(quarters).astype(int))
    # interpolation of texture coordinates rounds to 1/32 px, differently after a shift
    assert difference.mean() < 0.1


def test_tissue_is_found_by_its_colour(slide: Path) -> None:
    """With the hsv segmentation of the tiling, at low resolution."""
    with openslide.OpenSlide(slide) as opened:
        overview = pixels_of(opened, 0, 0, 1, 1000)[:775]
    small = cv2.resize(overview, (SIZE[0] // 32, SIZE[1] // 32), interpolation=cv2.INTER_AREA)
    found = cv2.inRange(cv2.cvtColor(small, cv2.COLOR_RGB2HSV), (90, 8, 103), (180, 255, 255)) > 0
    layout = make_layout(SIZE, SEED)
    truth = cv2.resize(layout.tissue, found.shape[::-1], interpolation=cv2.INTER_AREA) > 0
    overlap = (found & truth).sum() / (found | truth).sum()
    assert overlap > 0.85  # the inside of fat cells is as white as glass
    glass = small[~found & ~truth].astype(float)
    assert np.abs(glass.mean(axis=0) - GLASS_RGB).max() < 2


def test_every_tissue_occurs() -> None:
    layout = make_layout((8192, 8192), 1)
    kinds = layout.weights.argmax(axis=0)[layout.tissue > 0]
    shares = np.bincount(kinds, minlength=len(TISSUES)) / len(kinds)
    assert shares.min() > 0.005
    assert 0.2 < (layout.tissue > 0).mean() < 0.7


def test_same_seed_same_bytes_other_seed_other_slide(slide: Path, tmp_path: Path) -> None:
    again = write_synthetic_slide(tmp_path / "again.svs", size_px=SIZE, seed=SEED, threads=1)
    other = write_synthetic_slide(tmp_path / "other.svs", size_px=SIZE, seed=SEED + 1)
    assert again.read_bytes() == slide.read_bytes()
    assert other.read_bytes() != slide.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.svs", "other.svs"]


def test_bigtiff_holds_the_same_pixels(tmp_path: Path) -> None:
    classic = write_synthetic_slide(tmp_path / "a.svs", size_px=1536, tile_px=240, levels=3)
    big = write_synthetic_slide(tmp_path / "b.svs", size_px=1536, tile_px=240, levels=3, bigtiff=True)
    with tifffile.TiffFile(classic) as a, tifffile.TiffFile(big) as b:
        assert not a.is_bigtiff
        assert b.is_bigtiff
        assert [page.shape for page in b.pages] == [page.shape for page in a.pages]
        assert a.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
        assert a.pages[0].tags["YCbCrSubSampling"].value == (2, 2)
    with openslide.OpenSlide(classic) as a, openslide.OpenSlide(big) as b:
        assert a.level_dimensions == b.level_dimensions == ((1536, 1536), (384, 384), (96, 96))
        for level, side in enumerate((1536, 384, 96)):
            assert (pixels_of(a, 0, 0, level, side) == pixels_of(b, 0, 0, level, side)).all()


def test_spacing_scales_the_tissue(tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "coarse.svs", size_px=1024, spacing_um=0.5)
    with openslide.OpenSlide(path) as opened:
        assert float(opened.properties["openslide.mpp-x"]) == 0.5
        assert opened.properties["openslide.objective-power"] == "20"


@pytest.mark.parametrize(
    "arguments",
    [{"size_px": 100}, {"tile_px": 250}, {"quality": 0}, {"spacing_um": 250.0}, {"levels": 0}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_impossible_slides_are_refused(tmp_path: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        write_synthetic_slide(tmp_path / "no.svs", **{"size_px": 1024, **arguments})
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[1] / "tools" / "synthetic_slide.py"
    spec = importlib.util.spec_from_file_location("synthetic_slide", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(tmp_path / "x.svs"), "--size", "1200x900", "--tile", "128", "--seed", "2"])
    assert "x.svs" in capsys.readouterr().out
    with openslide.OpenSlide(tmp_path / "x.svs") as opened:
        assert opened.dimensions == (1200, 900)
        assert opened.properties["openslide.level[0].tile-width"] == "128"
