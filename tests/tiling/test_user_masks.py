"""Tissue masks given as rasters: formats, levels, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.errors import MaskError
from slide2vec.tiling import Tiling, TissueMask, tile_slide, user_masks

DIMENSIONS = (1600, 1200)


def raster(factor: int = 4) -> NDArray[np.uint8]:
    """Tissue in x 400 to 800, y 200 to 600 (level 0)."""
    mask = np.zeros((DIMENSIONS[1] // factor, DIMENSIONS[0] // factor), np.uint8)
    mask[200 // factor : 600 // factor, 400 // factor : 800 // factor] = 1
    return mask


def tile(path: Path) -> tuple[Tiling, TissueMask]:
    levels = [blank(*DIMENSIONS), blank(DIMENSIONS[0] // 8, DIMENSIONS[1] // 8)]
    config = settings(requested_tile_size_px=200, tissue_threshold=0.5)
    return tile_slide(ArrayReader(levels), a_slide(mask_path=path), 0.5, config)


def write_png(path: Path) -> None:
    Image.fromarray(raster()).save(path)


def write_rgb_png(path: Path) -> None:
    Image.fromarray(np.repeat(raster()[..., None], 3, -1)).save(path)


def write_palette_png(path: Path) -> None:
    image = Image.fromarray(raster(), mode="P")
    image.putpalette([255, 255, 255, 0, 128, 0])
    image.save(path)


def write_bilevel_png(path: Path) -> None:
    Image.fromarray(raster() > 0).save(path)


def write_tiff(path: Path) -> None:
    tifffile.imwrite(path, raster())


def write_uint16_tiff(path: Path) -> None:
    tifffile.imwrite(path, raster().astype(np.uint16), tile=(64, 64), compression="zlib", predictor=True)


def write_lzw_tiff(path: Path) -> None:
    Image.fromarray(raster()).save(path, compression="tiff_lzw")


def write_pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        file.write(raster(2), tile=(64, 64), subifds=2)
        file.write(raster(8), tile=(64, 64), subfiletype=1)
        file.write(raster(40), tile=(64, 64), subfiletype=1)


WRITERS: dict[str, Any] = {
    "m.png": write_png,
    "rgb.png": write_rgb_png,
    "palette.png": write_palette_png,
    "bilevel.png": write_bilevel_png,
    "m.tif": write_tiff,
    "uint16.tiff": write_uint16_tiff,
    "lzw.tif": write_lzw_tiff,
    "pyramid.tiff": write_pyramid,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_tiles(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    tiling, tissue = tile(tmp_path / name)
    assert tiling.x.tolist() == [400, 400, 600, 600] and tiling.y.tolist() == [200, 400, 200, 400]
    assert tiling.tissue_fractions.tolist() == [1.0] * 4
    assert tissue.mask.shape == (150, 200)
    assert tiling.segmentation.method == "precomputed_mask" and tiling.segmentation.sthresh is None
    assert tiling.segmentation.tissue_value == 1


def test_the_nearest_level_of_a_pyramid_is_read(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "m.tiff")
    segmentation = tile(tmp_path / "m.tiff")[0].segmentation
    assert (segmentation.mask_level, segmentation.mask_spacing_um) == (1, 4.0)
    assert segmentation.mask_backend == "tifffile"


def test_a_pyramid_without_codec_is_read_by_a_slide_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.tiff"
    with tifffile.TiffWriter(path) as file:
        for factor in (2, 8):
            file.write(raster(factor), tile=(64, 64), subfiletype=int(factor > 2), compression="zlib")
    monkeypatch.setattr(user_masks, "_decodes", lambda page: False)
    tiling, _ = tile(path)
    assert len(tiling) == 4
    assert tiling.segmentation.mask_backend not in {"tifffile", "pil"}


def test_tissue_may_be_255(tmp_path: Path) -> None:
    Image.fromarray(raster()).save(tmp_path / "one.png")
    Image.fromarray(raster() * np.uint8(255)).save(tmp_path / "full.png")
    one, full = (tile(tmp_path / name)[0] for name in ("one.png", "full.png"))
    assert len(one) and np.array_equal(one.x, full.x) and np.array_equal(one.y, full.y)
    assert (one.segmentation.tissue_value, full.segmentation.tissue_value) == (1, 255)


def test_an_empty_mask_gives_no_tiles_and_a_remark(tmp_path: Path) -> None:
    Image.fromarray(raster() * 0).save(tmp_path / "m.png")
    tiling, _ = tile(tmp_path / "m.png")
    assert len(tiling) == 0 and tiling.remarks == ("its tissue mask holds no tissue",)


def test_a_missing_mask(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"slide s: .*does not exist"):
        tile(tmp_path / "m.png")


@pytest.mark.parametrize(("name", "what"), [("m.xml", "XML"), ("m.qpdata", "a QuPath data file")])
def test_outlines_in_other_files_are_no_mask(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(MaskError, match=f"{name} cannot be used: it is {what}, which .*export it as GeoJSON"):
        tile(tmp_path / name)


@pytest.mark.parametrize("name", ["m.png", "m.tif", "m.svs"])
def test_a_damaged_mask(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no picture" * 10)
    with pytest.raises(MaskError, match=f"slide s: the tissue mask .*{name}"):
        tile(tmp_path / name)


def test_a_truncated_mask(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (300, 400), np.uint8)
    Image.fromarray(noise).save(tmp_path / "m.png")
    data = (tmp_path / "m.png").read_bytes()
    (tmp_path / "m.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(MaskError, match="slide s: "):
        tile(tmp_path / "m.png")


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (raster() * np.uint8(2), r"holds the values \[2\] beside 0"),
        (np.maximum(raster(), np.uint8(255) * (np.arange(400) > 200)), r"holds the values \[1, 255\]"),
        (raster()[:, :350], "span the whole slide"),
        (np.stack([raster(), raster() * 0, raster()], -1), "one channel"),
    ],
)
def test_masks_that_are_something_else(array: NDArray[np.uint8], what: str, tmp_path: Path) -> None:
    Image.fromarray(np.ascontiguousarray(array)).save(tmp_path / "m.png")
    with pytest.raises(MaskError, match=what):
        tile(tmp_path / "m.png")


def test_a_mask_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "m.png")
    monkeypatch.setattr(user_masks, "MAX_RASTER_PX", 1000)
    with pytest.raises(MaskError, match="pyramid"):
        tile(tmp_path / "m.png")


def test_rounded_sizes_are_accepted(tmp_path: Path) -> None:
    mask = np.ones((round(1200 / 7), round(1600 / 7)), np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert len(tile(tmp_path / "m.png")[0]) == 8 * 6
