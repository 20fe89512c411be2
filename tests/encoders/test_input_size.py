"""Inputs of other sizes: taken as the published code takes them, or refused with the reason."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import ViTConfig, ViTModel

from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import convert
from slide2vec.encoders.input_size import for_input
from slide2vec.errors import ConfigError
from slide2vec.recipes import Recipe, load_recipe


def shallow(name: str, **kwargs: object) -> Recipe:
    recipe = load_recipe(name)
    kwargs = {**recipe.encoder.kwargs, **kwargs}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


def test_timm_resamples_positions_as_with_dynamic_img_size() -> None:
    """h-optimus is built without, and 7.1.4 then asks for it."""
    recipe = shallow("h-optimus-0", depth=1, embed_dim=96, num_heads=2)
    encoder = build_encoder(recipe, recipe.variants["default"], "random")
    kwargs = {**recipe.encoder.kwargs, "dynamic_img_size": True}
    theirs = timm.create_model(recipe.encoder.arch, **kwargs).eval()
    theirs.load_state_dict(encoder.trunk.state_dict())
    usual, other = torch.rand(1, 3, 224, 224), torch.rand(1, 3, 280, 280)
    with torch.inference_mode():
        before = encoder(usual)
        made = for_input(recipe, encoder, 280, "requested_tile_size_px=280")
        assert torch.equal(encoder(usual), before)
        assert torch.allclose(encoder(other), theirs.forward_features(other)[:, 0], atol=1e-6)
    assert (made.transform.resize, made.transform.crop) == (280, 280)
    assert made.gflops == pytest.approx(recipe.gflops * (280 / 224) ** 2)


def test_transformers_resamples_without_antialiasing() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    recipe = shallow("phikon", depth=1, embed_dim=64, num_heads=2)
    encoder = build_encoder(recipe, recipe.variants["default"], "random")
    encoder.trunk.load_state_dict(convert(recipe.weights.convert, theirs.state_dict(), recipe.encoder))
    for_input(recipe, encoder, 160, "requested_tile_size_px=160")
    pixels = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert torch.allclose(encoder(pixels), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["timm:test_resnet", "scattering"])
def test_convolutions_take_any_size(name: str) -> None:
    recipe = load_recipe(name)
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    assert for_input(recipe, encoder, 128, "").transform.crop == 128


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("lunit", 225, "patches have 8 px a side.*such as 224"),
        ("midnight", 280, "position embeddings are for 224 px only.*input_size_px=224"),
        ("scattering", 16, "takes no inputs of 16 px"),
    ],
)
def test_what_is_not_taken_is_refused(name: str, size: int, why: str) -> None:
    recipe = load_recipe(name)
    encoder = build_encoder(*_cheap(recipe))
    with pytest.raises(ConfigError, match=f"requested_tile_size_px={size}: preset {name}.*{why}"):
        for_input(recipe, encoder, size, f"requested_tile_size_px={size}")


def _cheap(recipe: Recipe) -> tuple[Recipe, object, str]:
    small = {"depth": 1, "embed_dim": 96, "num_heads": 2}
    kwargs = recipe.encoder.kwargs | (small if recipe.encoder.family == "timm" else {})
    made = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})
    return made, recipe.variant(None)[1], "random"
