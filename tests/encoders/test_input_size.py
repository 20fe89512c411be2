"""Inputs of other sizes: taken as the published code takes them, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import convert
from slide2vec.encoders.input_size import for_input, positions_for
from slide2vec.errors import ConfigError
from slide2vec.recipes import EnginePolicy, Recipe, load_recipe


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


@pytest.mark.parametrize("size", [196, 280])
def test_positions_of_the_checkpoint_are_resampled_for_each_size(size: int, tmp_path: Path) -> None:
    """Midnight's are of 518 px; 7.1.4 runs Dinov2Model, which resamples them at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, image_size=518, patch_size=14, use_swiglu_ffn=True, layerscale_value=1.0)
    theirs = Dinov2Model(config).eval()
    torch.nn.init.normal_(theirs.embeddings.position_embeddings)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    ours = convert("transformers_dinov2", theirs.state_dict(), load_recipe("midnight").encoder)
    ratio = ours["blocks.0.mlp.fc1.weight"].shape[0] / 96
    recipe = shallow("midnight", depth=1, embed_dim=96, num_heads=2, mlp_ratio=ratio)
    encoder = build_encoder(recipe, recipe.variants["default"], tmp_path / "model.pt")
    made = for_input(recipe, encoder, size, "requested_tile_size_px")
    pixels = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        tokens = theirs(pixels).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)
        exported = ExportedEncoder(encoder, made.transform, "float32_nchw", "fp32", EnginePolicy())
        torch.testing.assert_close(exported(pixels), expected, atol=1e-5, rtol=0)
        encoder.trunk.published_positions = None  # those of 224 px, resampled once more
        assert (encoder(pixels) - expected).abs().max() > 1e-3


def test_conch_v1_5_resamples_its_14_x_14_positions_with_a_shift(tmp_path: Path) -> None:
    recipe = shallow("conchv15", depth=1, embed_dim=48, num_heads=2)
    encoder = build_encoder(recipe, recipe.variants["default"], "random")
    table = torch.randn(1, 1 + 14 * 14, 48)
    encoder.vit.register_buffer("published_positions", table, persistent=False)
    for_input(recipe, encoder, 320, "requested_tile_size_px")
    grid = table[:, 1:].reshape(1, 14, 14, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=20.1 / 14, mode="bicubic")
    expected = torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)
    assert torch.equal(positions_for(encoder.vit, (20, 20)), expected)
    assert encoder(torch.rand(1, 3, 320, 320)).shape == (1, 768)


@pytest.mark.parametrize("name", ["timm:test_resnet", "scattering"])
def test_convolutions_take_any_size(name: str) -> None:
    recipe = load_recipe(name)
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    assert for_input(recipe, encoder, 128, "").transform.crop == 128


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("lunit", 225, "patches have 8 px a side.*such as 224"),
        ("musk", 400, "position embeddings are for 384 px only.*input_size_px=384"),
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
    kwargs = recipe.encoder.kwargs | (small if recipe.encoder.family in ("timm", "musk") else {})
    made = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})
    return made, recipe.variant(None)[1], "random"
