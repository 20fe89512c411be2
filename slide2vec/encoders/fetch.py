"""The weights of presets onto this machine, without building anything: for machines that reach no hub."""

from __future__ import annotations

from pathlib import Path

from slide2vec.encoders.preset_chain import parts_of
from slide2vec.encoders.published_files import check_download
from slide2vec.encoders.remote_code import whole_repository
from slide2vec.encoders.weights import find_weights, weights_files
from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, load_recipe

__all__ = ["fetch_weights"]


def fetch_weights(preset: str) -> dict[str, list[Path]]:
    """Have the weights of a preset, and of the presets that it takes embeddings of, in the hub's cache.

    Returns:
        The files of each part, in the cache (HF_HUB_CACHE); none for encoders without weights.

    Raises:
        PresetError: there is no such preset.
        WeightsError, GatedWeightsError: they cannot be had, or are not those that were published.
    """
    recipes = [load_recipe(part) for part in parts_of(load_recipe(preset))]
    return {recipe.name: _fetched(recipe) for recipe in recipes}


def _fetched(recipe: Recipe) -> list[Path]:
    if recipe.weights is None:
        return []
    if recipe.encoder.family == "remote":
        return sorted(path for path in whole_repository(recipe).rglob("*") if path.is_file())
    if recipe.generic and not recipe.weights.repo:
        raise WeightsError(f"timm publishes no weights of {recipe.name}")
    files = weights_files(find_weights(recipe, None))
    for path in files:
        check_download(path, recipe)
    return files
