"""What makes an engine another one, field by field: its key, and why one of the store is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_helpers import tiny_recipe

from slide2vec.compile import engine_key as identity_module
from slide2vec.compile.engine_key import EngineTarget, differences, identity
from slide2vec.recipes import Recipe, Variant, load_recipe
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import EngineRecord, key_of

RECIPE = tiny_recipe()
BUILD: dict[str, Any] = {
    **{"runtime": "inductor", "precision": "fp16", "layout": "uint8_nhwc"},
    **{"profile": BatchProfile(1, 4, 8), "opset": 20},
}


def subject_of(recipe: Recipe = RECIPE, weights: Callable[[], str] = lambda: "w") -> EngineTarget:
    return EngineTarget(recipe, "both", torch.device("cpu"), weights)


def with_policy(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update={"engine": RECIPE.engine.model_copy(update=changes)})


def with_transform(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update={"transform": RECIPE.transform.model_copy(update=changes)})


def with_encoder(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update={"encoder": RECIPE.encoder.model_copy(update=changes)})


#: Field of the identity -> a recipe that differs in it.
RECIPES = {
    "preset": RECIPE.model_copy(update={"name": "other"}),
    "encoder": with_encoder(prefix_tokens=1),
    "output": RECIPE.model_copy(update={"variants": {"both": Variant(dim=64, pool="cls")}}),
    "input_size_px": with_transform(crop=32),
    "normalisation": with_transform(std=(0.1, 0.2, 0.3)),
    "islands": with_policy(islands=("trunk.norm",)),
}
#: Field of the identity -> another build.
BUILDS = {
    "runtime": {"runtime": "openvino"},
    "precision": {"precision": "bf16"},
    "layout": {"layout": "float32_nchw"},
    "profile": {"profile": BatchProfile(1, 4, 9)},
    "opset": {"opset": 21},
}


def record_of(made: dict[str, Any]) -> EngineRecord:
    return EngineRecord(
        **{
            "key": key_of(made),
            "identity": made,
            "preset": "tiny",
            "variant": "both",
            "file": "a",
        },
        **{"asked_precision": "fp16", "input_size_px": 64, "feature_dim": 128, "licence": "", "versions": {}},
        **{"parity": {}, "built_at": "", "build_seconds": 1.0, **BUILD},
    )


@pytest.mark.parametrize("field", RECIPES)
def test_another_recipe_is_another_engine(field: str) -> None:
    ours, other = (identity(subject_of(recipe), **BUILD) for recipe in (RECIPE, RECIPES[field]))
    assert {name for name in ours if ours[name] != other[name]} == {field}
    assert key_of(ours) != key_of(other)
    record = record_of({**ours, "weights": "w"})
    assert list(differences(subject_of(), record)) == []
    assert list(differences(subject_of(RECIPES[field]), record)) == [field]


@pytest.mark.parametrize("field", BUILDS)
def test_another_build_is_another_engine(field: str) -> None:
    ours, other = identity(subject_of(), **BUILD), identity(subject_of(), **{**BUILD, **BUILDS[field]})
    changed = {name for name in ours if ours[name] != other[name]}
    assert field in changed and changed <= {field, "runtime_version", "device"}
    assert key_of(ours) != key_of(other)


@pytest.mark.parametrize("field", ["slide2vec", "schema", "graph", "runtime_version", "device"])
def test_what_another_version_or_machine_has_built(field: str) -> None:
    made = {**identity(subject_of(), **BUILD), "weights": "w"}
    assert list(differences(subject_of(), record_of({**made, field: "another"}))) == [field]


def test_weights_are_asked_for_last() -> None:
    asked: list[str] = []
    made = {**identity(subject_of(), **BUILD), "weights": "w"}
    other = subject_of(weights=lambda: asked.append("x") or "other")
    assert list(differences(other, record_of(made))) == ["weights"] and asked == ["x"]
    assert list(differences(replace(other, recipe=RECIPES["islands"]), record_of(made))) == ["islands"]
    assert asked == ["x"]
    assert key_of(made) != key_of({**made, "weights": "other"})


def test_the_version_is_that_of_the_first_distribution_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in there:
            return there[name]
        raise identity_module.PackageNotFoundError(name)

    monkeypatch.setattr(identity_module, "version", version)
    there = {"tensorrt-cu13": "11", "tensorrt-cu12": "10"}
    assert identity_module._version(("tensorrt", "tensorrt-cu13", "tensorrt-cu12")) == "11"
    assert identity_module._version(("tensorrt",)) == ""


def test_the_threshold_of_parity_makes_no_other_engine() -> None:
    other = subject_of(with_policy(min_cosine={"fp32": 0.5}))
    assert identity(other, **BUILD) == identity(subject_of(), **BUILD)


def identity_of(recipe: Recipe, **transform: Any) -> dict[str, Any]:
    """Of a preset's default output, its transform changed."""
    recipe = recipe.model_copy(update={"transform": recipe.transform.model_copy(update=transform)})
    return identity(EngineTarget(recipe, recipe.default_variant, torch.device("cpu"), lambda: "w"), **BUILD)


@pytest.mark.parametrize("name", ["phikon", "midnight", "virchow2", "lunit"])
def test_what_comes_before_the_graph_makes_no_other_engine(name: str) -> None:
    recipe = load_recipe(name)
    before = identity_of(recipe)
    assert identity_of(recipe, resize=recipe.transform.crop + 32, interpolation="bicubic") == before
    assert identity_of(recipe.model_copy(update={"tile_size_px": 512, "images": None})) == before
    assert "positions" not in before


def test_a_recipe_that_tells_no_size_of_its_own_has_its_positions_in_the_key() -> None:
    """isight's engines of other sizes were built with positions resampled in timm's way."""
    recipe = load_recipe("isight")
    assert "img_size" not in recipe.encoder.kwargs
    assert identity_of(recipe, resize=448, crop=448)["positions"] == "plain"


@pytest.mark.parametrize(("name", "more"), [("phikon", {"positions"}), ("h-optimus-0", set())])
def test_another_input_size_does(name: str, more: set[str]) -> None:
    """And only where timm does not resample positions did the graph of such a size change."""
    recipe = load_recipe(name)
    before, other = identity_of(recipe), identity_of(recipe, resize=280, crop=280)
    assert {key for key in other if other[key] != before.get(key)} == {"input_size_px"} | more
