"""MUSK against torchscale's BEiT-3 where it is installed, else against a reference written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slide2vec.encoders import build_encoder
from slide2vec.encoders.musk import MuskEncoder, quadrants
from slide2vec.recipes import EncoderSpec, Recipe, load_recipe

DEPTH = 2
#: fp32, other order of the same sums.
TOLERANCE = 1e-5
WIDTH, HEADS, HIDDEN = 1024, 16, 4096
#: Below the published 384 px: the arithmetic is the same, and the tests stay quick.
SIDE = 64
Run = Any


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the published keys, experts A (pixels) and B (text), heads and all."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, 16, 16),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.text_embed.weight": (9, WIDTH),
        "beit3.encoder.embed_positions.A.weight": ((SIDE // 16) ** 2 + 3, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (1024, WIDTH),
        "logit_scale": (),
        "vision_head.weight": (WIDTH, WIDTH),
        "language_head.weight": (WIDTH, WIDTH),
    }
    for expert in "AB":
        shapes |= {f"beit3.encoder.layer_norm.{expert}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        for layer in range(DEPTH):
            stem = f"beit3.encoder.layers.{layer}"
            for part in "qkv":
                shapes[f"{stem}.self_attn.{part}_proj.{expert}.weight"] = (WIDTH, WIDTH)
                shapes[f"{stem}.self_attn.{part}_proj.{expert}.bias"] = (WIDTH,)
            shapes[f"{stem}.self_attn.out_proj.{expert}.weight"] = (WIDTH, WIDTH)
            shapes[f"{stem}.self_attn.out_proj.{expert}.bias"] = (WIDTH,)
            shapes[f"{stem}.ffn.{expert}.fc1.weight"] = (HIDDEN, WIDTH)
            shapes[f"{stem}.ffn.{expert}.fc1.bias"] = (HIDDEN,)
            shapes[f"{stem}.ffn.{expert}.fc2.weight"] = (WIDTH, HIDDEN)
            shapes[f"{stem}.ffn.{expert}.fc2.bias"] = (WIDTH,)
            for kind in ("weight", "bias"):
                shapes[f"{stem}.self_attn.inner_attn_ln.{expert}.{kind}"] = (WIDTH,)
                shapes[f"{stem}.self_attn_layer_norm.{expert}.{kind}"] = (WIDTH,)
                shapes[f"{stem}.final_layer_norm.{expert}.{kind}"] = (WIDTH,)
                shapes[f"{stem}.ffn.{expert}.ffn_layernorm.{kind}"] = (HIDDEN,)
    state = {}
    for key, shape in shapes.items():
        one = 1.0 if key.endswith("weight") and ("norm" in key or "_ln." in key) else 0.0
        state[key] = torch.randn(shape, generator=generator) * 0.05 + one
    return state


def written_out(state: dict[str, Tensor]) -> Run:
    """BEiT-3's vision expert from its description: norms inside attention and MLP, table from row 2."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def tokens(pixels: Tensor) -> Tensor:
        embed = "beit3.vision_embed"
        x = F.conv2d(pixels, state[f"{embed}.proj.weight"], state[f"{embed}.proj.bias"], stride=16)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([state[f"{embed}.cls_token"].expand(len(x), 1, WIDTH), x], dim=1)
        x = x + state["beit3.encoder.embed_positions.A.weight"][2 : 2 + x.shape[1]]
        for layer in range(DEPTH):
            stem = f"beit3.encoder.layers.{layer}"
            y = norm(x, f"{stem}.self_attn_layer_norm.A")
            q, k, v = (
                linear(y, f"{stem}.self_attn.{part}_proj.A").reshape(*y.shape[:2], HEADS, -1).transpose(1, 2)
                for part in "qkv"
            )
            weights = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(y.shape)
            y = norm(y, f"{stem}.self_attn.inner_attn_ln.A")
            x = x + linear(y, f"{stem}.self_attn.out_proj.A")
            y = F.gelu(linear(norm(x, f"{stem}.final_layer_norm.A"), f"{stem}.ffn.A.fc1"))
            x = x + linear(norm(y, f"{stem}.ffn.A.ffn_layernorm"), f"{stem}.ffn.A.fc2")
        return norm(x, "beit3.encoder.layer_norm.A")

    return tokens


