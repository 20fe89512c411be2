"""An encoder whose weights are known by their files: built when needed, never under a wrong digest."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import shallow
import torch
from safetensors.torch import save_file
from torch import nn

from slide2vec.encoders import build_encoder, known_digests, late
from slide2vec.encoders.late import (
    AnyEncoder,
    LateEncoder,
    as_module,
    held_bytes,
    late_encoder,
    release,
)
from slide2vec.encoders.weights import WeightsChoice, weights_digest
from slide2vec.errors import WeightsError
from slide2vec.files.user_cache import user_cache
from slide2vec.recipes import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return shallow.shallow(load_recipe("prost40m"))


@pytest.fixture(scope="module")
def state(recipe: Recipe) -> dict[str, torch.Tensor]:
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random", seed=5)
    return {key: value.clone() for key, value in encoder.trunk.state_dict().items()}  # type: ignore[union-attr, operator]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(late, "LEAST_BYTES", 1)
    return tmp_path / "cache/slide2vec/weights"


@pytest.fixture
def weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def built() -> list[WeightsChoice]:
    """What encoders were built from."""
    return []


@pytest.fixture
def load(recipe: Recipe, built: list[WeightsChoice]) -> Callable[[WeightsChoice], AnyEncoder]:
    """As `from_preset` loads an encoder."""

    def build(weights: WeightsChoice) -> nn.Module:
        built.append(weights)
        return build_encoder(recipe, recipe.variant(None)[1], weights)

    return lambda weights: late_encoder(recipe, recipe.variant(None)[1], weights, build)


def known(load: Callable[[WeightsChoice], AnyEncoder], weights: Path) -> str:
    """The digest, once it is remembered."""
    first = load(weights)
    assert isinstance(first, LateEncoder) and first.is_built
    digest = first.digest
    assert first._remembering is not None
    first._remembering.result()
    return digest


def change_in_place(weights: Path, cache: Path) -> None:
    """Change a value in the middle of a file that then looks as it did: as on a file system that keeps no
    times, so that what is kept of the file has those of now."""
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x01\x02\x03\x04")
    (entry,) = cache.glob("*.json")
    kept = json.loads(entry.read_text())
    now = weights.stat()
    kept["files"][str(weights)][1:4] = [now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
    entry.write_text(json.dumps(kept))


def test_weights_that_are_known_are_loaded_when_they_are_needed(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, built: list[WeightsChoice]
) -> None:
    digest = known(load, weights)
    again = load(weights)
    assert isinstance(again, LateEncoder) and not again.is_built
    assert again.digest == digest
    again.confirm()
    assert not again.is_built and built.count(weights) == 1
    assert weights_digest(again.module) == digest and built.count(weights) == 2
    assert again.module is again.module is as_module(again)


def test_weights_are_loaded_in_a_thread_meanwhile(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, built: list[WeightsChoice]
) -> None:
    known(load, weights)
    again = load(weights)
    assert isinstance(again, LateEncoder)
    again.begin()
    assert isinstance(again.module, nn.Module) and len(built) == 2
    again.begin()
    assert len(built) == 2


def test_a_file_that_looks_changed_is_loaded_anew(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, state: dict[str, torch.Tensor]
) -> None:
    digest = known(load, weights)
    before = weights.stat()
    other = {**state, "norm.bias": state["norm.bias"] + 1}
    save_file(other, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size and known(load, weights) != digest
    assert known_digests.WeightsFiles.of([weights]).changed() is None
    save_file(state, weights)
    assert known(load, weights) == digest


def test_content_that_has_changed_unseen_is_refused_and_forgotten(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, cache: Path
) -> None:
    digest = known(load, weights)
    change_in_place(weights, cache)
    again = load(weights)
    assert isinstance(again, LateEncoder) and not again.is_built and again.digest == digest
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"w\.safetensors looks as it did .* Start again"):
            again.confirm()
    assert not list(cache.iterdir()) and known(load, weights) != digest


def test_a_file_that_changes_while_it_is_loaded_is_refused(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, state: dict[str, torch.Tensor]
) -> None:
    known(load, weights)
    again = load(weights)
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, weights)
    with pytest.raises(WeightsError, match=r"w\.safetensors was changed while it was loaded"):
        as_module(again)
    weights.unlink()
    with pytest.raises(WeightsError, match="neither a file"):
        as_module(again)


def test_nothing_is_kept_of_a_file_that_changed_meanwhile(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, state: dict[str, torch.Tensor], cache: Path
) -> None:
    first = load(weights)
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, weights)
    assert isinstance(first, LateEncoder) and first.digest and first._remembering is not None
    first._remembering.result()
    assert not cache.exists()


def test_whoever_has_the_module_may_change_it(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, cache: Path
) -> None:
    """A fine-tuned encoder is another one, and is not what is in the file."""

    def changed(encoder: AnyEncoder) -> str:
        assert isinstance(encoder, LateEncoder)
        encoder.hand_over().trunk.norm.bias.data += 1  # type: ignore[union-attr, operator]
        encoder.confirm()
        return encoder.digest

    first = changed(load(weights))
    assert not cache.exists()
    digest = known(load, weights)
    assert changed(load(weights)) == first != digest
    assert load(weights).digest == digest  # type: ignore[union-attr]


def test_weights_of_a_wrong_preset_are_told_at_once(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, state: dict[str, torch.Tensor], cache: Path
) -> None:
    save_file({key: value for key, value in state.items() if key != "norm.bias"}, weights)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"missing: norm\.bias"):
            load(weights)
    assert not cache.exists()


def test_a_file_of_the_hub_is_the_published_one(
    recipe: Recipe, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for one of the user's, of which another content is only told."""
    weights = weights.rename(weights.with_name("model.safetensors"))
    monkeypatch.setattr(late, "find_weights", lambda *_: weights)
    variant = recipe.variant(None)[1]
    assert recipe.weights is not None
    pinned = recipe.weights.model_copy(update={"sha256": {weights.name: "0" * 64}})
    other = recipe.model_copy(update={"weights": pinned})
    for least in (1, 2**60):
        monkeypatch.setattr(late, "LEAST_BYTES", least)
        with pytest.raises(WeightsError, match="is not the one that preset prost40m was published with"):
            late_encoder(other, variant, None, lambda given: build_encoder(other, variant, given))
    late_encoder(recipe, variant, None, lambda given: build_encoder(recipe, variant, given))


