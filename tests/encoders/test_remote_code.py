"""Remote code: never without consent, always pinned, with a stand-in repository on disk."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slide2vec.encoders import build_encoder
from slide2vec.errors import ExtraMissingError, GatedWeightsError, PresetError, WeightsError
from slide2vec.recipes import Recipe, load_recipe

REMOTE = ["rudolfv2", "rudolfv2-b", "rudolfv2-s"]
#: Tokens of 16 numbers: a class token, 8 registers, 28 x 28 patches.
CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

Path({marker!r}).write_text("ran")

class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

class StandInModel(PreTrainedModel):
    config_class = StandInConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.prefix = nn.Parameter(torch.zeros(1, 9, 16))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(len(patches), -1, -1), patches], dim=1)
        return BaseModelOutput(last_hidden_state=tokens)
"""


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("rudolfv2-s")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A directory as a copy of the repository would be, its code leaving a mark when it runs."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, marker = tmp_path / "stand_in_copy", tmp_path / "marker"
    folder.mkdir()
    auto_map = {"AutoConfig": "modeling.StandInConfig", "AutoModel": "modeling.StandInModel"}
    config = {"model_type": "stand_in", "auto_map": auto_map, "architectures": ["StandInModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(CODE.format(marker=str(marker)))
    torch.manual_seed(0)
    state = {"patches.weight": torch.randn(16, 3, 8, 8), "patches.bias": torch.randn(16)}
    state["prefix"] = torch.randn(1, 9, 16)
    half = {key: value.half() for key, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    state = {key: value.float() for key, value in half.items()}
    yield SimpleNamespace(path=folder, marker=marker, state=state)


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("weights", [None, "copy"])
def test_without_consent_nothing_runs(name: str, weights: str | None, copy: SimpleNamespace) -> None:
    recipe = load_recipe(name)
    assert recipe.weights is not None
    with pytest.raises(PresetError) as error:
        build_encoder(recipe, recipe.variant(None)[1], copy.path if weights else None)
    parts = [name, recipe.weights.repo, recipe.weights.revision, "trust_remote_code=True"]
    for part in (*parts, "--trust-remote-code"):
        assert part in str(error.value)
    if weights:
        assert str(copy.path) in str(error.value)
    assert not copy.marker.exists()


@pytest.mark.parametrize("consent", [False, True])
def test_random_weights_are_not_possible(recipe: Recipe, consent: bool) -> None:
    with pytest.raises(WeightsError, match=r'rudolfv2-s.*weights="random".*Aignostics/RudolfV-2-S'):
        build_encoder(recipe, recipe.variant(None)[1], "random", trust_remote_code=consent)


@pytest.mark.parametrize("variant", ["cls", "cls_patch_mean"])
def test_with_consent_a_copy_is_loaded_in_fp32_and_pooled(
    recipe: Recipe, variant: str, copy: SimpleNamespace
) -> None:
    encoder = build_encoder(recipe, recipe.variants[variant], copy.path, trust_remote_code=True)
    assert copy.marker.read_text() == "ran"
    assert not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.randn(2, 3, 224, 224)
    state = copy.state
    maps = nn.functional.conv2d(pixels, state["patches.weight"], state["patches.bias"], stride=8)
    expected = state["prefix"][0, 0].expand(2, 16)
    if variant == "cls_patch_mean":
        expected = torch.cat([expected, maps.mean(dim=(2, 3))], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)


def replaced(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[tuple[Any, dict[str, Any]]]:
    """transformers' loader replaced by one that notes how it is called."""
    transformers = pytest.importorskip("transformers")
    calls = []

    def from_pretrained(place: str, **kwargs: Any) -> Any:
        calls.append((place, kwargs))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    return calls


@pytest.mark.parametrize("name", REMOTE)
def test_code_and_weights_are_of_the_pinned_revision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    calls = replaced(monkeypatch, nn.Linear(1, 1))
    build_encoder(recipe, recipe.variant(None)[1], trust_remote_code=True)
    assert recipe.weights is not None
    revision = recipe.weights.revision
    assert len(revision) == 40
    pins = {"trust_remote_code": True, "revision": revision, "code_revision": revision}
    assert calls == [(recipe.weights.repo, pins)]


def test_gated_repository_says_where_to_ask(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    response: Any = SimpleNamespace(headers={}, status_code=403, request=None, url="https://huggingface.co/x")
    outer = OSError("You are trying to access a gated repo.\nMore lines.")
    outer.__cause__ = GatedRepoError("403 Client Error", response=response)
    replaced(monkeypatch, outer)
    with pytest.raises(GatedWeightsError) as error:
        build_encoder(recipe, recipe.variant(None)[1], trust_remote_code=True)
    for part in ("rudolfv2-s", "https://huggingface.co/Aignostics/RudolfV-2-S", "hf auth login"):
        assert part in str(error.value)
    assert "More lines" not in str(error.value)


@pytest.mark.parametrize(
    "problem",
    [
        OSError("no network"),
        ImportError("einops"),
        RuntimeError("size"),
        AttributeError("of another version"),
    ],
)
def test_other_failures_name_the_repository(
    recipe: Recipe, problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, problem)
    with pytest.raises(WeightsError, match=rf"rudolfv2-s.*RudolfV-2-S.*{problem}") as error:
        build_encoder(recipe, recipe.variant(None)[1], trust_remote_code=True)
    assert not isinstance(error.value, GatedWeightsError)


def test_what_is_no_copy_of_the_repository(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    for weights in (tmp_path, tmp_path / "w.safetensors", tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match=r"config\.json") as error:
            build_encoder(recipe, recipe.variant(None)[1], weights, trust_remote_code=True)
        assert str(weights) in str(error.value)


def test_without_transformers(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(ExtraMissingError, match=r"\[models\]"):
        build_encoder(recipe, recipe.variant(None)[1], trust_remote_code=True)


def test_consent_is_asked_of_no_other_family() -> None:
    """Nor does it change them."""
    recipe = load_recipe("prost40m")
    variant = recipe.variant(None)[1]
    without = build_encoder(recipe, variant, "random").state_dict()
    given = build_encoder(recipe, variant, "random", trust_remote_code=True).state_dict()
    assert all(torch.equal(without[key], given[key]) for key in without)
