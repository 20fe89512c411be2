"""GenBio-PathFM: its trunk against DINOv3 of transformers and timm, its rotation in bf16 by itself."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders import build_encoder, channelwise
from slide2vec.encoders.channelwise import ChannelwiseEncoder
from slide2vec.errors import WeightsError
from slide2vec.recipes import EncoderSpec, Recipe, load_recipe

#: fp32, other order of the same sums.
TOLERANCE = 1e-5
DIM, HEADS, HIDDEN, DEPTH, SIDE, STORAGE = 192, 3, 512, 2, 64, 4
SIZES = {
    "img_size": SIDE,
    "patch_size": 16,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "hidden": HIDDEN,
    "storage_tokens": STORAGE,
}


def small() -> Recipe:
    """Same heads' width as published (64), fewer of them, fewer blocks and patches."""
    recipe = load_recipe("genbio-pathfm")
    return recipe.model_copy(update={"encoder": EncoderSpec(family="channelwise", kwargs=SIZES)})


def randomised(encoder: nn.Module) -> dict[str, Tensor]:
    """Every parameter random, large enough that attention is not flat and layer scale not nil."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            one = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + one)
    return dict(encoder.state_dict())


@pytest.fixture
def ours() -> nn.Module:
    recipe = small()
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    randomised(encoder)
    return encoder


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def rotate_in_fp32(encoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DINOv3 does, with periods that were never rounded."""
    monkeypatch.setattr(channelwise, "ROPE_DTYPE", torch.float32)
    encoder.rope_embed = channelwise.Rotation(DIM // HEADS)


def by_channel(class_token: Any, pixels: Tensor) -> Tensor:
    """One channel after the other, then side by side."""
    return torch.cat([class_token(pixels[:, channel : channel + 1]) for channel in range(3)], dim=-1)


def with_names(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def test_equals_dinov3_of_transformers(
    ours: nn.Module, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the rotation's precision."""
    rotate_in_fp32(ours, monkeypatch)
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        image_size=SIDE,
        patch_size=16,
        num_channels=1,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        hidden_act="silu",
        use_gated_mlp=True,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        num_register_tokens=STORAGE,
        layer_norm_eps=1e-6,
    )
    reference = transformers.DINOv3ViTModel(config).eval()
    state = dict(ours.state_dict())
    del state["rope_embed.periods"]
    for index in range(DEPTH):
        parts = state.pop(f"blocks.{index}.attn.qkv.weight").chunk(3)
        for part, value in zip("qkv", parts, strict=True):
            state[f"blocks.{index}.attn.{part}_proj.weight"] = value
    names = {
        "cls_token": "embeddings.cls_token",
        "storage_tokens": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "attn.proj": "attention.o_proj",
        "attn.": "attention.",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
        "blocks.": next(k for k in reference.state_dict() if ".norm1.weight" in k).split("0.norm1")[0],
    }
    state = with_names(state, names)
    state["embeddings.mask_token"] = reference.state_dict()["embeddings.mask_token"]
    reference.load_state_dict(state, strict=True)
    with torch.inference_mode():
        expected = by_channel(lambda grey: reference(grey).last_hidden_state[:, 0], pixels)
        torch.testing.assert_close(ours(pixels), expected, atol=TOLERANCE, rtol=0)


def test_equals_dinov3_of_timm(ours: nn.Module, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rotation's precision."""
    reference = timm.create_model(
        "vit_huge_plus_patch16_dinov3",
        img_size=SIDE,
        in_chans=1,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / DIM,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        num_classes=0,
    ).eval()
    state = dict(ours.state_dict())
    del state["rope_embed.periods"]
    names = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    names |= {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
    reference.load_state_dict(with_names(state, names), strict=True)
    with torch.inference_mode():
        expected = by_channel(lambda grey: reference.forward_features(grey)[:, 0], pixels)
        coarse = ours(pixels)
        rotate_in_fp32(ours, monkeypatch)
        torch.testing.assert_close(ours(pixels), expected, atol=TOLERANCE, rtol=0)
    assert 1e-3 < (coarse - expected).abs().max() < 1.0  # the precision is no detail


def written_out(state: dict[str, Tensor], grey: Tensor) -> Tensor:
    """(B, 1, H, W) -> class token (B, DIM), head by head, rotation in bf16."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    width, side = DIM // HEADS, SIDE // 16
    low = torch.bfloat16
    periods = torch.tensor([100 ** (i / (width // 4)) for i in range(width // 4)]).to(low)
    angles = torch.empty(side * side, width, dtype=low)
    for row in range(side):
        for column in range(side):
            centre = (torch.tensor([row + 0.5, column + 0.5], dtype=low) / side) * 2 - 1
            half = torch.cat([2 * math.pi * centre[axis] / periods for axis in (0, 1)])
            angles[row * side + column] = torch.cat([half, half])
    sine, cosine = torch.sin(angles), torch.cos(angles)

    def turned(x: Tensor) -> Tensor:
        x = x.to(low)
        patches = x[:, 1 + STORAGE :]
        swapped = torch.cat([-patches[..., width // 2 :], patches[..., : width // 2]], dim=-1)
        return torch.cat([x[:, : 1 + STORAGE], patches * cosine + swapped * sine], dim=1).float()

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    patches = F.conv2d(grey, weight, bias, stride=16).flatten(2).transpose(1, 2)
    first = torch.cat([state["cls_token"], state["storage_tokens"]], dim=1)
    x = torch.cat([first.expand(len(grey), -1, -1), patches], dim=1)
    for index in range(DEPTH):
        stem = f"blocks.{index}"
        query, key, value = linear(norm(x, f"{stem}.norm1"), f"{stem}.attn.qkv").chunk(3, dim=-1)
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            q, k = turned(query[..., part]), turned(key[..., part])
            heads.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(dim=-1) @ value[..., part])
        mixed = linear(torch.cat(heads, dim=-1), f"{stem}.attn.proj")
        x = x + mixed * state[f"{stem}.ls1.gamma"]
        y = norm(x, f"{stem}.norm2")
        y = F.silu(linear(y, f"{stem}.mlp.w1")) * linear(y, f"{stem}.mlp.w2")
        x = x + linear(y, f"{stem}.mlp.w3") * state[f"{stem}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


def test_rotation_in_bf16_as_published(ours: nn.Module, pixels: Tensor, tmp_path: Path) -> None:
    """From a file as the published one is: the periods in bf16, the rest in fp32."""
    state = dict(ours.state_dict())
    state["rope_embed.periods"] = state["rope_embed.periods"].to(torch.bfloat16)
    torch.save(state, tmp_path / "model.pth")
    recipe = small()
    loaded = build_encoder(recipe, recipe.variant(None)[1], tmp_path)
    with torch.inference_mode():
        expected = by_channel(lambda grey: written_out(dict(ours.state_dict()), grey), pixels)
        # One rounding to bf16 that falls the other way is an outlier of some 1e-4.
        assert (loaded(pixels) - expected).abs().mean() < TOLERANCE
        torch.testing.assert_close(loaded(pixels), expected, atol=1e-3, rtol=0)
        assert torch.equal(loaded(pixels), ours(pixels))


def test_channels_are_independent(ours: nn.Module, pixels: Tensor) -> None:
    """Exchanging two channels exchanges their parts of the features."""
    with torch.inference_mode():
        red, green, blue = ours(pixels).chunk(3, dim=-1)
        found = ours(pixels[:, [2, 1, 0]])
    torch.testing.assert_close(found, torch.cat([blue, green, red], dim=-1), atol=TOLERANCE, rtol=0)
    assert (red - blue).abs().max() > 0.01


def test_published_parameters() -> None:
    """1,133,686,784 parameters under 607 keys, one of them the periods."""
    recipe = load_recipe("genbio-pathfm")
    with torch.device("meta"):
        encoder = ChannelwiseEncoder(recipe.encoder, recipe.variant(None)[1])
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_133_686_784
    assert len(encoder.state_dict()) == 607
    assert encoder.rope_embed.periods.shape == (16,)


def test_keys_of_another_model_are_refused(ours: nn.Module, tmp_path: Path) -> None:
    state = {f"another.{key}": value for key, value in ours.state_dict().items()}
    torch.save(state, tmp_path / "model.pth")
    recipe = small()
    with pytest.raises(WeightsError, match="missing: blocks"):
        build_encoder(recipe, recipe.variant(None)[1], tmp_path)


def test_export(ours: nn.Module) -> None:
    """One graph for any batch size, with the same result."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (torch.randn(2, 3, SIDE, SIDE),), dynamic_shapes=({0: batch},))
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(pixels), ours(pixels), atol=1e-3, rtol=0)
