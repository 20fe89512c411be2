"""CARE: never without consent, called as its authors call it, with a stand-in repository on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slide_helpers import a_bag, embed, stand_in_repository
from torch import nn

from slide2vec import Model
from slide2vec.encoders.slide import TileBag, build_slide_encoder
from slide2vec.errors import (
    ConfigError,
    GatedWeightsError,
    NothingToEmbedError,
    PresetError,
    WeightsError,
)
from slide2vec.recipes import EncoderSpec, Recipe, load_recipe

#: Two modules that import each other by their names, as those of the repository do. The result tells
#: features, count and places apart.
MODELING = """
from dataclasses import dataclass
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from stand_in_care_core import summed

class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

@dataclass
class Output:
    wsi_embedding: torch.Tensor

class StandInModel(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.projection = nn.Linear(768, 512, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x, N_values, coords):
        assert coords.dtype == torch.int64 and N_values.shape == (len(x),)
        return Output(summed(self.projection(x), coords) / N_values[:, None])
"""
CORE = """
from pathlib import Path

Path({marker!r}).write_text("ran")

def summed(tiles, coords):
    return (tiles * (coords[..., :1] + 10 * coords[..., 1:])).sum(1)
"""


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("care")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A directory as a copy of the repository would be, its code leaving a mark when it runs."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, marker = tmp_path / "stand_in_care_copy", tmp_path / "marker"
    weight = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    modules = {"modeling_care": MODELING, "stand_in_care_core": CORE.format(marker=str(marker))}
    classes = {"AutoConfig": "StandInConfig", "AutoModel": "StandInModel"}
    stand_in_repository(folder, modules, classes, {"projection.weight": weight})
    yield SimpleNamespace(path=folder, marker=marker, weight=weight)
    sys.modules.pop("stand_in_care_core", None)


def build(recipe: Recipe, weights: Any, consent: bool = True) -> nn.Module:
    return build_slide_encoder(recipe, recipe.variant(None)[1], weights, trust_remote_code=consent)


def test_without_consent_nothing_runs(recipe: Recipe, copy: SimpleNamespace) -> None:
    for weights in (None, copy.path):
        with pytest.raises(PresetError, match=r"care .*Zipper-1/CARE.*trust_remote_code=True"):
            build(recipe, weights, consent=False)
    assert not copy.marker.exists()
    with pytest.raises(WeightsError, match=r'weights="random".*Zipper-1/CARE'):
        build(recipe, "random")


def test_consent_is_asked_for_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile encoder's weights among it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PresetError, match=r"care runs Python code.*Zipper-1/CARE.*trust_remote_code=True"):
        Model.from_preset("care")
    with pytest.raises(WeightsError, match=r"care cannot be built.*random"):
        Model.from_preset("care", weights="random")


def test_a_copy_is_loaded_and_called_as_published(recipe: Recipe, copy: SimpleNamespace) -> None:
    encoder, path = build(recipe, copy.path), list(sys.path)
    assert copy.marker.read_text() == "ran" and not encoder.training
    assert str(copy.path) not in path
    bag = a_bag(recipe, 9, size=1024)
    found = embed(encoder, bag)
    assert found.latents is None and found.embedding.dtype == torch.float32
    cells = (bag.coords // 1024).double()  # in whole tiles
    weighed = (bag.features.double() * (cells[:, :1] + 10 * cells[:, 1:])).sum(0)
    expected = copy.weight.double() @ weighed / 9
    torch.testing.assert_close(found.embedding.double(), expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(NothingToEmbedError):
        embed(encoder, a_bag(recipe, 0))
    with pytest.raises(ConfigError, match="have 1024 dimensions"):
        embed(encoder, TileBag(torch.zeros(9, 1024), bag.coords, 1024))


def test_the_hub_s_copy_is_fetched(
    recipe: Recipe, copy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, into the cache, where its modules find each other."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetched(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(copy.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert embed(build(recipe, None), a_bag(recipe, 3)).embedding.shape == (512,)
    assert asked == [("Zipper-1/CARE", {"revision": "main"})]


def test_without_access(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    response: Any = SimpleNamespace(headers={}, status_code=403, request=None, url="https://huggingface.co/x")

    def refused(*_: Any, **__: Any) -> str:
        raise GatedRepoError("Access to model Zipper-1/CARE is restricted", response=response)

    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GatedWeightsError, match=r"care are gated: request access at .*Zipper-1/CARE"):
        build(recipe, None)


def test_code_that_nobody_knows_how_to_call(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"encoder": EncoderSpec(family="remote", arch="later")})
    with pytest.raises(PresetError, match=r"care: .*encoder\.arch is care or prism2, not 'later'"):
        build(other, None)
