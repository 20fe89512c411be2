"""CONCH and CONCH v1.5 against a dense reference written from the description of the published models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import convert
from slide2vec.encoders.coca import CocaEncoder
from slide2vec.errors import WeightsError
from slide2vec.recipes import EncoderSpec, Recipe, load_recipe

DEPTH = 2
HEADS = 8
#: fp32, other order of the same sums.
TOLERANCE = 1e-5


def shallow(name: str) -> Recipe:
    recipe = load_recipe(name)
    kwargs = {**recipe.encoder.kwargs, "depth": DEPTH}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


def random_parameters(module: nn.Module, seed: int) -> None:
    """Every parameter random, norms and biases too: nothing may hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        one = 1.0 if "norm" in name or ".ln_" in name or name.startswith("ln_") else 0.0
        with torch.no_grad():
            parameter.copy_(noise * 0.05 + (one if name.endswith("weight") else 0.0))


class ConchPooler(nn.Module):
    """With torch's own multi-head attention, as CONCH has it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 512))
        self.attn = nn.MultiheadAttention(512, HEADS, kdim=768, vdim=768, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(512), nn.LayerNorm(768)

    def forward(self, tokens: Tensor) -> Tensor:
        context = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), 1, 512)
        pooled: Tensor = self.attn(query, context, context, need_weights=False)[0]
        return pooled


class ConchV15Pooler(nn.Module):
    """Plain softmax attention, head by head, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 768))
        self.ln_k, self.ln_q = nn.LayerNorm(1024), nn.LayerNorm(768)
        self.to_q = nn.Linear(768, 768, bias=False)
        self.to_kv = nn.Linear(1024, 2 * 768, bias=False)
        self.to_out = nn.Linear(768, 768, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.to_q(self.ln_q(self.query))
        both = self.to_kv(self.ln_k(tokens))
        key, value = both[..., :768], both[..., 768:]
        width = 768 // HEADS
        pooled = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
            pooled.append(scores.softmax(dim=-1) @ value[..., part])
        return self.to_out(torch.cat(pooled, dim=-1))  # type: ignore[no-any-return]


class Tower(nn.Module):
    def __init__(self, arch: str, pooler: nn.Module, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.trunk = timm.create_model(arch, num_classes=0, depth=DEPTH, **kwargs)
        self.attn_pool_contrast = pooler
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(pixels)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])  # type: ignore[no-any-return]


def loaded(recipe: Recipe, state: dict[str, Tensor], tmp_path: Any) -> nn.Module:
    torch.save(state, tmp_path / "w.bin")
    return build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.bin")


def test_conch_equals_dense_reference(tmp_path: Any) -> None:
    reference = Tower("vit_base_patch16_224", ConchPooler(), 512, img_size=448).eval()
    random_parameters(reference, 1)
    state = {f"visual.{key}": value for key, value in reference.state_dict().items()}
    projection = torch.randn(512, 512, generator=torch.Generator().manual_seed(6)) * 0.05
    state["visual.proj_contrast"] = projection
    unused = ["text.positional_embedding", "text_decoder.x", "logit_scale"]
    unused += ["visual.attn_pool_caption.attn.in_proj_bias", "visual.ln_caption.weight"]
    recipe = shallow("conch")
    ours = loaded(recipe, {**state, **{key: torch.ones(3) for key in unused}}, tmp_path)
    aligned = build_encoder(recipe, recipe.variants["aligned"], tmp_path / "w.bin")
    pixels = torch.randn(2, 3, 448, 448, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = reference(pixels)
        torch.testing.assert_close(ours(pixels), expected, atol=TOLERANCE, rtol=0)
        shared = F.normalize(expected @ projection, dim=-1)
        torch.testing.assert_close(aligned(pixels), shared, atol=TOLERANCE, rtol=0)
    assert expected.shape == (2, 512)
    assert "projection.weight" not in ours.state_dict()  # its digest is that of what it uses
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # the pixels matter


def test_conch_v1_5_equals_dense_reference_with_resampled_positions(tmp_path: Any) -> None:
    """The checkpoint's table is for 14 x 14 patches; ours is asked for 28 x 28."""
    reference = Tower("vit_large_patch16_224", ConchV15Pooler(), 768, img_size=448, init_values=1.0).eval()
    random_parameters(reference, 3)
    state = dict(reference.state_dict())
    table = torch.randn(1, 197, 1024, generator=torch.Generator().manual_seed(4))
    grid = table[:, 1:].reshape(1, 14, 14, 1024).permute(0, 3, 1, 2)
    scale = (448 // 16 + 0.1) / 14
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert grid.shape == (1, 1024, 28, 28)
    with torch.no_grad():
        baked = torch.cat([table[:, 0][None], grid.permute(0, 2, 3, 1).reshape(1, -1, 1024)], dim=1)
        reference.trunk.pos_embed.copy_(baked)
    ours = loaded(shallow("conchv15"), {**state, "trunk.pos_embed": table}, tmp_path)
    pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels), reference(pixels), atol=TOLERANCE, rtol=0)


def test_position_table_at_its_own_size_is_left_alone() -> None:
    table = torch.randn(1, 785, 8)
    found = convert("conch_v1_5", {"trunk.pos_embed": table}, load_recipe("conchv15").encoder)
    assert torch.equal(found["vit.pos_embed"], table)


def test_incomplete_pooler_is_an_error_that_names_it(tmp_path: Any) -> None:
    reference = Tower("vit_base_patch16_224", ConchPooler(), 512, img_size=448)
    state = {f"visual.{key}": value for key, value in reference.state_dict().items()}
    del state["visual.attn_pool_contrast.attn.v_proj_weight"]
    with pytest.raises(WeightsError, match=r"missing: pool\.kv\.weight"):
        loaded(shallow("conch"), state, tmp_path)


@pytest.mark.parametrize(
    ("name", "published"), [("conch", 87_567_104), ("conchv15", 306_109_184 + (785 - 197) * 1024)]
)
def test_published_parameter_count(name: str, published: int) -> None:
    """CONCH v1.5's table has more rows here than in the checkpoint."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        encoder = CocaEncoder(recipe.encoder, recipe.variant(None)[1])
    assert sum(parameter.numel() for parameter in encoder.parameters()) == published


def test_random_weights_export() -> None:
    """One graph for any batch size, with the same result."""
    small = {"img_size": 64, "patch_size": 16, "num_classes": 0, "depth": 1}
    kwargs = {**small, "embed_dim": 192, "num_heads": 3, "pool_heads": 8, "pool_bias": False}
    spec = EncoderSpec(family="coca", arch="vit_base_patch16_224", kwargs=kwargs)
    encoder = CocaEncoder(spec, load_recipe("conch").variants["default"]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(pixels), encoder(pixels), atol=TOLERANCE, rtol=0)
