"""Every recipe parses; what a recipe says of an encoder is true of the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slide2vec.encoders import build_encoder
from slide2vec.encoders.timm import TimmEncoder
from slide2vec.errors import PresetError
from slide2vec.recipes import list_models, load_recipe, read_recipe

TIMM = [name for name in list_models() if load_recipe(name).encoder.family == "timm"]


def test_presets_of_this_release() -> None:
    expected = {"scattering", "lunit", "prost40m", "dinov2-vitb14", "uni", "virchow", "virchow2"}
    assert expected <= set(list_models("tile"))
    assert list_models() == sorted(list_models())


@pytest.mark.parametrize("name", TIMM)
def test_published_parameter_count(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        encoder = TimmEncoder(recipe.encoder, recipe.variant(None)[1])
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(recipe.params_m, abs=0.01)


@pytest.mark.parametrize("name", list_models())
def test_recipe_is_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.transform.crop == recipe.tile_size_px
    assert recipe.licence.url.startswith("https://")
    if recipe.weights is not None and recipe.weights.revision != "main":
        assert len(recipe.weights.revision) == 40


def test_virchow2_without_spacing_means_half_a_micron() -> None:
    recipe = load_recipe("virchow2")
    assert recipe.spacing_um == (0.25, 0.5, 1.0, 2.0)
    assert recipe.default_spacing_um == 0.5


@pytest.mark.parametrize("name", ["virchw2", "../secrets", "Virchow2"])
def test_unknown_preset_names_the_nearest(name: str) -> None:
    with pytest.raises(PresetError, match="virchow2" if "irch" in name else "no preset"):
        load_recipe(name)


def test_unknown_variant_and_level() -> None:
    with pytest.raises(PresetError, match="cls_patch_mean"):
        load_recipe("virchow2").variant("cls_patch")
    with pytest.raises(PresetError, match="slide"):
        list_models("slides")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema_version = 1", "schema_version = 2"), "schema_version 2"),
        (('default_variant = "default"', 'default_variant = "other"'), "default_variant 'other'"),
        (("crop = 224", "crop = 300"), "larger"),
        (("gflops", "gigaflops"), "gigaflops"),
        (("[licence]", "[licence"), "recipe .*broken.toml"),
    ],
)
def test_broken_recipe_names_file_and_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    source = Path(__file__).parents[1] / "engines" / "prost40m.toml"
    path = tmp_path / "broken.toml"
    path.write_text(source.read_text().replace(*change))
    with pytest.raises(PresetError, match=message):
        read_recipe(path)


def test_scattering_gives_the_dimension_that_its_recipe_says() -> None:
    recipe = load_recipe("scattering")
    encoder = build_encoder(recipe, recipe.variant(None)[1])
    assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, recipe.variant(None)[1].dim)
