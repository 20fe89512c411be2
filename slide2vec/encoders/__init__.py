"""Encoders: plain modules from normalised pixels (B, 3, H, W) to features (B, D), pooling inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.choices import TILE_ENCODERS
from slide2vec.encoders.base_classes import BaseEncoder as Encoder
from slide2vec.encoders.base_classes import (
    PatientEncoder,
    SlideEncoder,
    TileEncoder,
    TimmTileEncoder,
    TorchTileEncoder,
)
from slide2vec.encoders.given_module import register_module
from slide2vec.encoders.registration import register_encoder
from slide2vec.encoders.weights import WeightsChoice, load_weights, seeded
from slide2vec.errors import ModelLevelError
from slide2vec.plugins import EncoderProviderDiagnostic
from slide2vec.recipes import Recipe, Variant, list_encoder_provider_diagnostics

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Encoder",
    "EncoderProviderDiagnostic",
    "PatientEncoder",
    "SlideEncoder",
    "TileEncoder",
    "TimmTileEncoder",
    "TorchTileEncoder",
    "build_encoder",
    "list_encoder_provider_diagnostics",
    "register_encoder",
    "register_module",
]


def build_encoder(
    recipe: Recipe,
    variant: Variant,
    weights: WeightsChoice = None,
    seed: int = 0,
    *,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The tile encoder of a recipe in evaluation mode, on the CPU, in fp32.

    Args:
        variant: which output, see `Recipe.variant`.
        weights: None = the Hugging Face hub; a file or directory; or "random", seeded by `seed`.
        trust_remote_code: the user lets code of the model's repository run, which recipes of family
            "remote" need; nothing of the kind is run for the others.

    Raises:
        PresetError: the recipe needs remote code and it was not allowed; says whose.
        ExtraMissingError: it needs a package that is not installed.
        WeightsError: the weights cannot be had, or do not match the encoder key by key.
        ModelLevelError: the recipe is of a slide or patient encoder (`slide2vec.encoders.slide`).
    """
    if recipe.level != "tile":
        raise ModelLevelError(f"preset {recipe.name} is {recipe.level}-level: it embeds no tiles")
    if recipe.encoder.family == "registered":
        from slide2vec.encoders.registered import brought_encoder

        return brought_encoder(recipe, variant, weights)
    if recipe.encoder.family == "remote":
        from slide2vec.encoders.remote_code import build_remote

        encoder = build_remote(recipe, variant, weights, trust_remote_code)
        return encoder.eval().requires_grad_(False)
    build = TILE_ENCODERS[recipe.encoder.family].imported()
    if recipe.weights is None:
        encoder = build(recipe.encoder, variant)
    elif weights == "random":
        with seeded(seed):
            encoder = build(recipe.encoder, variant)
    else:
        encoder = load_weights(lambda: build(recipe.encoder, variant), recipe, weights)
    return encoder.eval().requires_grad_(False)
