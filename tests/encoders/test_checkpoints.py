"""Conversions of checkpoints: our encoders against the classes that the checkpoints are of.

The originals are of transformers, at full width and reduced depth, every parameter random; transformers
itself writes them to files, under the names it publishes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import CONVERSIONS, convert
from slide2vec.errors import WeightsError
from slide2vec.recipes import EncoderSpec, Recipe, list_models, load_recipe

transformers = pytest.importorskip("transformers")

#: float32, with q, k and v in one product instead of three.
FEATURE_TOLERANCE = 1e-5
DEPTH = 2
SPEC = EncoderSpec(family="timm")


@dataclasses.dataclass(frozen=True)
class Original:
    """What a checkpoint is of: the class, what its configuration says, where its image was 518 px, and
    the name under which another model holds it ("" = it is published as it is)."""

    model: str
    config: dict[str, Any]
    held_as: str = ""


LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "image_size": 224, "patch_size": 16}
GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "image_size": 518, "patch_size": 14}
HIBOU = {"image_size": 224, "patch_size": 14, "num_register_tokens": 4, "use_swiglu_ffn": True}
ORIGINALS = {
    "phikon": Original("ViT", {"layer_norm_eps": 1e-6}),
    "phikonv2": Original("Dinov2", LARGE),
    "phaet": Original("Dinov2", LARGE, held_as="encoder"),
    "midnight": Original("Dinov2", GIANT | {"use_swiglu_ffn": True}),
    "mascaret": Original("Dinov2", GIANT | {"use_swiglu_ffn": True}, held_as="backbone"),
    "hibou-b": Original("Dinov2WithRegisters", HIBOU),
    "hibou-l": Original("Dinov2WithRegisters", HIBOU | {"hidden_size": 1024, "num_attention_heads": 16}),
}
#: How the authors of a preset make features of tokens (B, 1 + registers + N, D).
FEATURES: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(ORIGINALS, lambda tokens: tokens[:, 0])
FEATURES["midnight"] = lambda tokens: torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)
FEATURES["phaet"] = FEATURES["mascaret"] = lambda tokens: tokens[:, 0] / tokens[:, 0].norm(dim=1)[:, None]


def original(model: str, seed: int = 0, **config: Any) -> nn.Module:
    """A model of transformers with random parameters, norms and layer scales included."""
    settings = getattr(transformers, f"{model}Config")(num_hidden_layers=DEPTH, **config)
    with torch.device("meta"):
        module: nn.Module = getattr(transformers, f"{model}Model")(settings)
    module = module.to_empty(device="cpu").eval()
    assert not list(module.buffers())  # which would be left uninitialised
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            one = parameter.ndim == 1 and name.endswith(("weight", "lambda1"))
            parameter.copy_(1 + 0.3 * noise if one else 0.05 * noise)
    return module.requires_grad_(False)


def published(module: nn.Module, folder: Path, held_as: str = "") -> Path:
    """The model's checkpoint as transformers writes it, inside another model if it has a name there."""
    if held_as:
        holder = type("Holder", (transformers.PreTrainedModel,), {})(transformers.PretrainedConfig())
        setattr(holder, held_as, module)
        module = holder
    module.save_pretrained(folder)  # type: ignore[operator]
    return folder / "model.safetensors"


def shallow(name: str, **weights: Any) -> Recipe:
    """The recipe with `DEPTH` blocks."""
    recipe = load_recipe(name)
    assert recipe.weights is not None
    kwargs = recipe.encoder.kwargs | {"depth": DEPTH}
    return recipe.model_copy(
        update={
            "encoder": recipe.encoder.model_copy(update={"kwargs": kwargs}),
            "weights": recipe.weights.model_copy(update=weights),
        }
    )