def torchscale(state: dict[str, Tensor]) -> Run:
    """The original library's class."""
    config = pytest.importorskip("torchscale.architecture.config")
    beit3 = pytest.importorskip("torchscale.model.BEiT3")
    model = beit3.BEiT3(
        config.EncoderConfig(
            img_size=SIDE,
            patch_size=16,
            vocab_size=9,
            multiway=True,
            layernorm_embedding=False,
            normalize_output=True,
            no_output_layer=True,
            drop_path_rate=0,
            encoder_embed_dim=WIDTH,
            encoder_attention_heads=HEADS,
            encoder_ffn_embed_dim=HIDDEN,
            encoder_layers=DEPTH,
        )
    ).eval()
    own = {key.removeprefix("beit3."): value for key, value in state.items() if key.startswith("beit3.")}
    model.load_state_dict(own, strict=True)
    return lambda pixels: model(visual_tokens=pixels)["encoder_out"]


def shallow() -> Recipe:
    recipe = load_recipe("musk")
    kwargs = {**recipe.encoder.kwargs, "depth": DEPTH, "img_size": SIDE}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


@pytest.mark.parametrize("reference", [written_out, torchscale])
def test_equals_beit3(reference: Run, tmp_path: Path) -> None:
    state = checkpoint()
    torch.save(state, tmp_path / "w.pt")
    recipe = shallow()
    outputs = {**recipe.variants, "aligned": recipe.variants["aligned"].model_copy(update={"dim": WIDTH})}
    one, two, aligned = (
        build_encoder(recipe, outputs[name], tmp_path / "w.pt") for name in ("cls", "ms_aug", "aligned")
    )
    tokens = reference(state)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        all_tokens = one.vit.forward_features(pixels)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(all_tokens, tokens(pixels), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(one(pixels), tokens(pixels)[:, 0], atol=TOLERANCE, rtol=0)
        shared = F.normalize(tokens(pixels)[:, 0] @ state["vision_head.weight"].T, dim=-1)
        torch.testing.assert_close(aligned(pixels), shared, atol=TOLERANCE, rtol=0)
        # As the authors do it: one pass after the other, quadrants of an enlarged tile.
        large = F.interpolate(pixels, size=2 * SIDE, mode="bicubic")
        cuts = [(r, c) for r in (0, SIDE) for c in (0, SIDE)]
        passes = [tokens(large[:, :, r : r + SIDE, c : c + SIDE])[:, 0] for r, c in cuts]
        expected = torch.cat([tokens(pixels)[:, 0], torch.stack(passes).mean(dim=0)], dim=-1)
        torch.testing.assert_close(two(pixels), expected, atol=TOLERANCE, rtol=0)
    assert expected.shape == (2, 2 * WIDTH)


def test_quadrants_are_where_they_say() -> None:
    """Four flat quarters stay apart: away from the seams every quadrant is its quarter's value."""
    tile = torch.zeros(1, 3, 16, 16)
    tile[:, :, :8, 8:], tile[:, :, 8:, :8], tile[:, :, 8:, 8:] = 1.0, 2.0, 3.0
    found = quadrants(tile)
    assert found.shape == (1, 4, 3, 16, 16)
    assert found[0, :, 0, 8, 8].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert quadrants(tile.half()).dtype == torch.float16


def test_published_parameter_count() -> None:
    """The vision expert alone: 303.94 of the full model's 675.19 million."""
    recipe = load_recipe("musk")
    with torch.device("meta"):
        encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 303_936_512


def test_two_scales_export() -> None:
    """One graph for any batch size, with the same result."""
    kwargs = {"img_size": 32, "num_classes": 0, "global_pool": "token", "depth": 1, "embed_dim": 64}
    spec = EncoderSpec(family="musk", arch="beit3_large_patch16_224", kwargs={**kwargs, "num_heads": 4})
    encoder = MuskEncoder(spec, load_recipe("musk").variants["ms_aug"]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(pixels), encoder(pixels), atol=TOLERANCE, rtol=0)
