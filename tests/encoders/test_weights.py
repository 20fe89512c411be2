"""Weights from files and from a (stood-in) hub: strict, safe, and clear when they cannot be had."""

from __future__ import annotations

import json
import os
import pickle
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file

from slide2vec.encoders import build_encoder
from slide2vec.encoders.weights import find_weights, read_checkpoint
from slide2vec.errors import GatedWeightsError, WeightsError
from slide2vec.recipes import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("prost40m")


@pytest.fixture(scope="module")
def state(recipe: Recipe) -> dict[str, torch.Tensor]:
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random", seed=5)
    return {key: value.clone() for key, value in encoder.trunk.state_dict().items()}  # type: ignore[union-attr, operator]


def loaded(recipe: Recipe, weights: Path) -> dict[str, torch.Tensor]:
    encoder = build_encoder(recipe, recipe.variant(None)[1], weights)
    return encoder.trunk.state_dict()  # type: ignore[union-attr, operator, no-any-return]


def test_safetensors_and_directory(tmp_path: Path, recipe: Recipe, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "model.safetensors")
    for weights in (tmp_path / "model.safetensors", tmp_path):
        found = loaded(recipe, weights)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_wrapped_half_precision_pickle(
    tmp_path: Path, recipe: Recipe, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {key: value.half() for key, value in state.items()}}, path)
    found = loaded(recipe, path)
    assert found["norm.weight"].dtype == torch.float32
    torch.testing.assert_close(
        found["patch_embed.proj.weight"], state["patch_embed.proj.weight"], atol=1e-3, rtol=1e-3
    )


def test_keys_must_match(tmp_path: Path, recipe: Recipe, state: dict[str, torch.Tensor]) -> None:
    wrong = {**state, "head.weight": torch.zeros(3), "cls_token": torch.zeros(1, 1, 7)}
    wrong["pos_embed"] = torch.zeros(1, 197, 384)  # of another patch size: never resampled by itself
    del wrong["norm.bias"]
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as error:
        loaded(recipe, tmp_path / "w.safetensors")
    for part in (
        "prost40m",
        "missing: norm.bias",
        "unexpected: head.weight",
        "cls_token (1, 1, 7)",
        "pos_embed (1, 197, 384)",
    ):
        assert part in str(error.value)