def features(recipe: Recipe, weights: Path, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return build_encoder(recipe, recipe.variant(None)[1], weights)(pixels)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_every_converted_preset_is_compared() -> None:
    assert {name for name in list_models() if uses_transformers(load_recipe(name))} == set(ORIGINALS)


def uses_transformers(recipe: Recipe) -> bool:
    return recipe.weights is not None and recipe.weights.convert.startswith("transformers_")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("phikon", "midnight", "hibou-b") else pytest.param(name, marks=pytest.mark.slow)
        for name in ORIGINALS
    ],
)
def test_features_are_the_original_ones(name: str, tmp_path: Path, pixels: Tensor) -> None:
    source, recipe = ORIGINALS[name], shallow(name)
    module = original(source.model, **source.config)
    path = published(module, tmp_path, source.held_as)
    prefix = f"{source.held_as}." if source.held_as else ""
    with safe_open(path, "pt") as file:
        assert f"{prefix}encoder.layer.1.attention.attention.query.weight" in file.keys()  # noqa: SIM118
    with torch.inference_mode():
        expected = FEATURES[name](module(pixels).last_hidden_state)
    found = features(recipe, path, pixels)
    assert found.shape == (2, recipe.variant(None)[1].dim)
    assert (expected[0] - expected[1]).abs().mean() > 0.1 * expected.abs().mean()  # tiles differ
    scale = expected.abs().max().clamp(max=1)  # features of unit length are small
    torch.testing.assert_close(found / scale, expected / scale, atol=FEATURE_TOLERANCE, rtol=0)


SMALL = {"hidden_size": 48, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}


def small(model: str, **config: Any) -> dict[str, Tensor]:
    """A small model's parameters under the names that transformers has in memory, not in files."""
    return original(model, **SMALL, **config).state_dict()


def written(model: str, folder: Path, **config: Any) -> dict[str, Tensor]:
    return load_file(published(original(model, **SMALL, **config), folder))


