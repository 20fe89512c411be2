"""A small vision transformer as a preset, whose blocks matter, and its engines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slide2vec.compile import BuildOptions, EngineStore, StoredEngine, build_engine
from slide2vec.encoders import build_encoder
from slide2vec.recipes import EncoderSpec, Recipe, Transform, Variant, load_recipe

CPU = torch.device("cpu")
SIDE = 64


def tiny_recipe(**changes: object) -> Recipe:
    """Two blocks of 64 dimensions, tiles of 64 px, with register tokens and a gated MLP."""
    recipe = load_recipe("virchow2")
    kwargs = {
        **recipe.encoder.kwargs,
        "img_size": SIDE,
        "patch_size": 16,
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "mlp_ratio": 4,
    }
    made = {
        "name": "tiny",
        "tile_size_px": SIDE,
        "gflops": 0.01,
        "encoder": EncoderSpec(family="timm", arch=recipe.encoder.arch, kwargs=kwargs, prefix_tokens=5),
        "transform": Transform(resize=SIDE, crop=SIDE, mean=recipe.transform.mean, std=recipe.transform.std),
        "variants": {"both": Variant(dim=128, pool="cls_patch_mean")},
        "default_variant": "both",
    }
    return recipe.model_copy(update={**made, **changes})


def tiny_encoder(recipe: Recipe, seed: int = 0) -> nn.Module:
    """With random weights, layer scales among them: at their initial 1e-5 they would hide the blocks."""
    encoder = build_encoder(recipe, recipe.variants[recipe.default_variant], "random", seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.rand(parameter.shape, generator=generator) * 0.5
    return encoder


def smooth_pixels(count: int, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    """(count, side, side, 3) uint8, with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    large = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    mixed = (0.8 * large + 0.2 * fine).clamp(0, 1) * 255
    return mixed.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def build(
    recipe: Recipe, encoder: nn.Module, store: EngineStore, options: BuildOptions, **more: Any
) -> StoredEngine:
    """For this machine, of the tiny recipe's variant."""
    return build_engine(encoder, recipe, "both", CPU, options, store=store, **more)


def copied(built: StoredEngine, folder: Path) -> EngineStore:
    """A store of one engine, to be spoilt."""
    shutil.copytree(built.directory, folder / "store" / built.name)
    return EngineStore(folder / "store")


def only(store: EngineStore) -> StoredEngine:
    (engine,) = store
    return engine
