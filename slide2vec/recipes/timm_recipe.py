"""The recipe of a model that no preset describes, made from what timm says of it."""

from __future__ import annotations

import difflib
import functools
from contextlib import nullcontext
from typing import Any

from pydantic import ValidationError

from slide2vec.errors import PresetError, did_you_mean
from slide2vec.files import hub_or_cache
from slide2vec.lazy import import_timm
from slide2vec.recipes.recipe import SCHEMA, Recipe, in_words
from slide2vec.recipes.sections import (
    EncoderSpec,
    ImageGeometry,
    Licence,
    Transform,
    Variant,
    WeightsSource,
)

__all__ = ["generic_recipe"]


@functools.cache
def generic_recipe(name: str) -> Recipe:
    """What timm says of a model: its own pooled features, its input size, its statistics.

    Args:
        name: "timm:<architecture>" or "hf-hub:<owner>/<repo>".

    Raises:
        PresetError: timm has no such model, or its output is no embedding.
    """
    arch = name.removeprefix("timm:")  # "hf-hub:" is timm's own spelling
    try:
        with hub_or_cache() if name.startswith("hf-hub:") else nullcontext():
            found = _tried(arch)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise PresetError(f"{name}: {_why_not(arch, error)}") from error
    described, data = found.pop("described"), found.pop("data")
    repo, _, revision = (described.get("hf_hub_id") or "").partition("@")
    heads = described.get("classifier") or ()
    side = min(data["input_size"][1:])
    try:
        return Recipe(
            **found,
            name=name,
            schema_version=SCHEMA,
            title=described.get("architecture") or arch,
            summary="A model of timm as it is, which no preset describes",
            tile_size_px=side,
            default_spacing_um=None,
            precision="fp32",
            encoder=EncoderSpec(family="timm", arch=arch, kwargs={"num_classes": 0}, prefix_tokens=0),
            weights=WeightsSource(
                repo=repo,
                revision=revision or "main",
                files=("model.safetensors", "pytorch_model.bin"),
                ignore=tuple(f"{head}.*" for head in ((heads,) if isinstance(heads, str) else heads)),
            ),
            transform=Transform(
                resize=side, crop=side, **{key: data[key] for key in ("interpolation", "mean", "std")}
            ),
            images=ImageGeometry(
                resize=int(side / data["crop_pct"]),
                crop=side,
                interpolation=data["interpolation"],
                square=data["crop_mode"] == "squash",
            ),
            default_variant="default",
            licence=Licence(
                name=described.get("license") or "not known",
                terms="see the page of the model",
                url=f"https://huggingface.co/{repo}",
            ),
            citation="see the page of the model",
            unconfirmed="whether it suits pathology; it was not compared with anything",
        )
    except ValidationError as error:
        raise PresetError(f"{name}: {in_words(error)}") from None


def _tried(arch: str) -> dict[str, Any]:
    """Build a model of timm on the meta device and run it on one tile: what it is and what comes out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False, num_classes=0).eval().requires_grad_(False)
        data = timm.data.resolve_model_data_config(model)
        with FlopCounterMode(display=False) as flops:
            features = model(torch.empty(1, *data["input_size"]))
    if features.ndim != 2:
        raise ValueError(f"its output is not pooled, it has shape {tuple(features.shape)}")
    return {
        "described": model.pretrained_cfg,
        "data": data,
        "params_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "gflops": flops.get_total_flops() / 1e9,
        "variants": {"default": Variant(dim=features.shape[1], pool="none")},
    }


def _why_not(arch: str, error: Exception) -> str:
    """Why timm has no such model, with the nearest names."""
    timm = import_timm()
    if timm.is_model(arch.partition(".")[0]):
        return str(error)
    if arch.startswith("hf-hub:"):
        return f"its configuration could not be read from https://huggingface.co ({error})"
    close = difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5)
    hint = did_you_mean(close) if close else "timm.list_models() has their names"
    return f"timm has no such architecture. {hint}"
