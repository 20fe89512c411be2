"""Tiles of annotation classes are those of HS2P 6.1.0 (fixture made by tools/hs2p_classes.py)."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import MaskError
from slide2vec.labels import class_folder, class_name
from slide2vec.tiling import Tiling, TissueMask, load_coordinates, tile_slide, write_coordinates

ROOT = Path(__file__).parents[2]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hs2p_classes", ROOT / "tools" / "hs2p_classes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
DATA = {name: array for name, array in np.load(ROOT / "tests/fixtures/hs2p/classes.npz").items()}
RECORDED: dict[str, Any] = json.loads(DATA["recorded"].tobytes())


@cache
def white() -> list[NDArray[np.uint8]]:
    return [np.full((TOOL.SIZE[1] // f, TOOL.SIZE[0] // f, 3), 255, np.uint8) for f in (1, 4, 16)]


def config_of(case: dict[str, Any]) -> PreprocessingConfig:
    names = ("requested_spacing_um", "requested_tile_size_px", "overlap", "masks")
    return PreprocessingConfig(**{name: case[name] for name in names}, filtering={"a_t": case["a_t"]})


def tiling_of(name: str, folder: Path) -> Tiling:
    number, annotation = name.split("/")
    mask = folder / "mask.png"
    Image.fromarray(TOOL.label_raster()).save(mask)
    reader = ArrayReader(white(), downsamples=RECORDED[name]["level_downsamples"])
    slide = a_slide(
        sample_id=class_name(annotation, "slide"), annotation=class_folder(annotation), mask_path=mask
    )
    return tile_slide(reader, slide, TOOL.SPACING_UM, config_of(TOOL.cases()[int(number)]))[0]


def test_every_class_of_every_case_was_recorded() -> None:
    made = {
        f"{number}/{annotation}"
        for number, case in enumerate(TOOL.cases())
        for annotation in config_of(case).masks.classes
    }
    assert made == RECORDED.keys() and sum(len(DATA[f"{name}/fractions"]) > 20 for name in made) > 20


@pytest.mark.parametrize("name", RECORDED)
def test_the_tiles_are_those_of_hs2p(name: str, tmp_path: Path) -> None:
    tiling = tiling_of(name, tmp_path)
    np.testing.assert_array_equal([tiling.x, tiling.y], DATA[f"{name}/xy"])
    np.testing.assert_array_equal(tiling.tissue_fractions, DATA[f"{name}/fractions"])
    _, metadata = write_coordinates(tmp_path, tiling)
    content = json.loads(metadata.read_text())
    assert content["provenance"]["sample_id"] == "slide"
    assert content["tiling"]["min_tissue_fraction"] == RECORDED[name]["min_tissue_fraction"]
    assert content["artifact"] == {key: RECORDED[name][key] for key in content["artifact"]}
    folder = metadata.parent
    loaded = load_coordinates(folder, "slide")
    assert (loaded.sample_id, loaded.annotation) == (tiling.sample_id, tiling.annotation)
    assert loaded.strategy == tiling.strategy and np.array_equal(loaded.x, tiling.x)


# what masks of labels may hold ---------------------------------------------------------------------

MASKS = {"pixel_mapping": {"background": 0, "tumor": 7}, "min_coverage": {"tumor": 0.5}}


def tile(mask_path: Path | None, sample_id: str = "tumor/s") -> tuple[Tiling, TissueMask]:
    reader = ArrayReader([blank(1600, 1200), blank(200, 150)])
    slide = a_slide(sample_id=sample_id, annotation="tumor", mask_path=mask_path)
    return tile_slide(reader, slide, 0.5, settings(requested_tile_size_px=200, masks=MASKS))


def raster(value: int) -> NDArray[np.uint8]:
    mask = np.zeros((300, 400), np.uint8)
    mask[50:150, 100:200] = value
    return mask


def test_the_mask_is_that_of_the_class(tmp_path: Path) -> None:
    Image.fromarray(raster(7)).save(tmp_path / "m.png")
    tiling, mask = tile(tmp_path / "m.png")
    assert tiling.x.tolist() == [400, 400, 600, 600] and tiling.y.tolist() == [200, 400, 200, 400]
    assert (tiling.annotation, tiling.strategy, tiling.tissue_threshold) == ("tumor", "joint", 0.5)
    assert (mask.mask > 0).sum() == 50 * 50 and tiling.segmentation.tissue_value is None


def test_every_value_has_to_have_a_label(tmp_path: Path) -> None:
    Image.fromarray(raster(8)).save(tmp_path / "m.png")
    message = r"slide tumor/s: the annotation mask .*m\.png .* values \[8\], which no label .*\(background"
    with pytest.raises(MaskError, match=message):
        tile(tmp_path / "m.png")


def test_classes_need_a_mask() -> None:
    with pytest.raises(MaskError, match=r"no mask_path is given, and .* annotations \(tumor\): give"):
        tile(None)
