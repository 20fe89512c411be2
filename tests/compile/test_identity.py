"""Which changes of an input's geometry make another engine, and which do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slide2vec.compile.identity import Subject, identity
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.runtime.base import BatchProfile


def key_of(recipe: Recipe) -> dict[str, Any]:
    subject = Subject(recipe, recipe.default_variant, torch.device("cpu"), lambda: "0")
    return identity(
        subject,
        runtime="inductor",
        precision="fp32",
        layout="uint8_nhwc",
        profile=BatchProfile(1, 8, 8),
        opset=None,
    )


def resized(recipe: Recipe, **transform: Any) -> Recipe:
    return recipe.model_copy(update={"transform": recipe.transform.model_copy(update=transform)})


@pytest.mark.parametrize("name", ["phikon", "midnight", "virchow2", "lunit"])
def test_what_comes_before_the_graph_makes_no_other_engine(name: str) -> None:
    recipe = load_recipe(name)
    before = key_of(recipe)
    assert key_of(resized(recipe, resize=recipe.transform.crop + 32, interpolation="bicubic")) == before
    assert key_of(recipe.model_copy(update={"tile_size_px": 512, "images": None})) == before
    assert "positions" not in before


def test_another_input_size_does() -> None:
    recipe = load_recipe("phikon")
    other = key_of(resized(recipe, resize=256, crop=256))
    differing = {name for name, value in other.items() if key_of(recipe).get(name) != value}
    assert differing == {"input_size_px", "positions"}


def test_other_statistics_do() -> None:
    recipe = load_recipe("phikon")
    assert key_of(resized(recipe, mean=(0.5, 0.5, 0.5))) != key_of(recipe)