@pytest.mark.parametrize(
    ("model", "conversion", "config"),
    [
        ("ViT", "transformers_vit", {}),
        ("Dinov2", "transformers_dinov2", {}),
        ("Dinov2", "transformers_dinov2", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", "transformers_dinov2_registers", {"use_swiglu_ffn": True}),
    ],
)
def test_names_in_memory_are_converted_as_those_in_files(
    model: str, conversion: str, config: dict[str, Any], tmp_path: Path
) -> None:
    expected = convert(conversion, written(model, tmp_path, **config), SPEC)
    found = convert(conversion, small(model, **config), SPEC)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("side", [3, 4, 9])
def test_positions_are_resampled_as_transformers_does(side: int) -> None:
    module = original("Dinov2", **SMALL)
    spec = EncoderSpec(family="timm", kwargs={"img_size": 16 * side})
    found = convert("transformers_dinov2", module.state_dict(), spec)["pos_embed"]
    tokens = torch.empty(1, 1 + side * side, 48)
    expected = module.embeddings.interpolate_pos_encoding(tokens, 16 * side, 16 * side)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_half_precision_is_not_added_up_in_half_precision() -> None:
    half = {key: value.half() for key, value in small("Dinov2WithRegisters").items()}
    single = {key: value.float() for key, value in half.items()}
    found = convert("transformers_dinov2_registers", half, SPEC)
    expected = convert("transformers_dinov2_registers", single, SPEC)
    assert all(torch.equal(found[key].float(), expected[key]) for key in expected)


def test_positions_of_no_square_are_refused() -> None:
    state = small("Dinov2")
    state["embeddings.position_embeddings"] = torch.zeros(1, 16, 48)
    spec = EncoderSpec(family="timm", kwargs={"img_size": 64})
    with pytest.raises(WeightsError, match=r"\(1, 16, 48\).*square"):
        convert("transformers_dinov2", state, spec)


def test_conversion_that_does_not_exist() -> None:
    with pytest.raises(WeightsError, match=r"transformers_vti.*transformers_vit"):
        convert("transformers_vti", {}, SPEC)


def test_nothing_is_converted_without_a_name() -> None:
    state = {"a": torch.zeros(1)}
    assert convert("", state, SPEC) is state


@pytest.mark.parametrize(
    "conversion", sorted(name for name in CONVERSIONS if name.startswith("transformers_"))
)
def test_other_architectures_are_refused(conversion: str, tmp_path: Path) -> None:
    ours = {
        "transformers_vit": "ViT",
        "transformers_dinov2": "Dinov2",
        "transformers_dinov2_registers": "Dinov2WithRegisters",
    }[conversion]
    with torch.device("meta"):
        of_timm = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    others = {
        "timm": of_timm,
        "nothing": {},
        "two": small(ours) | {f"teacher.{key}": value for key, value in small(ours).items()},
    }
    others |= {
        model: written(model, tmp_path / model)
        for model in ("ViT", "Dinov2", "Dinov2WithRegisters")
        # Registers are all that is more in it: refused when it is loaded.
        if model != ours and (ours, model) != ("Dinov2", "Dinov2WithRegisters")
    }
    for state in others.values():
        with pytest.raises(WeightsError, match=f"not of a {ours}Model"):
            convert(conversion, state, SPEC)


def refused(name: str, state: dict[str, Tensor], folder: Path) -> str:
    save_file(state, folder / "wrong.safetensors")
    recipe = shallow(name)
    with pytest.raises(WeightsError) as error:
        build_encoder(recipe, recipe.variant(None)[1], folder / "wrong.safetensors")
    return str(error.value)


def test_missing_and_unknown_parameters_are_named(tmp_path: Path) -> None:
    good = load_file(published(original("ViT", layer_norm_eps=1e-6), tmp_path))
    query = "encoder.layer.1.attention.attention.query.bias"
    assert query in refused("phikon", {k: v for k, v in good.items() if k != query}, tmp_path)
    unknown = "encoder.layer.0.attention.gate.weight"
    assert unknown in refused("phikon", good | {unknown: torch.zeros(1)}, tmp_path)
    outside = refused("phikon", good | {"classifier.weight": torch.zeros(1)}, tmp_path)
    assert "unexpected: classifier.weight" in outside and "pooler" not in outside
    norm = {k: v for k, v in good.items() if k != "layernorm.bias"}
    assert "missing: norm.bias" in refused("phikon", norm, tmp_path)
    block = {k: v for k, v in good.items() if not k.startswith("encoder.layer.1.")}
    assert "missing: blocks.1.attn" in refused("phikon", block, tmp_path)
    third = {k.replace("layer.1.", "layer.2."): v.clone() for k, v in good.items() if "layer.1." in k}
    assert "unexpected: blocks.2.attn" in refused("phikon", good | third, tmp_path)


def test_parameters_that_hide_each_other_are_refused() -> None:
    state = small("Dinov2")
    for key in ("encoder.layer.1.attention.attention.query.bias", "layers.1.norm1.bias", "norm.bias"):
        with pytest.raises(WeightsError, match=r"twice|two parameters"):
            convert("transformers_dinov2", state | {key: torch.zeros(48)}, SPEC)


def test_registers_and_their_absence_are_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "num_attention_heads": 16, "image_size": 224, "patch_size": 16}
    with_registers = load_file(published(original("Dinov2WithRegisters", **config), tmp_path))
    assert "unexpected: reg_token" in refused("phikonv2", with_registers, tmp_path)
    without = load_file(published(original("Dinov2", **config), tmp_path))
    assert "embeddings.register_tokens" in refused("hibou-l", without, tmp_path)


def test_sharded_checkpoint_of_transformers(tmp_path: Path, pixels: Tensor) -> None:
    module = original("ViT", layer_norm_eps=1e-6)
    module.save_pretrained(tmp_path, max_shard_size="20MB")  # type: ignore[operator]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    with torch.inference_mode():
        expected = module(pixels).last_hidden_state[:, 0]
    found = features(shallow("phikon"), tmp_path, pixels)
    torch.testing.assert_close(found, expected, atol=FEATURE_TOLERANCE, rtol=0)
