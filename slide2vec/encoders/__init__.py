"""Encoders: plain modules from normalised pixels (B, 3, H, W) to features (B, D), pooling inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slide2vec.encoders.weights import WeightsChoice, load_weights, seeded
from slide2vec.recipes import EncoderSpec, Recipe, Variant

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_encoder"]

Builder = Callable[[EncoderSpec, Variant], "nn.Module"]


def _timm(spec: EncoderSpec, variant: Variant) -> nn.Module:
    from slide2vec.encoders.timm import TimmEncoder

    return TimmEncoder(spec, variant)


def _scattering(spec: EncoderSpec, variant: Variant) -> nn.Module:
    from slide2vec.encoders.scattering import ScatteringEncoder

    return ScatteringEncoder(**spec.kwargs)


#: family -> builder; each imports its libraries only when it is used.
_BUILDERS: dict[str, Builder] = {"timm": _timm, "scattering": _scattering}


def build_encoder(
    recipe: Recipe, variant: Variant, weights: WeightsChoice = None, seed: int = 0
) -> nn.Module:
    """The encoder of a recipe in evaluation mode, on the CPU, in fp32.

    Args:
        variant: which output, see `Recipe.variant`.
        weights: None = the Hugging Face hub; a file or directory; or "random", seeded by `seed`.

    Raises:
        WeightsError: the weights cannot be had, or do not match the encoder key by key.
    """
    build = _BUILDERS[recipe.encoder.family]
    if recipe.weights is None:
        encoder = build(recipe.encoder, variant)
    elif weights == "random":
        with seeded(seed):
            encoder = build(recipe.encoder, variant)
    else:
        encoder = load_weights(lambda: build(recipe.encoder, variant), recipe, weights)
    return encoder.eval().requires_grad_(False)
