"""Our encoders against timm's own features, and against each other."""

from __future__ import annotations

import pytest
import timm
import torch

from slide2vec.encoders import build_encoder
from slide2vec.encoders.timm import TimmEncoder, _resolve
from slide2vec.errors import PresetError
from slide2vec.recipes import EncoderSpec, Variant, load_recipe

SMALL = EncoderSpec(
    family="timm",
    arch="vit_tiny_patch16_224",
    kwargs={
        "num_classes": 0,
        "global_pool": "",
        "reg_tokens": 4,
        "mlp_layer": "SwiGLUPacked",
        "act_layer": "SiLU",
    },
    prefix_tokens=5,
)


@pytest.mark.parametrize("name", ["prost40m", "lunit"])
def test_equals_timm(name: str) -> None:
    recipe = load_recipe(name)
    ours = build_encoder(recipe, recipe.variant(None)[1], "random", seed=3)
    reference = timm.create_model(recipe.encoder.arch, **_resolve(recipe.encoder.kwargs)).eval()
    reference.load_state_dict(ours.trunk.state_dict())  # type: ignore[union-attr, operator]
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels), reference(pixels), atol=1e-5, rtol=0)


def test_pools_skip_register_tokens() -> None:
    torch.manual_seed(0)
    both = TimmEncoder(SMALL, Variant(dim=384, pool="cls_patch_mean")).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        tokens = both.trunk.forward_features(pixels)  # type: ignore[operator]
        found = both(pixels)
    assert tokens.shape == (2, 5 + 196, 192)
    torch.testing.assert_close(found[:, :192], tokens[:, 0])
    torch.testing.assert_close(found[:, 192:], tokens[:, 5:].mean(1))


def test_seed_decides_random_weights_and_nothing_else() -> None:
    recipe = load_recipe("prost40m")
    variant = recipe.variant(None)[1]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = build_encoder(recipe, variant, "random", seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected)
    same = build_encoder(recipe, variant, "random", seed=1).state_dict()
    other = build_encoder(recipe, variant, "random", seed=2).state_dict()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["trunk.patch_embed.proj.weight"], other["trunk.patch_embed.proj.weight"])


def test_unknown_layer_is_named() -> None:
    with pytest.raises(PresetError, match=r"act_layer.*Swish"):
        _resolve({"act_layer": "Swish"})