def test_ignored_keys_may_be_there(tmp_path: Path, recipe: Recipe, state: dict[str, torch.Tensor]) -> None:
    assert recipe.weights is not None
    lenient = recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"ignore": ("head.*",)})})
    save_file({**state, "head.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert loaded(lenient, tmp_path / "w.safetensors").keys() == state.keys()


class Payload:
    """What a malicious checkpoint would do when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    torch.save({"a": Payload(tmp_path / "owned")}, tmp_path / "w.pt")
    for name in ("w.bin", "w.pt"):
        with pytest.raises(WeightsError, match="cannot be read"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            read_checkpoint(tmp_path / name)


def test_checksums_of_a_zipped_file_are_held_against_it(tmp_path: Path) -> None:
    """PyTorch does not look at them."""
    torch.save({"a": torch.ones(100)}, tmp_path / "w.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    data[data.index(torch.ones(2).numpy().tobytes())] ^= 1
    (tmp_path / "w.pt").write_bytes(data)
    assert not torch.load(tmp_path / "w.pt")["a"].equal(torch.ones(100))
    with pytest.raises(WeightsError, match=r"w\.pt cannot be read: is damaged: the checksum of w/data/0"):
        read_checkpoint(tmp_path / "w.pt")


def test_no_such_file_and_empty_directory(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(WeightsError, match="neither a file"):
        find_weights(recipe, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match=r"none of model\.safetensors"):
        find_weights(recipe, tmp_path)


#: As much of an HTTP response as the hub's errors look at (its HTTP library differs by version).
RESPONSE: Any = SimpleNamespace(headers={}, status_code=401, request=None, url="https://huggingface.co/x")


def hub_that(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> list[tuple[str, str, str]]:
    calls = []

    def download(repo: str, name: str, *, revision: str, local_files_only: bool) -> str:
        if local_files_only:
            raise hub.LocalEntryNotFoundError("not in the cache")
        calls.append((repo, name, revision))
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("slide2vec.files.hub._answers", lambda endpoint: True)
    return calls


def test_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = hub_that(monkeypatch, tmp_path / "model.safetensors")
    assert find_weights(load_recipe("virchow2"), None) == tmp_path / "model.safetensors"
    assert calls == [("paige-ai/Virchow2", "model.safetensors", "3158645804b69e3f3bc4439d4116edddf0840a72")]


@pytest.mark.parametrize("kind", [hub.GatedRepoError, hub.RepositoryNotFoundError])
def test_gated_repository(monkeypatch: pytest.MonkeyPatch, kind: type[hub.HfHubHTTPError]) -> None:
    hub_that(monkeypatch, kind("401 Client Error", response=RESPONSE))
    with pytest.raises(GatedWeightsError) as error:
        find_weights(load_recipe("virchow2"), None)
    for part in ("virchow2", "https://huggingface.co/paige-ai/Virchow2", "hf auth login", "HF_TOKEN"):
        assert part in str(error.value)


def test_open_repository_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers 401 for what does not exist and for a bad token: that is no gate."""
    hub_that(monkeypatch, hub.RepositoryNotFoundError("401 Client Error", response=RESPONSE))
    with pytest.raises(WeightsError, match=r"lunit.*token in use is not valid") as error:
        find_weights(load_recipe("lunit"), None)
    assert not isinstance(error.value, GatedWeightsError)


def test_offline_without_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real hub client, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"prost40m.*weights="):
        find_weights(load_recipe("prost40m"), None)


def test_no_network_is_found_out_once_and_not_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real hub client, and a hub at a port where nobody listens."""
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("slide2vec.files.hub.urllib.request.urlopen", _noted(asked))
    with pytest.raises(WeightsError, match=r"uni2.*weights=") as error:
        find_weights(load_recipe("uni2"), None)
    assert len(asked) == 1 and len(str(error.value)) < 600
    assert "Retrying" not in caplog.text
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def _noted(asked: list[object]) -> Callable[..., Any]:
    real = urllib.request.urlopen

    def urlopen(request: Any, timeout: float) -> Any:
        asked.append(request)
        return real(request, timeout=timeout)

    return urlopen


def test_what_is_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe("virchow2")
    assert recipe.weights is not None
    snapshot = tmp_path / "models--paige-ai--Virchow2" / "snapshots" / recipe.weights.revision
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("slide2vec.files.hub._answers", lambda endpoint: pytest.fail("the hub was asked"))
    assert find_weights(recipe, None) == snapshot / "model.safetensors"


def test_offline_cache_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file put in the cache the way the hub client lays it out is found without a network."""
    recipe = load_recipe("virchow2")
    assert recipe.weights is not None
    snapshot = tmp_path / "models--paige-ai--Virchow2" / "snapshots" / recipe.weights.revision
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_weights(recipe, None) == snapshot / "model.safetensors"


def sharded(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """The state in two files and an index, as the hub has large models."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: names[number % 2] for number, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name)
    return index_of(folder, where)


def index_of(folder: Path, where: object) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def test_shards(tmp_path: Path, recipe: Recipe, state: dict[str, torch.Tensor]) -> None:
    index = sharded(tmp_path, state)
    for weights in (index, tmp_path):
        found = loaded(recipe, weights)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1), "b": torch.ones(1)}
    where = json.loads(sharded(tmp_path, state).read_text())["weight_map"]
    first, second = where["a"], where["b"]
    for wrong, message in (
        (where | {"c": first}, f"c is not in {first}"),
        ({"b": second, "c": first}, f"does not say that a is in {first}"),
        (where | {"b": first}, f"b is not in {first}"),
        ({"a": second, "b": first}, f"does not say that b is in {second}|does not say that a is in {first}"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_checkpoint(index_of(tmp_path, wrong))
    (tmp_path / second).unlink()
    with pytest.raises(WeightsError, match=rf"{second} cannot be read"):
        read_checkpoint(index_of(tmp_path, where))


@pytest.mark.parametrize("where", [None, {}, [], "model.safetensors", {"a": 1}])
def test_damaged_index(tmp_path: Path, where: object) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(index_of(tmp_path, where))
    for text in ("", "[]", "{}", "\0", '{"weight_map": ', "[" * 100_000):
        index = index_of(tmp_path, {})
        index.write_text(text)
        with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json cannot be read"):
            read_checkpoint(index)


@pytest.mark.parametrize(
    "name",
    [
        "../w.safetensors", "/etc/w.safetensors", "a/w.bin", "..", "", "a\\w.pt", "w.pt\n",
        "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_an_index_points_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="no weights file beside it"):
        read_checkpoint(index_of(tmp_path, {"a": name}))


def test_hub_is_asked_for_every_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    recipe = load_recipe("midnight")
    assert recipe.weights is not None
    index = sharded(tmp_path, state)
    calls = []

    def download(repo: str, name: str, *, revision: str, local_files_only: bool) -> str:
        if local_files_only:
            raise hub.LocalEntryNotFoundError("not in the cache")
        calls.append((repo, name, revision))
        if not (tmp_path / name).is_file():
            raise hub.RemoteEntryNotFoundError("404 Client Error", response=RESPONSE)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("slide2vec.files.hub._answers", lambda endpoint: True)
    assert find_weights(recipe, None) == index
    names = ["model.safetensors", index.name, *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))]
    assert calls == [(recipe.weights.repo, name, recipe.weights.revision) for name in names]


def test_offline_cache_of_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first name is not in the cache, the second is: no network is needed for it."""
    recipe = load_recipe("virchow2")
    assert recipe.weights is not None and recipe.weights.files[1] == "pytorch_model.bin"
    snapshot = tmp_path / "models--paige-ai--Virchow2" / "snapshots" / recipe.weights.revision
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_weights(recipe, None) == snapshot / "pytorch_model.bin"
