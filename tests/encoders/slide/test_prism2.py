"""Prism2: never without consent, refused where it cannot run, with a stand-in repository on disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slide_helpers import a_bag, embed, stand_in_repository
from torch import nn

from slide2vec.encoders.slide import TileBag, build_slide_encoder
from slide2vec.errors import ConfigError, ExtraMissingError, NothingToEmbedError, PresetError, WeightsError
from slide2vec.recipes import Recipe, load_recipe

#: A network with the methods of Prism2, and a processor that pads slides to one length.
CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel

Path({marker!r}).write_text("ran")

class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

class StandInModel(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.image_resampler = nn.Linear(1280, 2560, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_base_embedding(self, tile_embeddings, tile_mask):
        summed = (tile_embeddings * tile_mask[..., None]).sum(1)
        return self.image_resampler(summed / tile_mask.sum(1, keepdim=True))

    def get_diagnostic_embedding(self, tile_embeddings, tile_mask):
        return torch.cat([self.get_base_embedding(tile_embeddings, tile_mask)] * 2, dim=1)[:, :3072]

class StandInProcessor:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    @classmethod
    def register_for_auto_class(cls, *args):
        pass

    def __call__(self, tile_embeddings):
        padded = nn.utils.rnn.pad_sequence(tile_embeddings, batch_first=True)
        mask = torch.zeros(padded.shape[:2], dtype=padded.dtype)
        for row, each in zip(mask, tile_embeddings):
            row[: len(each)] = 1
        return BatchFeature({{"tile_embeddings": padded, "tile_mask": mask}})
"""


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("prism2")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A directory as a copy of the repository would be, its code leaving a mark when it runs."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, marker = tmp_path / "stand_in_prism2_copy", tmp_path / "marker"
    classes = {
        "AutoConfig": "StandInConfig",
        "AutoModel": "StandInModel",
        "AutoProcessor": "StandInProcessor",
    }
    weight = torch.randn(2560, 1280, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    modules = {"modeling": CODE.format(marker=str(marker))}
    stand_in_repository(folder, modules, classes, {"image_resampler.weight": weight})
    yield SimpleNamespace(path=folder, marker=marker, weight=weight)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that looks as if it had one, and flash-attn."""
    find = importlib.util.find_spec
    found: Any = SimpleNamespace()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "flash_attn" else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def build(recipe: Recipe, weights: Any, variant: str | None = None, consent: bool = True) -> nn.Module:
    return build_slide_encoder(recipe, recipe.variant(variant)[1], weights, trust_remote_code=consent)


def test_without_consent_nothing_runs(recipe: Recipe, copy: SimpleNamespace, gpu: None) -> None:
    for weights in (None, copy.path):
        with pytest.raises(PresetError, match=r"prism2 .*paige-ai/Prism2.*trust_remote_code=True"):
            build(recipe, weights, consent=False)
    assert not copy.marker.exists()


def test_random_weights_are_not_possible(recipe: Recipe) -> None:
    with pytest.raises(WeightsError, match=r'weights="random".*paige-ai/Prism2'):
        build(recipe, "random")


def test_without_flash_attn(recipe: Recipe, copy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flash_attn" else find(name)
    )
    with pytest.raises(ExtraMissingError, match=r"prism2 needs the package flash-attn.*pip install"):
        build(recipe, copy.path)
    assert not copy.marker.exists()


def test_without_a_gpu(
    recipe: Recipe, copy: SimpleNamespace, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="prism2 runs on NVIDIA GPUs only"):
        build(recipe, copy.path)
    assert not copy.marker.exists()


def test_diagnostic_output_with_a_newer_transformers(
    recipe: Recipe, copy: SimpleNamespace, gpu: None
) -> None:
    with pytest.raises(ExtraMissingError, match=r"transformers==4\.51\.3, or use output base"):
        build(recipe, copy.path, "diagnostic")
    assert not copy.marker.exists()


@pytest.mark.parametrize("variant", ["base", "diagnostic"])
def test_a_copy_is_loaded_as_published_and_embeds(
    recipe: Recipe, variant: str, copy: SimpleNamespace, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slide2vec.encoders.slide.prism2.metadata.version", lambda name: "4.51.3")
    encoder = build(recipe, copy.path, variant)
    assert copy.marker.read_text() == "ran" and not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    bag = a_bag(recipe, 9)
    found = embed(encoder, bag)
    assert found.latents is None and found.embedding.dtype == torch.float32
    assert found.embedding.shape == (recipe.variants[variant].dim,)
    tiles = bag.features.to(torch.bfloat16).sum(0) / 9
    torch.testing.assert_close(
        found.embedding[:2560], (copy.weight @ tiles).float(), atol=0.05, rtol=0.02
    )  # bf16
    with pytest.raises(NothingToEmbedError):
        embed(encoder, a_bag(recipe, 0))
    with pytest.raises(ConfigError, match="have 2560 dimensions"):  # virchow2's default output
        embed(encoder, TileBag(torch.zeros(9, 2560), bag.coords, 448))


def test_code_and_weights_are_of_the_pinned_revision(
    recipe: Recipe, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    calls = []

    def loader(made: Any) -> Any:
        return lambda place, **kwargs: calls.append((place, kwargs)) or made

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", loader(nn.Linear(1, 1)))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", loader(None))
    build(recipe, None)
    assert recipe.weights is not None and len(recipe.weights.revision) == 40
    pins = dict.fromkeys(("revision", "code_revision"), recipe.weights.revision)
    options = {"trust_remote_code": True, **pins}
    network = ("paige-ai/Prism2", options | {"torch_dtype": torch.bfloat16})
    assert calls == [network, ("paige-ai/Prism2", options)]
