"""Our encoders against timm's own features, and against each other."""

from __future__ import annotations

import pytest
import timm
import torch
from shallow import each

from benchmarks.common import of_depth
from slide2vec.encoders import build_encoder
from slide2vec.encoders.timm import TimmEncoder, _resolve
from slide2vec.errors import PresetError
from slide2vec.recipes import EncoderSpec, Recipe, Variant, list_models, load_recipe

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


#: Vision transformers as timm has them.
PURE = [
    name
    for name in list_models()
    if load_recipe(name).encoder.family == "timm" and load_recipe(name).encoder.prefix_tokens
]
PIXELS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def shallow(name: str) -> Recipe:
    """A preset of two blocks, else as it is."""
    return of_depth(load_recipe(name), 2)


def own_features(tokens: torch.Tensor, pool: str, prefix: int) -> torch.Tensor:
    if pool == "cls_patch_mean":
        return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=1)
    if pool == "patch_mean":
        return tokens[:, prefix:].mean(1)
    return tokens[:, 0] if pool == "cls" else tokens.mean(1)


@pytest.mark.parametrize("name", each(name for name in PURE if not load_recipe(name).weights.convert))  # type: ignore[union-attr]
def test_equals_timm(name: str) -> None:
    """Weights are not at their initial values: layer scales of 1e-5 would hide the blocks."""
    recipe = shallow(name)
    on = "cpu" if "dinov3" in name else "meta"  # whose angles are in no checkpoint
    with torch.device(on):
        reference = timm.create_model(recipe.encoder.arch, **_resolve(recipe.encoder.kwargs)).eval()
        encoders = [TimmEncoder(recipe.encoder, variant).eval() for variant in recipe.variants.values()]
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.empty(value.shape).uniform_(-0.1, 0.1, generator=generator)
        for key, value in reference.state_dict().items()
    }
    reference.load_state_dict(state, assign=True)
    side = recipe.transform.crop
    pixels = torch.randn(1, 3, side, side, generator=generator)
    with torch.inference_mode():
        tokens = reference.forward_features(pixels)
        for ours, variant in zip(encoders, recipe.variants.values(), strict=True):
            ours.trunk.load_state_dict(state, assign=True)
            expected = own_features(tokens, variant.pool, reference.num_prefix_tokens)
            assert expected.shape == (1, variant.dim) and expected.std() > 1e-3
            torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0)
            if reference.global_pool == {"cls": "token", "patch_mean": "avg"}.get(variant.pool):
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


def test_mean_of_all_tokens_and_unit_length() -> None:
    torch.manual_seed(0)
    mean = TimmEncoder(SMALL, Variant(dim=192, pool="token_mean")).eval()
    unit = TimmEncoder(SMALL, Variant(dim=192, pool="token_mean", normalise=True)).eval()
    unit.load_state_dict(mean.state_dict())
    with torch.inference_mode():
        tokens = mean.trunk.forward_features(PIXELS)  # type: ignore[operator]
        torch.testing.assert_close(mean(PIXELS), tokens.sum(1) / 201)
        torch.testing.assert_close(unit(PIXELS).norm(dim=1), torch.ones(2))
        torch.testing.assert_close(unit(PIXELS) * mean(PIXELS).norm(dim=1, keepdim=True), mean(PIXELS))


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
