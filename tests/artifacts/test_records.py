"""Which artifacts are complete, and sidecars that nobody should trust."""

from __future__ import annotations

import builtins
import json
import os
import random
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_helpers import ENCODER, FORMATS, a_tiling, write

from slide2vec.artifacts import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    find_tile_artifact,
    read_metadata,
    records,
    tile_artifacts,
    write_slide_embedding,
)
from slide2vec.errors import ArtifactError


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_complete_artifact_is_found(file_format: str, tmp_path: Path) -> None:
    made = write(tmp_path, file_format=file_format)
    assert find_tile_artifact(tmp_path, "s") == made == find_tile_artifact(str(tmp_path), "s")
    assert (made.num_tiles, made.feature_dim, made.format) == (12, 5, file_format)
    assert made.metadata == read_metadata(made.metadata_path) == json.loads(made.metadata_path.read_text())
    with pytest.raises(FrozenInstanceError):
        made.num_tiles = 3  # type: ignore[misc]


def test_all_complete_artifacts_by_name(tmp_path: Path) -> None:
    assert list(tile_artifacts(tmp_path / "none")) == []
    made = [write(tmp_path, a_tiling(sample_id=name)) for name in ("b", "a.2", "A", "é", "half")]
    made.pop().path.unlink()
    folder = tmp_path / "tile_embeddings"
    (folder / "foreign.meta.json").write_text('{"sample_id": "foreign"}')
    (folder / "alone.pt").write_bytes(b"")
    (folder / ".b.x1").mkdir()  # of a writer at work, or killed
    assert list(tile_artifacts(tmp_path)) == sorted(made, key=lambda artifact: artifact.metadata_path.name)


def damage(folder: Path, **changes: Any) -> None:
    path = folder / "tile_embeddings" / "s.meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 1},
        {"schema_version": None},
        {"artifact_type": "slide_embeddings"},
        {"sample_id": "t"},
        {"format": "npz"},
        {"format": "../s.pt"},
        {"format": ["pt"]},
        {"file_size_bytes": 3},
        {"file_size_bytes": None},
        {"feature_dim": "5"},
        {"num_tiles": 12.0},
        {"num_tiles": True},
        {"num_tiles": -1},
    ],
    ids=str,
)
def test_other_sidecars_do_not_count(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path)
    damage(tmp_path, **changes)
    assert find_tile_artifact(tmp_path, "s") is None


def test_half_written_features_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path).path
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(data)
        assert find_tile_artifact(tmp_path, "s") is None
    path.write_bytes(whole)
    assert find_tile_artifact(tmp_path, "s") is not None
    path.unlink()
    assert find_tile_artifact(tmp_path, "s") is None
    path.mkdir()
    damage(tmp_path, file_size_bytes=path.stat().st_size)
    assert find_tile_artifact(tmp_path, "s") is None


@pytest.mark.parametrize(
    "sample_id", ["../tile_embeddings/s", "a/s", "", ".", "..", "\0", "x" * 300, "\ud800"]
)
def test_names_that_no_artifact_has(sample_id: str, tmp_path: Path) -> None:
    write(tmp_path)
    assert find_tile_artifact(tmp_path, sample_id) is None


def test_a_sidecar_elsewhere_does_not_count(tmp_path: Path) -> None:
    """It describes its features file truly, but both are beside the folder."""
    made = write(tmp_path)
    damage(tmp_path, sample_id="../s")
    for path in (made.path, made.metadata_path):
        path.rename(tmp_path / path.name)
    assert (tmp_path / "tile_embeddings" / "../s.meta.json").is_file()
    assert find_tile_artifact(tmp_path, "../s") is None


def test_finding_costs_one_read_and_one_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    calls = []
    for module, name in ((os, "stat"), (builtins, "open"), (Path, "open"), (Path, "stat")):
        actual = getattr(module, name)

        def counting(*arguments: Any, _name: str = name, _actual: Any = actual, **options: Any) -> Any:
            calls.append(_name)
            return _actual(*arguments, **options)

        monkeypatch.setattr(module, name, counting)
    assert find_tile_artifact(tmp_path, "s") is not None
    monkeypatch.undo()
    # Path.stat calls os.stat; Path.open calls io.open, which is not counted.
    assert sorted(calls) == ["open", "stat", "stat"]


def test_metadata_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.meta.json"
    with pytest.raises(ArtifactError, match=r"a\.meta\.json does not exist: .* embed it again"):
        read_metadata(path)
    contents = {
        b"": "cannot be read",
        b"{": "cannot be read",
        b"[1]": "holds a list",
        b"null": "holds a NoneType",
        b'"\xff"': "cannot be read",
        b"[" * 100_000: "cannot be read",
        b"1" * 10_000: "cannot be read",
    }
    for content, match in contents.items():
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"a\.meta\.json {match}"):
            read_metadata(path)
    monkeypatch.setattr(records, "MAX_SIDECAR_BYTES", 10)
    path.write_bytes(b" " * 9 + b"{}")
    with pytest.raises(ArtifactError, match="more than 10 bytes"):
        read_metadata(path)


def random_json(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value; objects have keys of sidecars."""
    keys = ("schema_version", "artifact_type", "sample_id", "format", "feature_dim", "num_tiles", "x")
    leaves = [None, True, 0, 2, -1, 1e300, float("nan"), "s", "pt", "tile_embeddings", "\0", "../s", 10**40]
    kind = chance.randrange(4 if depth < 3 else 2)
    if kind < 2:
        return chance.choice(leaves)
    if kind == 2:
        return [random_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {key: random_json(chance, depth + 1) for key in keys if chance.random() < 0.7}


def test_random_sidecars_never_count_and_never_raise(tmp_path: Path) -> None:
    chance = random.Random(3)
    good = json.loads(write(tmp_path).metadata_path.read_text())
    path = tmp_path / "tile_embeddings" / "s.meta.json"
    objects = 0
    for _ in range(500):
        content = random_json(chance)
        if isinstance(content, dict) and chance.random() < 0.7:
            spoilt = chance.choice(
                ("schema_version", "artifact_type", "sample_id", "format", "file_size_bytes")
            )
            value = random_json(chance)
            content = {**good, spoilt: value if value != good[spoilt] else None}
            objects += 1
        path.write_text(json.dumps(content))
        assert find_tile_artifact(tmp_path, "s") is None and list(tile_artifacts(tmp_path)) == []
    assert objects > 50
    path.write_text(json.dumps(good))
    assert find_tile_artifact(tmp_path, "s") is not None


def test_slide_embeddings_are_no_tile_embeddings(tmp_path: Path) -> None:
    made = write_slide_embedding(tmp_path, "s", torch.ones(3), encoder=ENCODER)
    assert find_tile_artifact(tmp_path, "s") is None
    made.path.parent.rename(tmp_path / "tile_embeddings")
    assert find_tile_artifact(tmp_path, "s") is None


def test_the_other_artifacts_read_their_sidecar_too(tmp_path: Path) -> None:
    path = tmp_path / "a.meta.json"
    path.write_text('{"num_slides": 2}')
    common: dict[str, Any] = {
        "path": tmp_path / "a.pt",
        "metadata_path": path,
        "format": "pt",
        "feature_dim": 3,
    }
    patient = PatientEmbeddingArtifact(patient_id="a", num_slides=2, **common)
    regions = HierarchicalEmbeddingArtifact(sample_id="a", num_regions=4, tiles_per_region=16, **common)
    assert patient.metadata == regions.metadata == {"num_slides": 2}
