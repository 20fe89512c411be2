"""Weights that are known by their files: runs begin before they are loaded, and finish nothing before it is
certain which they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shallow import few_blocks

from slide2vec import (
    DenseImageOptions,
    ExecutionOptions,
    ImageSpec,
    Model,
    Models,
    Pipeline,
    PreprocessingConfig,
)
from slide2vec.config import FilterConfig
from slide2vec.encoders import late
from slide2vec.encoders.known_digests import WeightsFiles
from slide2vec.errors import EmbedSlidesError, WeightsError
from slide2vec.progress import activate_progress_reporter

CONFIG = PreprocessingConfig(
    requested_tile_size_px=224, requested_spacing_um=0.5, filtering=FilterConfig(a_t=0), resume=True
)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"{n}.svs", size_px=768, seed=n, levels=1) for n in range(2)]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with few_blocks():
        return dict(Model.from_preset("prost40m", weights="random", device="cpu").encoder.trunk.state_dict())  # type: ignore[union-attr, operator]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(late, "LEAST_BYTES", 1)
    with few_blocks():
        yield tmp_path / "cache/slide2vec/weights"


@pytest.fixture
def weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """They are known."""
    save_file(state, tmp_path / "w.safetensors")
    model = load(tmp_path / "w.safetensors")
    assert is_built(model) and model.identity()
    source: Any = model._tile_embedder._late
    source._remembering.result()
    return tmp_path / "w.safetensors"


@pytest.fixture
def misleading(weights: Path, cache: Path) -> Path:
    """As they, but for what is in the file, which looks as it did."""
    (entry,) = cache.iterdir()
    kept = json.loads(entry.read_text())
    kept["known"]["content"] = "of what was there before"
    entry.write_text(json.dumps(kept))
    return weights


def load(weights: Path) -> Model:
    return Model.from_preset("prost40m", weights=weights, device="cpu")


def is_built(model: Model) -> bool:
    return model._tile_embedder._late.is_built


def in_folder(folder: Path) -> ExecutionOptions:
    return ExecutionOptions(output_dir=folder, engine="torch")


def sidecars(folder: Path) -> list[Path]:
    return sorted(folder.rglob("tile_embeddings/*.meta.json"))


class Finished:
    """A reporter that says when the stream has done all."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def emit(self, event: object) -> None:
        if type(event).__name__ == "RunFinished":
            self.event.set()

    def close(self) -> None:
        pass


