"""Bags of tiles, checkpoints as published, and encoders loaded from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from published import ABMIL_PRESETS, in_dim, random_state
from safetensors.torch import save_file
from torch import Tensor, nn

from slide2vec.encoders.slide import SlideFeatures, TileBag, build_patient_encoder, build_slide_encoder
from slide2vec.recipes import Recipe

#: fp32 against float64, through up to 12 layers, of embeddings whose elements are about 1: the largest
#: difference seen is 2e-5.
DENSE = 1e-4


def a_bag(recipe: Recipe, count: int, size: int = 448, seed: int = 0) -> TileBag:
    """Tiles on a slide with holes, by x, then y, in two pieces of tissue whose grids do not fit."""
    generator = torch.Generator().manual_seed(seed)
    side = int((2 * count) ** 0.5) + 2
    kept = torch.randperm(side * side, generator=generator)[:count].sort().values
    coords = torch.stack([kept // side, kept % side], dim=1) * size + torch.tensor([3 * size + 1000, 777])
    coords[count // 2 :] += torch.tensor([size, size // 3])
    features = torch.randn(count, in_dim(recipe), generator=generator)
    return TileBag(features, coords, size)


def stand_in_repository(
    folder: Path, modules: dict[str, str], classes: dict[str, str], state: dict[str, Tensor]
) -> None:
    """A copy of a repository of the hub with code, as transformers loads it.

    Args:
        modules: source of each, the first with the classes.
        classes: which of them each of transformers' auto classes is; AutoConfig has "model_type" "stand_in".
    """
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    auto_map = {name: f"{next(iter(modules))}.{target}" for name, target in classes.items()}
    config = {"model_type": "stand_in", "auto_map": auto_map, "architectures": [classes["AutoModel"]]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(recipe: Recipe, state: dict[str, Tensor], folder: Path, **changes: Any) -> Path:
    """A file laid out as the published one; `changes` are of MOOZY's payload."""
    assert recipe.weights is not None
    path = folder / recipe.weights.files[0]
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif "gigapath" in recipe.name:
        torch.save({"model": state}, path)
    elif recipe.name in ABMIL_PRESETS:
        torch.save(state, path)
    else:
        torch.save(moozy_payload(recipe, state) | changes, path)
    return path


def moozy_payload(recipe: Recipe, state: dict[str, Tensor]) -> dict[str, Any]:
    """Two models and their configurations, of which the recipe takes one."""
    slide = {
        "feat_dim": 20,
        "d_model": 96,
        "n_layers": 2,
        "n_heads": 12,
        "dim_feedforward": 40,
        "num_registers": 4,
        "learnable_alibi": False,
        "qk_norm": False,
        "layerscale_enabled": False,
        "layerscale_init": 0.0,
        "patch_size_dynamic": True,
        "dropout": 0.1,
        "attn_dropout": 0.0,
        "layer_drop": 0.1,
    }
    case = {
        "d_model": 96,
        "num_layers": 2,
        "num_heads": 12,
        "dim_feedforward": 40,
        "dropout": 0.1,
        "layerscale_init": 1e-5,
        "layer_drop": 0.0,
        "qk_norm": False,
        "num_registers": 0,
    }
    other = {"a.weight": torch.zeros(2)}
    is_case = recipe.name == "moozy"
    return {
        "teacher_slide_encoder": other if is_case else state,
        "slide_encoder_config": slide,
        "case_transformer": state if is_case else other,
        "case_transformer_config": case,
    }


def built(recipe: Recipe, weights: Any, **options: Any) -> nn.Module:
    build = build_patient_encoder if recipe.level == "patient" else build_slide_encoder
    return build(recipe, recipe.variant(None)[1], weights, **options)


def loaded(recipe: Recipe, folder: Path, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The encoder with a random checkpoint as published, and the checkpoint."""
    state = random_state(recipe, seed)
    return built(recipe, write_checkpoint(recipe, state, folder)), state


def embed(encoder: nn.Module, bag: TileBag) -> SlideFeatures:
    with torch.inference_mode():
        found: SlideFeatures = encoder(bag)
    return found