def test_weights_in_several_files(
    load: Callable[[WeightsChoice], AnyEncoder], tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    where = {key: f"{number % 2}.safetensors" for number, key in enumerate(state)}
    for name in set(where.values()):
        save_file({key: value for key, value in state.items() if where[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    digest = known(load, index)
    assert load(index).digest == digest and not load(index).is_built  # type: ignore[union-attr]
    shard = {key: value + 1 for key, value in state.items() if where[key] == "1.safetensors"}
    save_file(shard, tmp_path / "1.safetensors")
    assert known(load, index) != digest


def test_another_output_is_another_encoder(
    load: Callable[[WeightsChoice], AnyEncoder], recipe: Recipe, weights: Path
) -> None:
    known(load, weights)
    files = known_digests.WeightsFiles.of([weights])
    same = known_digests.made_of(recipe, recipe.variant(None)[1])
    assert known_digests.look_up(files, same) is not None
    other = recipe.variant(None)[1].model_copy(update={"pool": "token_mean"})
    assert known_digests.look_up(files, known_digests.made_of(recipe, other)) is None


@pytest.mark.parametrize("content", ["", "[]", '{"files": {}}', "{", "null"])
def test_what_cannot_be_read_in_the_cache_is_not_known(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, cache: Path, content: str
) -> None:
    digest = known(load, weights)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert known(load, weights) == digest
    assert load(weights).digest == digest  # type: ignore[union-attr]


def test_without_a_cache_nothing_is_kept(
    load: Callable[[WeightsChoice], AnyEncoder],
    weights: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in place of the folder")
    digest = known(load, weights)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(RuntimeError):
        user_cache()
    assert known(load, weights) == digest


def test_small_or_random_weights_are_loaded_at_once(
    load: Callable[[WeightsChoice], AnyEncoder], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LateEncoder.of(load("random")).is_built
    monkeypatch.setattr(late, "LEAST_BYTES", weights.stat().st_size + 1)
    made = load(weights)
    assert LateEncoder.of(made).is_built
    release(made)
    assert not held_bytes(made)
    assert as_module(made) is as_module(made) and held_bytes(made) > 0


def test_encoders_are_built_one_at_a_time() -> None:
    """Random weights are drawn from the one generator of PyTorch: two at once would not be of their seeds."""
    at_once: list[int] = []
    building = threading.Lock()

    def build() -> nn.Module:
        at_once.append(building.acquire(blocking=False))
        time.sleep(0.02)
        building.release()
        return nn.Linear(1, 1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(LateEncoder, build) for _ in range(4)]:
            done.result(timeout=20)
    assert at_once == [True] * 4
