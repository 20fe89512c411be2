"""Recipes: what a preset is, read from one TOML file each in `engines/`.

A recipe says what the encoder is and where its weights are, how tiles are prepared for it, which
outputs it offers, and what its licence asks. Every key is described at its class: `recipe` has the whole
file, `sections` its tables. `catalogue` reads files and finds a preset by its name; any other model of
timm has a recipe too, made from what timm says of it (`timm_recipe`): "timm:<architecture>",
"hf-hub:<owner>/<repo>".
"""

from __future__ import annotations

from slide2vec.recipes.catalogue import (
    REGISTERED,
    Registered,
    all_recipes,
    is_built_in,
    list_encoder_provider_diagnostics,
    list_models,
    load_recipe,
    read_recipe,
    segmenter_recipe,
)
from slide2vec.recipes.recipe import Level, Recipe
from slide2vec.recipes.sections import (
    MIN_COSINE,
    EncoderSpec,
    EnginePolicy,
    ImageGeometry,
    Licence,
    TextSpec,
    TileEncoderRef,
    Transform,
    Variant,
    WeightsSource,
)

__all__ = [
    "MIN_COSINE",
    "REGISTERED",
    "EncoderSpec",
    "EnginePolicy",
    "ImageGeometry",
    "Level",
    "Licence",
    "Recipe",
    "Registered",
    "TextSpec",
    "TileEncoderRef",
    "Transform",
    "Variant",
    "WeightsSource",
    "all_recipes",
    "is_built_in",
    "list_encoder_provider_diagnostics",
    "list_models",
    "load_recipe",
    "read_recipe",
    "segmenter_recipe",
]
