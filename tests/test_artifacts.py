"""Embedding files: what is in them, and that a half-written one never counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slide2vec import Model, PreprocessingConfig, SlideOutcome
from slide2vec.artifacts import write_tile_embeddings
from slide2vec.files import atomic_path
from slide2vec.synthetic import write_synthetic_slide


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("scattering", device="cpu")


@pytest.fixture(scope="module")
def outcome(model: Model, tmp_path_factory: pytest.TempPathFactory) -> SlideOutcome:
    path = write_synthetic_slide(tmp_path_factory.mktemp("slides") / "slide.svs", size_px=4096, seed=1)
    (outcome,) = model.iter_slides([path], PreprocessingConfig(requested_tile_size_px=112))
    return outcome


def written(outcome: SlideOutcome, model: Model, folder: Path, file_format: str) -> Path:
    assert outcome.embedded is not None and outcome.tiling is not None
    artifact = write_tile_embeddings(
        folder,
        outcome.embedded,
        outcome.tiling,
        file_format=file_format,  # type: ignore[arg-type]
        encoder=model.identity(),
    )
    assert artifact.num_tiles == outcome.embedded.num_tiles > 0
    return artifact.path


def test_pt_is_one_bare_tensor(outcome: SlideOutcome, model: Model, tmp_path: Path) -> None:
    path = written(outcome, model, tmp_path, "pt")
    assert path == tmp_path / "tile_embeddings" / "slide.pt"
    assert outcome.embedded is not None
    assert torch.equal(torch.load(path, weights_only=True), outcome.embedded.tile_embeddings)


def test_npz(outcome: SlideOutcome, model: Model, tmp_path: Path) -> None:
    with np.load(written(outcome, model, tmp_path, "npz")) as found:
        assert outcome.embedded is not None
        assert np.array_equal(found["features"], outcome.embedded.tile_embeddings.numpy())
        assert found["tile_index"].dtype == np.int64
        assert found["tile_index"].tolist() == list(range(outcome.embedded.num_tiles))


def test_sidecar_has_the_fields_of_the_contract(outcome: SlideOutcome, model: Model, tmp_path: Path) -> None:
    written(outcome, model, tmp_path, "pt")
    text = (tmp_path / "tile_embeddings" / "slide.meta.json").read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"
    assert found.keys() >= {
        "artifact_type", "format", "feature_dim", "feature_dtype", "encoder_name", "encoder_level",
        "sample_id", "num_tiles", "coordinates_npz_path", "coordinates_meta_path", "tiles_tar_path",
        "image_path", "mask_path", "tile_size_lv0", "backend", "read_tile_size_px",
        "requested_tile_size_px", "requested_spacing_um", "encoder_input_size_px", "compatibility",
    }  # fmt: skip
    assert (found["feature_dim"], found["feature_dtype"]) == (195, "float32")
    assert (found["tile_size_lv0"], found["requested_spacing_um"]) == (224, 0.5)
    assert found["compatibility"]["encoder"]["weights"] == "none"


def test_no_sidecar_without_its_embeddings(
    outcome: SlideOutcome, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full half-way through."""

    def full(tensor: torch.Tensor, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        written(outcome, model, tmp_path, "pt")
    assert list((tmp_path / "tile_embeddings").iterdir()) == []


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]
