"""Slide and patient encoders: from the tile embeddings of a slide, or the slide embeddings of a patient, to
one embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slide2vec.choices import SLIDE_ENCODERS
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag
from slide2vec.encoders.weights import WeightsChoice, load_weights, seeded
from slide2vec.errors import ModelLevelError, PresetError
from slide2vec.recipes import Recipe, Variant

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SlideFeatures", "TileBag", "build_patient_encoder", "build_slide_encoder"]


def build_slide_encoder(
    recipe: Recipe,
    variant: Variant,
    weights: WeightsChoice = None,
    seed: int = 0,
    *,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The slide encoder of a recipe in evaluation mode, on the CPU, in fp32 (remote ones: as published).

    Its `forward` takes a `TileBag` and returns `SlideFeatures`; it raises NothingToEmbedError for a slide
    without tiles. Memory stays bounded: no (N, N) matrix is made.

    Args:
        variant: which output, see `Recipe.variant`.
        weights: None = the Hugging Face hub; a file or directory; or "random", seeded by `seed`.
        trust_remote_code: the user lets code of the model's repository run, which recipes of family
            "remote" need; nothing of the kind is run for the others.

    Raises:
        ModelLevelError: the recipe is not of a slide encoder.
        PresetError: the recipe needs remote code and it was not allowed; says whose. Or nobody knows how to
            call that code.
        ExtraMissingError: it needs a package that is not installed.
        ConfigError: it needs a device that is not there.
        WeightsError: the weights cannot be had, or do not match the encoder key by key.
    """
    _require(recipe, "slide")
    if recipe.encoder.family == "remote":
        return _remote(recipe)(recipe, variant, weights, trust_remote_code).eval().requires_grad_(False)
    return _built(recipe, variant, weights, seed)


def _remote(recipe: Recipe) -> Callable[[Recipe, Variant, WeightsChoice, bool], nn.Module]:
    """What builds an encoder whose code is in its repository: each of them is called in its own way."""
    from slide2vec.encoders.slide.care import build_care
    from slide2vec.encoders.slide.prism2 import build_prism2

    known = {"care": build_care, "prism2": build_prism2}
    if recipe.encoder.arch not in known:
        raise PresetError(
            f"preset {recipe.name}: slide encoders of family remote are those whose encoder.arch is "
            f"{' or '.join(known)}, not {recipe.encoder.arch!r}"
        )
    return known[recipe.encoder.arch]


def build_patient_encoder(
    recipe: Recipe, variant: Variant, weights: WeightsChoice = None, seed: int = 0
) -> nn.Module:
    """The patient encoder of a recipe in evaluation mode, on the CPU, in fp32.

    Its `forward` takes slide embeddings (S, D) float, of the slide preset that the recipe names, in any
    order, and returns the patient's (D,) float32; it raises NothingToEmbedError for none.

    Args:
        variant, weights, seed: as for `build_slide_encoder`.

    Raises:
        ModelLevelError: the recipe is not of a patient encoder.
        WeightsError: the weights cannot be had, or do not match the encoder key by key.
    """
    _require(recipe, "patient")
    return _built(recipe, variant, weights, seed)


def _require(recipe: Recipe, level: str) -> None:
    if recipe.level != level:
        raise ModelLevelError(f"preset {recipe.name} is {recipe.level}-level: it has no {level} encoder")


def _built(recipe: Recipe, variant: Variant, weights: WeightsChoice, seed: int) -> nn.Module:
    if recipe.encoder.family == "registered":
        from slide2vec.encoders.registered import brought_encoder

        return brought_encoder(recipe, variant, weights)
    which = {"pool": variant.pool} if len(recipe.variants) > 1 else {}

    def build() -> nn.Module:
        made: nn.Module = SLIDE_ENCODERS[recipe.encoder.family].imported()(**recipe.encoder.kwargs, **which)
        return made

    if weights == "random":
        with seeded(seed):
            encoder = build()
    else:
        encoder = load_weights(build, recipe, weights)
    return encoder.eval().requires_grad_(False)
