"""Checkpoints as people have them: wrapped, prefixed, or of another preset."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import of_depth
from slide2vec.encoders import build_encoder, published_files
from slide2vec.encoders.weights import load_weights
from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    made = of_depth(load_recipe("prost40m"), 1)
    kwargs = {**made.encoder.kwargs, "embed_dim": 48, "num_heads": 2}
    return made.model_copy(update={"encoder": made.encoder.model_copy(update={"kwargs": kwargs})})


@pytest.fixture(scope="module")
def state(recipe: Recipe) -> dict[str, Tensor]:
    encoder = build_encoder(recipe, recipe.variant(None)[1], "random", seed=5)
    return dict(encoder.trunk.state_dict())  # type: ignore[union-attr, operator]


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


HEAD = {"dino_head.mlp.0.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": s}, ["its entry state_dict"]),
        (lambda s: {"model": {"state_dict": s}, "epoch": 3}, ["its entry model / state_dict"]),
        (lambda s: {"teacher": s, "model": {"x": torch.ones(1)}}, ["its entry teacher"]),
        (lambda s: under("module.", s), ["prefix module. is taken off"]),
        (lambda s: under("module.backbone.", s), ["prefix module.backbone. is taken off"]),
        (lambda s: under("_orig_mod.", s), ["prefix _orig_mod. is taken off"]),
        (
            lambda s: {"teacher": under("backbone.", s) | HEAD, "student": HEAD},
            ["its entry teacher", "prefix backbone. is taken off", "left out", "dino_head"],
        ),
        (
            lambda s: {"model": under("student.backbone.", zeros(s)) | under("teacher.backbone.", s)},
            ["prefix teacher.backbone. is taken off", "left out", "student"],
        ),
    ],
)
def test_the_encoder_is_found_and_it_is_said(
    wrap: Any,
    said: list[str],
    recipe: Recipe,
    state: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.save(wrap(state), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        encoder = build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.pth")
    found = encoder.trunk.state_dict()  # type: ignore[union-attr, operator]
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert all(words in caplog.text for words in said)


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def test_nothing_is_said_of_a_plain_file(
    recipe: Recipe, state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.pth")
    assert not caplog.text


@pytest.mark.parametrize("prefix", ["", "backbone.", "student."])
def test_what_is_not_whole_is_refused(
    prefix: str, recipe: Recipe, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A student's weights are never taken."""
    left = state if prefix == "student." else {k: v for k, v in state.items() if k != "norm.bias"}
    torch.save(under(prefix, left), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"missing: .*norm\.bias|missing: blocks|missing: cls_token"):
        build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.pth")


def test_a_part_with_more_than_the_encoder_is_refused(
    recipe: Recipe, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(under("backbone.", state | {"extra.weight": torch.zeros(1)}), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"unexpected: extra\.weight"):
        build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.pth")


# digests -----------------------------------------------------------------------------------------


def pinned(recipe: Recipe, path: Path, digest: str | None = None) -> Recipe:
    assert recipe.weights is not None
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
    source = recipe.weights.model_copy(update={"files": (path.name,), "sha256": {path.name: digest}})
    return recipe.model_copy(update={"weights": source})


@pytest.fixture
def file(state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def built(recipe: Recipe, weights: Path | None) -> torch.nn.Module:
    variant = recipe.variant(None)[1]
    return load_weights(lambda: build_encoder(recipe, variant, "random"), recipe, weights)


def test_a_download_must_be_the_published_file(
    file: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slide2vec.encoders.weights._from_hub", lambda *_: file)
    built(pinned(recipe, file), None)
    with pytest.raises(
        WeightsError, match=rf"model\.pth is not the one that preset prost40m .* not {'0' * 64}"
    ):
        built(pinned(recipe, file, "0" * 64), None)


def test_the_hubs_cache_names_files_by_their_digest(tmp_path: Path, recipe: Recipe) -> None:
    """They are not read for it: this one's content is another."""
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (tmp_path / "model.pth").symlink_to(blob)
    published_files.check_download(
        tmp_path / "model.pth", pinned(recipe, blob.with_name("model.pth"), "ab" * 32)
    )
    with pytest.raises(WeightsError, match="abababab"):
        published_files.check_download(
            tmp_path / "model.pth", pinned(recipe, tmp_path / "model.pth", "0" * 64)
        )


def test_a_file_of_another_preset_is_refused(
    file: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViT-L/16 of several authors have the same keys and shapes."""
    other = pinned(load_recipe("uni"), file)
    monkeypatch.setattr(published_files, "all_recipes", lambda: {"uni": other, "prost40m": recipe})
    with pytest.raises(WeightsError, match=r"model\.pth is that of preset uni, not of prost40m"):
        built(recipe, file)


def test_weights_of_ones_own_are_taken_and_said(
    file: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = pinned(recipe, file, "0" * 64)
    monkeypatch.setattr(published_files, "all_recipes", lambda: {"prost40m": known})
    built(known, file)
    assert "weights of your own" in caplog.text and "0" * 64 in caplog.text


def test_weights_that_are_not_on_the_hub() -> None:
    recipe = load_recipe("chief")
    with pytest.raises(
        WeightsError, match=r"not on the Hugging Face hub: get CHIEF_pretraining\.pth from https"
    ):
        load_weights(lambda: torch.nn.Identity(), recipe, None)
