"""Our tiles are those of the published HS2P 6.1.0 (fixture made by tools/hs2p_reference.py)."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiling_helpers import ArrayReader

from slide2vec.config import PreprocessingConfig
from slide2vec.readers import SlideReader, open_slide
from slide2vec.slides import Slide
from slide2vec.synthetic import write_synthetic_slide
from slide2vec.tiling import Tiling, tile_slide
from slide2vec.tiling.coordinates import _metadata

ROOT = Path(__file__).parents[2]
#: A level of the test slides has 179 px or more along each axis: one px more or less is 0.6 %.
DOWNSAMPLE_TOLERANCE = 6e-3

FIXTURE = ROOT / "tests" / "fixtures" / "hs2p" / "reference.npz"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hs2p_reference", ROOT / "tools" / "hs2p_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
DATA = {name: array for name, array in np.load(FIXTURE).items()}
RECORD = json.loads(DATA["cases"].tobytes())
CASES: list[dict[str, Any]] = RECORD["cases"]
ENDS = np.cumsum([case["metadata"]["tiling"]["n_tiles"] for case in CASES]).tolist()


@cache
def pattern_levels() -> list[NDArray[np.uint8]]:
    levels: list[NDArray[np.uint8]] = TOOL.pyramid(TOOL.pattern())
    return levels


@pytest.mark.slow
def test_the_pattern_is_the_one_that_hs2p_saw() -> None:
    assert [zlib.crc32(level) for level in pattern_levels()] == RECORD["checksums"]


def config_of(case: dict[str, Any]) -> PreprocessingConfig:
    names = (
        *("requested_spacing_um", "requested_tile_size_px", "region_tile_multiple", "overlap"),
        *("tissue_threshold", "tolerance", "segmentation", "filtering"),
    )
    return PreprocessingConfig(**{name: case[name] for name in names})


@pytest.fixture(scope="session")
def find_slide(
    real_slide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Gives the path of a case's slide, painting the generated one when it is first asked for."""

    @cache
    def generated() -> Path:
        path = tmp_path_factory.mktemp("generated") / "slide.svs"
        return write_synthetic_slide(path, size_px=TOOL.GENERATED_PX, seed=TOOL.GENERATED_SEED)

    def find(name: str) -> Path:
        if name != TOOL.GENERATED:
            return real_slide(name)
        if zlib.crc32(generated().read_bytes()) != RECORD["generated_checksum"]:
            pytest.skip("the generated slide is not the one hs2p saw (another OpenCV or NumPy painted it)")
        return generated()

    return find


def reader_of(case: dict[str, Any], find_slide: Callable[[str], Path]) -> SlideReader:
    if case["slide"] != TOOL.PATTERN:
        return open_slide(Slide(sample_id="slide", image_path=find_slide(case["slide"])), "openslide")
    # OpenSlide's downsamples are the mean of those along x and y; take them to compare like with like.
    return ArrayReader(pattern_levels(), downsamples=case["metadata"]["slide"]["level_downsamples"])


def tiling_of(case: dict[str, Any], find_slide: Callable[[str], Path], folder: Path) -> Tiling:
    mask_path = None
    if case["mask"]:
        mask_path = folder / "mask.png"
        Image.fromarray(TOOL.mask_raster(case["mask"])).save(mask_path)
    slide = Slide(sample_id="slide", image_path=Path("slide"), mask_path=mask_path)
    base = case["metadata"]["slide"]["base_spacing_um"]
    with reader_of(case, find_slide) as reader:
        return tile_slide(reader, slide, base, config_of(case))[0]


def name_of(number: int) -> str:
    case = CASES[number]
    changes = {**case["segmentation"], **case["filtering"]}
    parts = [case["slide"].split(".")[0], case["requested_spacing_um"], case["requested_tile_size_px"]]
    parts += [f"x{case['region_tile_multiple']}"] if case["region_tile_multiple"] else []
    parts += [f"o{case['overlap']}", f"t{case['tissue_threshold']}", case["mask"] or ""]
    parts += [f"{key}={value}" for key, value in changes.items() if key != "ref_tile_size"]
    return f"{number}-" + "-".join(str(part) for part in parts if part != "")


@pytest.mark.parametrize("number", range(len(CASES)), ids=name_of)
def test_the_tiles_are_those_of_hs2p(number: int, find_slide: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[number]
    tiling = tiling_of(case, find_slide, tmp_path)
    tiles = slice(ENDS[number] - case["metadata"]["tiling"]["n_tiles"], ENDS[number])
    expected = set(zip(DATA["x"][tiles].tolist(), DATA["y"][tiles].tolist(), strict=True))
    found = set(zip(tiling.x.tolist(), tiling.y.tolist(), strict=True))
    assert found - expected == expected - found == set()
    np.testing.assert_array_equal(tiling.x, DATA["x"][tiles])
    np.testing.assert_array_equal(tiling.y, DATA["y"][tiles])
    np.testing.assert_array_equal(tiling.tissue_fractions, DATA["tissue_fractions"][tiles])
    _check_metadata(_metadata(tiling), case["metadata"])


def _check_metadata(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for section, values in expected.items():
        for key, value in values.items():
            if isinstance(value, float) or key == "level_downsamples":
                # Our downsamples are those along x, OpenSlide's the means of both axes.
                assert found[section][key] == pytest.approx(value, rel=DOWNSAMPLE_TOLERANCE), key
            else:
                assert found[section][key] == value, f"{section}.{key}"
