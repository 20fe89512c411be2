"""Recipes of users: by path, and in the folders of SLIDE2VEC_RECIPES."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from slide2vec import Model, PreprocessingConfig, list_models
from slide2vec.config import ExecutionOptions
from slide2vec.encoders import build_encoder
from slide2vec.errors import PresetError, WeightsError
from slide2vec.pipeline import Pipeline
from slide2vec.recipes import load_recipe

OURS = Path(__file__).parents[2] / "engines"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A small vision transformer with weights beside its recipe."""
    text = (OURS / "prost40m.toml").read_text()
    text = text.replace("num_classes = 0", "num_classes = 0\ndepth = 1\nembed_dim = 32\nnum_heads = 2")
    text = text.replace("dim = 384", "dim = 32").replace('repo = "waticlems/Prost40M"', 'repo = ""')
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('files = ["model.safetensors"]', 'files = ["mine.pth"]'))
    return path


@pytest.fixture
def weights(recipe_file: Path) -> Path:
    recipe = load_recipe(recipe_file)
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random", seed=3)
    torch.save(encoder.trunk.state_dict(), recipe_file.with_name("mine.pth"))  # type: ignore[union-attr]
    return recipe_file.with_name("mine.pth")


def test_a_recipe_by_its_path_with_its_weights_beside_it(recipe_file: Path, weights: Path) -> None:
    model = Model.from_preset(str(recipe_file), device="cpu")
    expected = build_encoder(model.recipe, model.recipe.variant(None)[1], weights)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.encoder(pixels), expected(pixels))
    assert (model.name, model.feature_dim) == ("mine", 32)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"none of mine\.pth beside .*mine\.toml, which names no"):
        Model.from_preset(str(recipe_file), device="cpu")


def test_workers_and_settings_of_a_run_have_the_path(
    recipe_file: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    model = Model.from_preset("mine.toml", device="cpu")
    pipeline = Pipeline(model, execution=ExecutionOptions(output_dir=tmp_path / "out"))
    written = pipeline._settings(model, PreprocessingConfig())
    assert f"name: {recipe_file}" in written
    monkeypatch.chdir(recipe_file.parents[1])
    again = pickle.loads(pickle.dumps(model.loader))(device="cpu")
    assert again.identity() == model.identity()


def test_a_folder_of_recipes(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PresetError, match="no preset 'mine'"):
        load_recipe("mine")
    monkeypatch.setenv("SLIDE2VEC_RECIPES", f"/nowhere:{recipe_file.parent}")
    assert load_recipe("mine").file == str(recipe_file) and "mine" in list_models("tile")
    assert load_recipe("mine").reference == str(recipe_file) and load_recipe("lunit").reference == "lunit"
    with pytest.raises(PresetError, match="Did you mean mine"):
        load_recipe("mines")
    recipe_file.with_name("broken.toml").write_text("title = 1")
    with pytest.warns(RuntimeWarning, match=r"broken\.toml"):
        assert "broken" not in list_models()


def test_two_recipes_of_one_name_are_told(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_RECIPES", str(recipe_file.parent))
    again = recipe_file.rename(recipe_file.with_name("lunit.toml"))
    with pytest.raises(PresetError, match=r"'lunit' may mean .*engines/lunit\.toml or .*toml: rename"):
        load_recipe("lunit")
    assert load_recipe(again).variants["default"].dim == 32


def test_a_slide_preset_of_ones_own_is_fed_by_ours_or_by_the_file_beside_it(
    recipe_file: Path, weights: Path
) -> None:
    text = (OURS / "titan.toml").read_text()
    ours = recipe_file.with_name("ours.toml")
    ours.write_text(text)
    assert load_recipe(ours).transform == load_recipe("conchv15").transform
    mine = recipe_file.with_name("slides.toml")
    mine.write_text(text.replace('"conchv15"', '"mine"').replace("fed_with", "unused"))
    recipe = load_recipe(mine)
    assert recipe.tile_encoder is not None and recipe.tile_encoder.preset == str(recipe_file)
    assert recipe.transform == load_recipe(recipe_file).transform
    mine.write_text(text.replace('"conchv15"', '"nobodys"'))
    with pytest.raises(PresetError, match=r"slides\.toml: there is no preset 'nobodys'"):
        load_recipe(mine)


def test_files_that_are_not_there_or_wrong_are_told(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"recipe .*nothing\.toml: .*No such file"):
        load_recipe(tmp_path / "nothing.toml")
    (tmp_path / "odd.toml").write_text('file = "elsewhere"\n' + (OURS / "lunit.toml").read_text())
    with pytest.raises(PresetError, match="file"):
        load_recipe(tmp_path / "odd.toml")
