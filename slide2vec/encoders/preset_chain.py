"""Chains of presets: a tile encoder, a slide encoder that takes its embeddings, a patient encoder upon
that."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from slide2vec.encoders import build_encoder
from slide2vec.encoders.input_size import for_input
from slide2vec.encoders.late import AnyEncoder, as_module, late_encoder
from slide2vec.encoders.registered import as_built, reloader
from slide2vec.encoders.remote_code import consented
from slide2vec.encoders.slide import build_patient_encoder, build_slide_encoder
from slide2vec.encoders.weights import WeightsChoice
from slide2vec.errors import PresetError, WeightsError, nearest_names
from slide2vec.recipes import Recipe, Variant, load_recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Part",
    "PartsWeights",
    "load_parts",
    "loader_of",
    "parts_of",
    "tile_recipe",
    "upstream",
    "weights_as_text",
    "weights_by_part",
]

logger = logging.getLogger(__name__)

#: One choice for all parts (None or "random"), or preset -> choice.
PartsWeights: TypeAlias = "WeightsChoice | Mapping[str, WeightsChoice]"


def upstream(recipe: Recipe) -> tuple[str, str | None] | None:
    """The preset whose embeddings a preset takes, and its output; None for tile-level presets."""
    if recipe.level == "patient":
        assert recipe.slide_encoder is not None
        return recipe.slide_encoder, None
    if recipe.level == "slide":
        assert recipe.tile_encoder is not None
        return recipe.tile_encoder.preset, recipe.tile_encoder.variant
    return None


def tile_recipe(recipe: Recipe) -> Recipe:
    """That of the tile encoder at a preset's bottom."""
    while (lower := upstream(recipe)) is not None:
        recipe = load_recipe(lower[0])
    return recipe


def parts_of(recipe: Recipe) -> list[str]:
    """The presets that a preset is made of, itself first, its tile encoder last."""
    under = upstream(recipe)
    return [recipe.name] if under is None else [recipe.name, *parts_of(load_recipe(under[0]))]


def weights_by_part(recipe: Recipe, weights: PartsWeights) -> dict[str, WeightsChoice]:
    """Where the weights of every part come from.

    Args:
        weights: None (the hub) or "random" for all; a mapping of presets to files, directories, None or
            "random", those left out from the hub, or the same as text, "lunit=/a.pth,moozy=/b.pt".

    Raises:
        WeightsError: a path for a preset of several parts.
        PresetError: a part that the preset has not.
    """
    names = parts_of(recipe)
    if isinstance(weights, str) and weights != "random" and len(names) > 1:
        weights = _parsed(weights, names)
    if isinstance(weights, Mapping):
        given = {_part(name, recipe, names): choice for name, choice in weights.items()}
        return {name: given.get(name) for name in names}
    if weights not in (None, "random") and len(names) > 1:
        example = ", ".join(f'"{name}": …' for name in names)
        raise WeightsError(
            f"preset {recipe.name} has {len(names)} parts with weights of their own ({', '.join(names)}), "
            f"and weights={os.fspath(weights)!r} is for one: give weights={{{example}}}, where a part that "
            "is left out comes from the Hugging Face hub"
        )
    return dict.fromkeys(names, weights)


def _part(name: str, recipe: Recipe, names: Sequence[str]) -> str:
    """The part of a preset that a name, or a name of other tools, stands for."""
    for part in names:
        if name == part or name in load_recipe(part).aliases:
            return part
    raise PresetError(f"preset {recipe.name} has no part {name!r}. {nearest_names(name, names)}")


def _parsed(text: str, names: Sequence[str]) -> PartsWeights:
    """The mapping that a text such as "lunit=/a.pth,moozy=/b.pt" stands for; else the text itself."""
    begins = re.compile(rf"(?:^|,)({'|'.join(map(re.escape, names))})=")
    pieces = begins.split(text)
    if pieces[0] or len(pieces) == 1:
        return text
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def weights_as_text(weights: PartsWeights) -> str | None:
    """As `weights_by_part` reads it."""
    if isinstance(weights, Mapping):
        given = [(name, choice) for name, choice in weights.items() if choice is not None]
        return ",".join(f"{name}={os.fspath(choice)}" for name, choice in given) or None
    return None if weights is None else os.fspath(weights)


