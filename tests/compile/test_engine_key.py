"""What makes an engine another one, field by field: its key, and why one of the store is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_helpers import tiny_recipe

from slide2vec.compile import engine_key as identity_module
from slide2vec.compile.engine_key import (
    EngineTarget,
    differences,
    identity,
    library_versions,
    target_here,
    targets_of,
)
from slide2vec.recipes import Recipe, Variant, load_recipe
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import EngineRecord, key_of
from slide2vec.version import __version__

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


@pytest.mark.parametrize("weights", ["a", "z"])
def test_other_weights_are_others(weights: str) -> None:
    record = record_of({**identity(subject_of(), **BUILD), "weights": "w"})
    assert list(differences(subject_of(weights=lambda: weights), record)) == ["weights"]


def on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> EngineTarget:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    return replace(subject_of(), device=torch.device("cuda"))


def test_an_engine_of_a_gpu_is_for_its_name_and_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    made = identity(on_cuda(monkeypatch, (9, 0)), **{**BUILD, "runtime": "tensorrt"})
    assert made["device"] == {"type": "cuda", "name": "GPU", "compute_capability": "9.0"}


@pytest.mark.parametrize(
    ("capability", "differing"), [((9, 0), []), ((10, 0), []), ((8, 0), ["device"])], ids=str
)
def test_an_engine_of_tensorrt_rtx_is_for_the_gpus_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], differing: list[str]
) -> None:
    target = on_cuda(monkeypatch, capability)
    build = {**BUILD, "runtime": "tensorrt-rtx"}
    made = {**identity(target, **build, targets=("sm100", "sm90")), "weights": "w"}
    assert made["device"] == {"type": "cuda", "targets": ["sm90", "sm100"]}
    record = replace(record_of(made), runtime="tensorrt-rtx")
    assert targets_of(record) == ("sm90", "sm100")
    assert target_here(target.device) == f"sm{capability[0]}{capability[1]}"
    assert list(differences(target, record)) == differing


def test_engines_of_a_cpu_are_for_its_instructions_or_for_what_openvino_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"avx2": True, "avx512_f": False, "architecture": "x86_64", "amx_tile": True, "l1d_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    ours = identity(subject_of(), **BUILD)
    assert ours["device"]["instructions"] == ["amx_tile", "avx2"]
    openvino = identity(subject_of(), **{**BUILD, "runtime": "openvino"})
    assert set(openvino["device"]) == {"type", "machine", "computes_in"}
    assert targets_of(record_of(ours)) == ()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    older = identity(subject_of(), **BUILD)
    assert older["device"]["instructions"] == [torch.backends.cpu.get_cpu_capability()]


def test_libraries_that_are_there_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2", "timm": "1", "onnx": "", "openvino": "2025"}
    monkeypatch.setattr(identity_module, "_version", lambda names: versions[names[0]])
    found = library_versions("openvino")
    assert found == {"slide2vec": __version__, "torch": "2", "timm": "1", "openvino": "2025"}


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
