"""What our encoders are handed, against slide2vec 7.1.4 (tools/slide2vec_reference.py wrote its side)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.prepare import cut_tiles
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.readers import open_slide
from slide2vec.recipes import Recipe, list_models, load_recipe
from slide2vec.slides import Slide
from slide2vec.synthetic import write_synthetic_slide

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "slide2vec_714"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "slide2vec_reference", ROOT / "tools/slide2vec_reference.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


TOOL = _tool()
THEIRS: dict[str, Any] = json.loads((FIXTURES / "presets.json").read_text())
RECIPES = {name: load_recipe(name) for name in list_models("tile") if name in THEIRS}


@pytest.fixture(scope="module")
def slide_files(slides_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    generated = tmp_path_factory.mktemp("generated") / "generated.svs"
    found = {path.stem: path for path in slides_dir.iterdir()}
    return {**found, "generated": write_synthetic_slide(generated, size_px=3000, seed=7)}


@pytest.mark.parametrize("backend", ["tiff", "openslide", "cucim"])
@pytest.mark.parametrize("read", TOOL.READS, ids=lambda read: " ".join(map(str, read)))
def test_the_encoder_sees_what_714_shows_it(
    slide_files: dict[str, Path], read: tuple[str, int, int, int], backend: str
) -> None:
    """Whole tiles, in the middle and over two edges; every preset's normalisation within 1/255 before it."""
    name, level, side, requested = read
    expected = np.load(FIXTURES / "tiles.npz")[f"{name} {level} {side} {requested}"]
    tiles = np.empty((len(expected), requested, requested, 3), np.uint8)
    with open_slide(Slide(sample_id=name, image_path=slide_files[name]), backend) as slide:
        downsample = slide.dimensions[0] / slide.level_dimensions[level][0]
        places = TOOL.places(slide.dimensions, round(side * downsample))
        for place, tile in zip(places, tiles, strict=True):
            pixels = slide.read_region(place, level, (side, side))
            cut_tiles(pixels, np.zeros((1, 2), np.int64), side, [tile])
    for recipe in RECIPES.values():
        for_size = {"resize": requested, "crop": requested}
        transform = recipe.transform.model_copy(update=for_size)
        ours = TorchPreparer(transform, torch.device("cpu")).prepare(torch.from_numpy(tiles))
        mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
        rows = ((ours * std + mean) * 255).permute(0, 2, 3, 1)[:, :: TOOL.ROWS]
        assert (rows - torch.from_numpy(expected)).abs().max() <= 1.001, recipe.name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_tiles_are_handed_over_whole(name: str) -> None:
    """The preset's tile is the encoder's input, of the size, spacing and statistics that 7.1.4 has."""
    recipe, theirs = RECIPES[name], THEIRS[name]
    assert recipe.tile_size_px == recipe.transform.resize == recipe.transform.crop == theirs["input_size"]
    assert list(recipe.spacing_um) == (theirs["spacing_um"] or [])
    statistics = theirs["tiles"]
    if statistics is not None and name not in STATISTICS_OF_THE_AUTHORS:
        assert recipe.transform.mean == pytest.approx(statistics["mean"], abs=1e-6)
        assert recipe.transform.std == pytest.approx(statistics["std"], abs=1e-6)


#: Where 7.1.4 falls back on ImageNet's, because a package is not installed.
STATISTICS_OF_THE_AUTHORS = {"conch"}
#: Of ready images: the model's card where 7.1.4 has another interpolation.
CARDS = {"mstar": "bilinear", "genbio-pathfm": "bilinear"}


#: Whose tensors 7.1.4 resizes, by torchvision's v2 or a fast processor; Pillow resizes the others' pictures.
TENSORS = {
    *("dinov2-vitb14", "genbio-pathfm", "gigapath", "h-optimus-0", "h-optimus-1", "h0-mini", "hibou-b"),
    *("hibou-l", "mascaret", "mettle", "midnight", "musk", "phaet", "phikon", "phikonv2"),
    *("rudolfv2", "rudolfv2-b", "rudolfv2-s"),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_of_ready_images_is_resized(name: str) -> None:
    """Pictures and tensors, resized by the same filter, differ in the last bits of pixels."""
    assert (getattr(RECIPES[name].images, "tensor", False)) == (name in TENSORS)


def _resize(recipe: Recipe) -> tuple[Any, str]:
    made = recipe.images or recipe.transform
    size = [made.resize] * 2 if getattr(made, "square", False) else made.resize
    return size, made.interpolation


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if THEIRS[name]["images"]))
def test_transform_of_ready_images(name: str) -> None:
    size, interpolation = _resize(RECIPES[name])
    theirs = THEIRS[name]["images"]
    resize = theirs["resize"]
    resize = resize[0] if isinstance(resize, list) and len(resize) == 1 else resize
    assert size == resize
    assert interpolation == CARDS.get(name, theirs["interpolation"])
    if "crop" in theirs:
        assert (RECIPES[name].images or RECIPES[name].transform).crop == theirs["crop"]


def test_moozy_is_fed_as_its_authors_fed_it() -> None:
    lunit, moozy = load_recipe("lunit").transform, load_recipe("moozy").transform
    assert (moozy.resize, moozy.crop) == (248, 224)
    assert moozy.mean == (0.485, 0.456, 0.406) and moozy.std == (0.229, 0.224, 0.225)
    assert lunit.mean != moozy.mean