@dataclass(frozen=True)
class Part:
    """One of the models that a preset is made of, with its weights.

    Attributes:
        recipe: of its preset; that of tiles prepares them as the part above takes them.
        variant: name of its output.
        weights: where its weights came from, in a word.
        options: of `Model.from_preset` that build it, and the parts below it, anew.
    """

    recipe: Recipe
    variant: str
    encoder: AnyEncoder
    weights: str
    options: Mapping[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        """What it was made of, as a configuration file says it; its device is left out."""
        kept = ("seed", "input_size_px", "allow_non_recommended_settings")
        return {
            "output_variant": self.variant,
            "weights": weights_as_text(self.options["weights"]),
            **{name: self.options[name] for name in kept},
        }


def load_parts(recipe: Recipe, options: Mapping[str, Any]) -> list[Part]:
    """Build the models of a preset and load their weights; its tile encoder is the first.

    Args:
        options: of `Model.from_preset`, all but the device.

    Raises:
        PresetError, WeightsError, ConfigError: as `Model.from_preset` says.
    """
    if options["weights"] == "random" and recipe.weights is not None:
        logger.warning(
            "preset %s has random weights (seed %d): its embeddings mean nothing",
            recipe.name,
            options["seed"],
        )
    choices = weights_by_part(recipe, options["weights"])
    _check_consent(recipe, choices, options["trust_remote_code"])
    return _load(recipe, options, choices)


def _check_consent(recipe: Recipe, choices: Mapping[str, WeightsChoice], consent: bool) -> None:
    """Refuse a preset of which a part needs consent before gigabytes of the other parts are downloaded."""
    if recipe.encoder.family == "remote":
        consented(recipe, choices[recipe.name], consent)
    if (under := upstream(recipe)) is not None:
        _check_consent(load_recipe(under[0]), choices, consent)


def loader_of(part: Part, load: Callable[..., Any]) -> Callable[..., Any]:
    """What builds a part and those below it anew in another process, of `Model.from_preset`."""
    return reloader(parts_of(part.recipe), partial(load, part.recipe.reference, **part.options))


def _load(recipe: Recipe, options: Mapping[str, Any], choices: Mapping[str, WeightsChoice]) -> list[Part]:
    name, variant = recipe.variant(options["output_variant"])
    seed, input_size_px = options["seed"], options["input_size_px"]
    lower, parts = upstream(recipe), list[Part]()
    if lower is not None:
        theirs = {part: choice for part, choice in choices.items() if part != recipe.name}
        given = {**options, "weights": theirs, "output_variant": lower[1]}
        parts = _load(load_recipe(lower[0]), given, theirs)
    if parts and parts[0].recipe.encoder.family == "registered":  # it has said its statistics
        recipe = recipe.model_copy(update={"transform": parts[0].recipe.transform})
    if len(parts) == 1:
        parts = [_fed_to(recipe, parts[0], input_size_px)]
    own = choices[recipe.name]
    asked = recipe

    def build(weights: WeightsChoice) -> nn.Module:
        return _build(asked, variant, weights, seed, options["trust_remote_code"])

    encoder = late_encoder(asked, variant, own, build)
    recipe = as_built(asked, name, encoder)
    if lower is None and input_size_px is not None:
        recipe = for_input(recipe, as_module(encoder), input_size_px, f"input_size_px={input_size_px}")
    return [*parts, Part(recipe, name, encoder, _identity(recipe, own, seed), options)]


def _fed_to(above: Recipe, tiles: Part, input_size_px: int | None) -> Part:
    """A tile encoder whose tiles are prepared as the authors of the slide encoder above have done it."""
    own = tiles.recipe.transform
    sizes = {"resize": above.transform.resize, "crop": above.transform.crop}
    if input_size_px is not None:
        sizes = dict.fromkeys(sizes, own.crop)
    fed = {"transform": above.transform.model_copy(update=sizes), "tile_size_px": above.tile_size_px}
    return replace(tiles, recipe=tiles.recipe.model_copy(update=fed))


def _build(recipe: Recipe, variant: Variant, weights: WeightsChoice, seed: int, trusted: bool) -> nn.Module:
    """The encoder of a recipe of any level, with its weights; raises what the builders raise."""
    if recipe.level == "slide":
        return build_slide_encoder(recipe, variant, weights, seed, trust_remote_code=trusted)
    if recipe.level == "patient":
        return build_patient_encoder(recipe, variant, weights, seed)
    if recipe.generic and weights != "random":
        from slide2vec.encoders.timm import generic_encoder

        return generic_encoder(recipe, variant, weights)
    return build_encoder(recipe, variant, weights, seed, trust_remote_code=trusted)


def _identity(recipe: Recipe, weights: WeightsChoice, seed: int) -> str:
    """Where the weights came from, in a word."""
    if recipe.weights is None:
        return "none"
    if recipe.encoder.family == "registered":
        return recipe.weights.repo or f"of encoder {recipe.name} itself"
    if weights is None:
        return f"{recipe.weights.repo}@{recipe.weights.revision}"
    return f"random:{seed}" if weights == "random" else os.fspath(weights)
