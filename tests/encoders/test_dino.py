"""Checkpoints of DINO's later generations: DINOv2's own names (OpenMidnight, OpenPath, CROWN), adapters on
top (CRISP), and DINOv3 against transformers' DINOv3ViTModel."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import of_depth
from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import convert
from slide2vec.recipes import Recipe, load_recipe

DEPTH, DIM, HEADS, PATCHES = 2, 96, 3, 16
#: fp32, other order of the same sums.
TOLERANCE = 1e-5
State = dict[str, Tensor]


def narrow(name: str, **kwargs: Any) -> Recipe:
    """A preset of two blocks and little width."""
    recipe = of_depth(load_recipe(name), DEPTH)
    changed = {**recipe.encoder.kwargs, "embed_dim": DIM, "num_heads": HEADS, **kwargs}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": changed})})


def features(recipe: Recipe, state: Any, folder: Path, pixels: Tensor) -> Tensor:
    torch.save(state, folder / "w.pth")
    with torch.inference_mode():
        return build_encoder(recipe, recipe.variant(None)[1], folder / "w.pth")(pixels)  # type: ignore[no-any-return]


def random_pixels(side: int = 224) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


# DINOv2's own names ------------------------------------------------------------------------------


def dinov2_state(hidden: int, patch: int, registers: int) -> State:
    """As its training writes a teacher's backbone, with random values."""
    draw = torch.Generator().manual_seed(1)
    grid = (224 // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "mask_token": (1, DIM),
        "pos_embed": (1, 1 + grid, DIM),
        "patch_embed.proj.weight": (DIM, 3, patch, patch),
        "patch_embed.proj.bias": (DIM,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, DIM)
    layers = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM)}
    layers |= {"mlp.w12": (2 * hidden, DIM), "mlp.w3": (DIM, hidden)}
    for number in range(DEPTH):
        for name, shape in layers.items():
            shapes |= {f"blocks.{number}.{name}.weight": shape, f"blocks.{number}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{number}.{name}.{leaf}": (DIM,) for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{number}.{name}.gamma": (DIM,) for name in ("ls1", "ls2")}
    shapes |= {"norm.weight": (DIM,), "norm.bias": (DIM,)}
    state = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    return {name: value + ("norm" in name and name.endswith("weight")) for name, value in state.items()}


def dinov2(state: State, pixels: Tensor, registers: int) -> Tensor:
    """The class token, as DINOv2 computes it: positions for the class token too, none for registers."""

    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    patches = F.conv2d(pixels, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    tokens = torch.cat([state["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
    tokens = tokens + state["pos_embed"]
    if registers:
        extra = state["register_tokens"].expand(len(pixels), -1, -1)
        tokens = torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1)
    for number in range(DEPTH):
        block = f"blocks.{number}"
        parts = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        shares = (query @ key.mT / math.sqrt(DIM // HEADS)).softmax(-1)
        mixed = linear(f"{block}.attn.proj", (shares @ value).transpose(1, 2).flatten(2))
        tokens = tokens + state[f"{block}.ls1.gamma"] * mixed
        gate, up = linear(f"{block}.mlp.w12", norm(f"{block}.norm2", tokens)).chunk(2, dim=-1)
        tokens = tokens + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.w3", F.silu(gate) * up)
    return norm("norm", tokens)[:, 0]


@pytest.mark.parametrize(
    ("name", "patch", "registers"), [("openmidnight", 14, 4), ("openpath", 14, 4), ("crown", 16, 0)]
)
def test_dinov2_names(name: str, patch: int, registers: int, tmp_path: Path) -> None:
    """OpenPath's are a teacher's, in chunks, with the heads of training beside them."""
    recipe = narrow(name, mlp_ratio=5.0)
    with torch.device("meta"):
        encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    hidden = encoder.trunk.blocks[0].mlp.fc2.in_features  # type: ignore[union-attr, index]
    state, pixels = dinov2_state(hidden, patch, registers), random_pixels()
    expected = dinov2(state, pixels, registers)
    published: Any = state
    if name == "openpath":
        chunked = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", key): value for key, value in state.items()}
        published = {f"backbone.{key}": value for key, value in chunked.items()}
        published = {"teacher": published | {"dino_head.mlp.0.weight": torch.zeros(2)}, "iteration": 3}
    found = features(recipe, published, tmp_path, pixels)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_widths_of_published_gates() -> None:
    """DINOv2 rounds two thirds of four times the width up to a multiple of 8; the first layer holds two."""
    for name, first in (("openmidnight", 8192), ("crown", 5472)):
        recipe = of_depth(load_recipe(name), 1)
        with torch.device("meta"):
            encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
        width = int(encoder.trunk.embed_dim * 4 * 2 / 3)  # type: ignore[union-attr, operator, arg-type]
        assert 2 * ((width + 7) // 8 * 8) == first
        assert encoder.trunk.blocks[0].mlp.fc1.out_features == first  # type: ignore[union-attr, index]


# adapters ----------------------------------------------------------------------------------------


def test_adapters_are_added_to_the_weights(tmp_path: Path) -> None:
    """As peft computes an adapted layer: its own product, and alpha / rank times that of the two matrices."""
    recipe = narrow("crisp")
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    plain: State = encoder.trunk.state_dict()  # type: ignore[union-attr, operator, assignment]
    draw, state = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for key, value in plain.items():
        layer, _, leaf = key.rpartition(".")
        if not layer.endswith(("attn.qkv", "attn.proj")):
            state[f"base_model.model.{key}"] = value
            continue
        state[f"base_model.model.{layer}.base_layer.{leaf}"] = value
        if leaf == "weight":
            for name, shape in (("A", (8, value.shape[1])), ("B", (value.shape[0], 8))):
                matrix = torch.randn(shape, generator=draw) * 0.1
                state[f"base_model.model.{layer}.lora_{name}.default.weight"] = matrix

    def adapted(layer: str) -> Any:
        low, high = (state[f"base_model.model.{layer}.lora_{name}.default.weight"] for name in "AB")
        return lambda module, given, result: result + (16 / 8) * (given[0] @ low.T) @ high.T

    for layer in {
        key.partition("base_model.model.")[2].partition(".lora_")[0] for key in state if ".lora_" in key
    }:
        encoder.trunk.get_submodule(layer).register_forward_hook(adapted(layer))  # type: ignore[union-attr, operator]
    pixels = random_pixels()
    with torch.inference_mode():
        expected = encoder(pixels)
    found = features(recipe, state, tmp_path, pixels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_adapter_that_lacks_a_matrix_is_left_for_loading_to_name() -> None:
    state = {"base_model.model.a.base_layer.weight": torch.ones(2, 2)}
    assert convert("lora", state, load_recipe("crisp").encoder).keys() == {"a.weight"}


# DINOv3 ------------------------------------------------------------------------------------------

#: timm's names and those of transformers, in a block.
DINOV3 = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
DINOV3 |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}


def as_timm(theirs: State, model: Any) -> State:
    around = {"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens"}
    for leaf in ("weight", "bias"):
        around |= {
            f"patch_embed.proj.{leaf}": f"embeddings.patch_embeddings.{leaf}",
            f"norm.{leaf}": f"norm.{leaf}",
        }
    layers = next(key.rpartition(".0.norm1.")[0] for key in theirs if ".0.norm1." in f".{key}")
    state = {ours: theirs[name] for ours, name in around.items()}
    for number in range(DEPTH):
        block = f"{layers}.{number}"
        for leaf in ("weight", "bias"):
            state |= {f"blocks.{number}.{a}.{leaf}": theirs[f"{block}.{b}.{leaf}"] for a, b in DINOV3.items()}
        parts = [theirs[f"{block}.attention.{part}_proj.weight"] for part in "qkv"]
        state[f"blocks.{number}.attn.qkv.weight"] = torch.cat(parts)
        for index in (1, 2):
            state[f"blocks.{number}.gamma_{index}"] = theirs[f"{block}.layer_scale{index}.lambda1"]
    return state


@pytest.mark.parametrize("variant", ["patch_mean", "cls"])
def test_dinov3(variant: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_register_tokens=4,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        image_size=256,
    )
    model = transformers.DINOv3ViTModel(config).eval()
    draw = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.data.copy_(torch.randn(value.shape, generator=draw) * 0.1 + one)
    pixels = random_pixels(256)
    with torch.inference_mode():
        tokens = model(pixels).last_hidden_state
    expected = tokens[:, 0] if variant == "cls" else tokens[:, 5:].mean(1)
    recipe = narrow("dinov3-vitb16")
    torch.save(as_timm(model.state_dict(), model), tmp_path / "w.pth")
    encoder = build_encoder(recipe, recipe.variants[variant], tmp_path / "w.pth")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), expected, atol=TOLERANCE, rtol=0)