def test_nothing_is_finished_before_it_is_certain(
    weights: Path, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, persisted, order = Finished(), threading.Event(), []
    read = WeightsFiles.content

    def content(files: WeightsFiles) -> str:
        assert finished.event.wait(60)
        order.append("finished too early" if persisted.wait(0.5) else "certain")
        return read(files)

    def on_persisted(artifact: Any) -> None:
        order.append(artifact.sample_id)
        persisted.set()

    monkeypatch.setattr(WeightsFiles, "content", content)
    model = load(weights)
    pipeline = Pipeline(model, CONFIG, in_folder(tmp_path / "out"))
    assert model.identity(pipeline.execution)["runtime"] == "torch" and not is_built(model)
    with activate_progress_reporter(finished):
        result = pipeline.run(slides, on_slide_persisted=on_persisted)
    assert order == ["certain", "0", "1"] and not result.failed and is_built(model)


def test_embeddings_and_identity_are_those_of_weights_that_are_loaded_at_once(
    weights: Path, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "LEAST_BYTES", 2**60)
    at_once = load(weights)
    assert is_built(at_once)
    monkeypatch.setattr(late, "LEAST_BYTES", 1)
    late_one = load(weights)
    assert at_once.identity() == late_one.identity() and not is_built(late_one)
    for name, model in (("a", at_once), ("b", late_one)):
        Pipeline(model, CONFIG, in_folder(tmp_path / name)).run(slides)
    for one, other in zip(sidecars(tmp_path / "a"), sidecars(tmp_path / "b"), strict=True):
        assert json.loads(one.read_text())["compatibility"] == json.loads(other.read_text())["compatibility"]
        assert (
            one.with_name(f"{one.name[0]}.pt").read_bytes()
            == other.with_name(f"{one.name[0]}.pt").read_bytes()
        )
    again = load(weights)
    result = Pipeline(again, CONFIG, in_folder(tmp_path / "a")).run(slides)
    assert result.resumed == 2 and not is_built(again)


def test_other_weights_than_were_known_finish_nothing(
    misleading: Path, slides: list[Path], tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(WeightsError, match=r"w\.safetensors looks as it did"):
        Pipeline(load(misleading), CONFIG, in_folder(tmp_path / "out")).run(slides)
    assert not sidecars(tmp_path / "out") and not list(cache.iterdir())
    model = load(misleading)
    assert is_built(model)
    result = Pipeline(model, CONFIG, in_folder(tmp_path / "out")).run(slides)
    assert (result.resumed, len(result.tile_artifacts)) == (0, 2)


def test_that_all_is_finished_is_not_said_of_other_weights(
    misleading: Path, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(late.LateEncoder, "confirm", lambda encoder: None)
        Pipeline(load(misleading), CONFIG, in_folder(tmp_path / "out")).run(slides)
    assert len(sidecars(tmp_path / "out")) == 2
    known = load(misleading)
    other = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    for model in (known, Models({"known": known, "other": other})):
        with pytest.raises(WeightsError, match="looks as it did"):
            Pipeline(model, CONFIG, in_folder(tmp_path / "out")).run(slides)


def test_nothing_comes_back_of_other_weights(misleading: Path, slides: list[Path]) -> None:
    model, execution = load(misleading), ExecutionOptions(engine="torch")
    model.identity(execution)  # asks which weights they are, as the choice of an engine does
    with pytest.raises(WeightsError, match="looks as it did"):
        model.embed_slides(slides, CONFIG, execution)
    other = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    with pytest.raises(EmbedSlidesError) as caught:
        Models({"known": model, "other": other}).embed_slides(slides, CONFIG, execution)
    assert list(caught.value.failed) == ["0 with known", "1 with known"]
    assert all("looks as it did" in str(error) for error in caught.value.failed.values())


def test_ready_images_and_grids_are_not_finished_under_other_weights(
    misleading: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what is there said to be theirs."""
    image = ImageSpec(sample_id="a", image=np.zeros((224, 224, 3), np.uint8), spacing_at_level_0=0.5)
    plain, folder = replace(image, spacing_at_level_0=None), in_folder(tmp_path / "out")
    dense = DenseImageOptions(target_size=224)

    def refused() -> None:
        with pytest.raises(WeightsError, match="looks as it did"):
            load(misleading).embed_images([plain], execution=folder)

    entry = (cached := next((tmp_path / "cache/slide2vec/weights").iterdir())).read_text()
    refused()
    assert not list((tmp_path / "out").rglob("*.meta.json"))
    cached.write_text(entry)
    model = load(misleading)
    assert model.identity() and not is_built(model)  # which has asked for the digest
    with pytest.raises(WeightsError, match="looks as it did"):
        model.embed_images_dense([image], dense=dense, execution=folder)
    assert not list((tmp_path / "out").rglob("*.meta.json"))
    cached.write_text(entry)
    with monkeypatch.context() as patch:
        patch.setattr(late.LateEncoder, "confirm", lambda encoder: None)
        load(misleading).embed_images([plain], execution=folder)
    refused()


def test_one_of_several_encoders_finishes_nothing(
    misleading: Path, slides: list[Path], tmp_path: Path
) -> None:
    other = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    models = Models({"known": load(misleading), "other": other})
    result = Pipeline(models, CONFIG, in_folder(tmp_path / "out")).run(slides)
    assert len(result.encoders["known"].failed) == 2 and not result.encoders["other"].failed
    assert all("looks as it did" in str(failed.error) for failed in result.encoders["known"].failed)
    assert [path.parts[-3] for path in sidecars(tmp_path / "out")] == ["scattering"] * 2


def test_weights_that_cannot_be_loaded_after_all_end_the_run(
    weights: Path, slides: list[Path], tmp_path: Path
) -> None:
    model = load(weights)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"w\.safetensors"):
        Pipeline(model, CONFIG, in_folder(tmp_path / "out")).run(slides)
    assert not sidecars(tmp_path / "out")
