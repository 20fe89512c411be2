"""Pipelines of slides and patients: files, resume, failures, coordinates from elsewhere."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_embeddings
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.errors import ManifestError, PatientError

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5, resume=True)
DIM = 4


class Tiles(nn.Module):
    """The mean colour of a tile, as the 384 numbers of its preset."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)).repeat(1, 128)


class Slides(nn.Module):
    """The mean tile; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles: list[int] = []
        self.fails_on: int | None = None

    def forward(self, bag: TileBag) -> SlideFeatures:
        self.tiles.append(len(bag.features))
        if len(bag.features) == self.fails_on:
            raise RuntimeError("out of memory")
        return SlideFeatures(embedding=bag.features.mean(0).repeat(2), latents=bag.features[:2].clone())


class SumOfSlides(nn.Module):
    """The sum of slides."""

    def forward(self, slides: torch.Tensor) -> torch.Tensor:
        return slides.sum(0)


@pytest.fixture
def patient_model() -> Model:
    model = Model.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)
    assert model.upstream is not None and model.upstream.upstream is not None
    model.upstream.upstream._encoder = model._tile_embedder.encoder = Tiles()
    model.upstream._encoder = Slides()
    model._encoder = SumOfSlides()
    return model


@pytest.fixture
def slide_model(patient_model: Model) -> Model:
    assert patient_model.upstream is not None
    return patient_model.upstream


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [
        generated_slide(folder / f"s{n}.svs", size_px=size, seed=n, levels=2)
        for n, size in enumerate((768, 1024, 1280))
    ]


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tifffile

    path = tmp_path_factory.mktemp("blank") / "blank.tiff"
    with tifffile.TiffWriter(path) as file:
        file.write(
            np.full((1024, 1024, 3), 244, np.uint8),
            tile=(256, 256),
            photometric="rgb",
            compression="adobe_deflate",
            resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
        )
    return path


Run = Callable[..., RunResult]


def runner(model: Model, folder: Path) -> Run:
    def run(given: Any, manifest: Path | None = None, **options: Any) -> RunResult:
        changes = {k: options.pop(k) for k in list(options) if k in PreprocessingConfig.model_fields}
        execution = ExecutionOptions(output_dir=folder, **options)
        return Pipeline(model, PREPROCESSING.updated(**changes), execution).run(given, manifest)

    return run


def rows(result: RunResult) -> dict[str, dict[str, str]]:
    with result.process_list_path.open(newline="") as file:
        return {row["sample_id"]: row for row in csv.DictReader(file)}


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*.pt")
        if not any(part.startswith(".") for part in path.parts)
    }


def seen(model: Model) -> list[int]:
    """How many tiles each slide had that the slide encoder was given; forgets them."""
    encoder: Any = model.encoder
    found, encoder.tiles = encoder.tiles, []
    return list(found)


# slides -----------------------------------------------------------------------------------------


def test_slide_embeddings_and_what_is_asked_for_besides(
    slide_model: Model, slides: list[Path], tmp_path: Path
) -> None:
    expected = slide_model.embed_slides(slides, PREPROCESSING.updated(resume=False))
    plain = runner(slide_model, tmp_path / "plain")(slides)
    assert files(tmp_path / "plain") == {f"slide_embeddings/s{n}.pt" for n in range(3)}
    assert not plain.tile_artifacts and not plain.patient_artifacts
    check(plain, expected)
    more = runner(slide_model, tmp_path / "more")(slides, save_tile_embeddings=True)
    assert files(tmp_path / "more") == {
        f"{kind}_embeddings/s{n}.pt" for kind in ("tile", "slide") for n in range(3)
    }
    assert [a.metadata["encoder_name"] for a in more.tile_artifacts] == ["lunit"] * 3
    check(more, expected)
    row = rows(more)["s1"]
    assert (row["feature_kind"], row["feature_status"], row["aggregation_status"]) == (
        *("slide", "success", "success"),
    )
    assert row["feature_path"] == str(more.slide_artifacts[1].path)
    assert row["num_tiles"] == str(expected[1].num_tiles)


def check(result: RunResult, expected: list[EmbeddedSlide]) -> None:
    assert [a.sample_id for a in result.slide_artifacts] == [e.sample_id for e in expected]
    for artifact, embedded in zip(result.slide_artifacts, expected, strict=True):
        assert embedded.slide_embedding is not None
        assert torch.allclose(load_embeddings(artifact.path), embedded.slide_embedding, atol=1e-6)
        assert artifact.metadata["encoder_name"] == "moozy-slide"
        assert artifact.metadata["num_tiles"] == embedded.num_tiles


def test_latents(
    slide_model: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = slide_model.recipe.model_copy(update={"has_latents": True})
    monkeypatch.setattr(slide_model, "recipe", recipe)
    run = runner(slide_model, tmp_path)
    first = run(slides[:2])
    assert first.slide_artifacts[0].latent_path is None
    again = run(slides[:2], save_latents=True)
    assert again.recomputed == {"save_latents": 2}
    latents = again.slide_artifacts[0].latent_path
    assert latents is not None and load_embeddings(latents).shape == (2, 384)
    assert run(slides[:2], save_latents=True).resumed == 2


def test_resume_takes_a_slide_up_where_it_was_left(
    slide_model: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner(slide_model, tmp_path)
    first = run(slides, save_tile_embeddings=True)
    counts = seen(slide_model)
    assert run(slides, save_tile_embeddings=True).resumed == 3 and not seen(slide_model)
    first.slide_artifacts[1].metadata_path.unlink()
    before = load_embeddings(first.slide_artifacts[1].path)
    monkeypatch.setattr("slide2vec.stream.planner.plan_slide", None)  # no slide is opened any more
    again = run(slides, save_tile_embeddings=True)
    assert again.resumed == 2 and len(seen(slide_model)) == 1 and not again.failed
    assert torch.allclose(load_embeddings(again.slide_artifacts[1].path), before, atol=1e-6)
    row = rows(again)["s1"]
    assert (row["tiling_status"], row["feature_status"], row["aggregation_status"]) == ("success",) * 3
    assert row["backend"] and row["num_tiles"] in map(str, counts)
    # tile embeddings that are on disk serve, even where they are not asked for
    again.slide_artifacts[0].metadata_path.unlink()
    assert len(run(slides).slide_artifacts) == 3


def test_another_slide_encoder_needs_no_tiles_again(
    slide_model: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner(slide_model, tmp_path)
    run(slides, save_tile_embeddings=True)
    monkeypatch.setattr(slide_model, "_weights", "random:99")
    del slide_model.__dict__["_weights_digest"]
    monkeypatch.setattr("slide2vec.stream.planner.plan_slide", None)
    again = run(slides, save_tile_embeddings=True)
    assert (again.resumed, again.recomputed) == (0, {}) and not again.failed
    assert len(again.tile_artifacts) == 3  # those of the first
    (folder,) = {a.path.parent for a in again.slide_artifacts}
    assert folder.relative_to(tmp_path).parts[0] == "encoders"
    assert len(list((tmp_path / "slide_embeddings").glob("*.pt"))) == 3


def test_a_slide_without_tissue_is_recorded(
    slide_model: Model, slides: list[Path], blank: Path, tmp_path: Path
) -> None:
    run = runner(slide_model, tmp_path)
    result = run([blank, slides[0]])
    assert result.without_tissue == ("blank",) and not result.failed
    assert [a.sample_id for a in result.slide_artifacts] == ["s0"]
    row = rows(result)["blank"]
    assert (row["feature_status"], row["aggregation_status"]) == ("success", "skipped")
    assert row["error"].startswith("no tissue: 0 tiles: all its pixels") and not row["feature_path"]
    assert run([blank, slides[0]]).without_tissue == ("blank",)


def test_a_failing_slide_encoder_costs_one_slide(
    slide_model: Model, slides: list[Path], tmp_path: Path
) -> None:
    run = runner(slide_model, tmp_path)
    encoder: Any = slide_model.encoder
    encoder.fails_on = slide_model.embed_slide(slides[1], PREPROCESSING.updated(resume=False)).num_tiles
    result = run(slides, save_tile_embeddings=True)
    (failed,) = result.failed
    assert (failed.sample_id, failed.stage) == ("s1", "aggregation") and "out of memory" in str(failed.error)
    assert [a.sample_id for a in result.slide_artifacts] == ["s0", "s2"] and len(result.tile_artifacts) == 3
    row = rows(result)["s1"]
    assert (row["tiling_status"], row["feature_status"], row["aggregation_status"]) == (
        *("success", "success", "error"),
    )
    encoder.fails_on = None
    assert run(slides, save_tile_embeddings=True).resumed == 2


def test_with_coordinates(slide_model: Model, slides: list[Path], tmp_path: Path) -> None:
    first = runner(slide_model, tmp_path / "first")(slides)
    pipeline = Pipeline(slide_model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path / "again"))
    again = pipeline.run_with_coordinates(tmp_path / "first")
    for old, new in zip(first.slide_artifacts, again.slide_artifacts, strict=True):
        assert torch.allclose(load_embeddings(old.path), load_embeddings(new.path), atol=1e-6)


# patients ---------------------------------------------------------------------------------------


def manifest(folder: Path, slides: Mapping[str, Path], patients: Mapping[str, str]) -> Path:
    path = folder / "slides.csv"
    lines = [f"{name},{image},{patients.get(name, '')}" for name, image in slides.items()]
    path.write_text("\n".join(["sample_id,image_path,patient_id", *lines]) + "\n")
    return path


@pytest.fixture
def given(slides: list[Path], tmp_path: Path) -> Path:
    """s0 and s2 are of patient "p 1", s1 of "q"."""
    found = {path.stem: path for path in slides}
    return manifest(tmp_path, found, {"s0": "p 1", "s1": "q", "s2": "p 1"})


def test_patients(patient_model: Model, slides: list[Path], given: Path, tmp_path: Path) -> None:
    expected = patient_model.embed_patients(
        slides, {"s0": "p 1", "s1": "q", "s2": "p 1"}, preprocessing=PREPROCESSING.updated(resume=False)
    )
    result = runner(patient_model, tmp_path / "out")(None, given)
    assert [(a.patient_id, a.num_slides) for a in result.patient_artifacts] == [("p 1", 2), ("q", 1)]
    assert files(tmp_path / "out") == {"patient_embeddings/p 1.pt", "patient_embeddings/q.pt"}
    for artifact, patient in zip(result.patient_artifacts, expected, strict=True):
        assert patient.patient_embedding is not None
        assert torch.allclose(load_embeddings(artifact.path), patient.patient_embedding, atol=1e-6)
        assert (artifact.metadata["patient_id"], artifact.metadata["encoder_name"]) == (
            patient.patient_id,
            "moozy",
        )
    row = rows(result)["s2"]
    assert (row["feature_kind"], row["aggregation_status"]) == ("patient", "success")
    assert row["feature_path"] == str(result.patient_artifacts[0].path)


def test_resume_of_patients(patient_model: Model, given: Path, tmp_path: Path) -> None:
    run, upstream = runner(patient_model, tmp_path / "out"), patient_model.upstream
    assert upstream is not None
    first = run(None, given)
    seen(upstream)
    again = run(None, given)
    assert (again.resumed, again.patient_artifacts) == (3, first.patient_artifacts) and not seen(upstream)
    assert rows(again)["s0"]["num_tiles"] == rows(first)["s0"]["num_tiles"]
    saved = run(None, given, save_slide_embeddings=True)
    assert len(saved.slide_artifacts) == 3 and len(seen(upstream)) == 3
    saved.patient_artifacts[0].metadata_path.unlink()
    kept = run(None, given, save_slide_embeddings=True)
    assert kept.resumed == 1 and not seen(upstream)  # from the slide embeddings
    assert len(kept.patient_artifacts) == 2 and len(kept.slide_artifacts) == 3


def test_a_patient_of_other_slides_is_made_anew(
    patient_model: Model, slides: list[Path], given: Path, tmp_path: Path
) -> None:
    run = runner(patient_model, tmp_path / "out")
    run(None, given)
    found = {path.stem: path for path in slides}
    other = manifest(tmp_path, found, {"s0": "p 1", "s1": "q", "s2": "q"})
    again = run(None, other)
    assert (again.resumed, again.recomputed) == (0, {"slides": 3})
    assert [(a.patient_id, a.num_slides) for a in again.patient_artifacts] == [("p 1", 1), ("q", 2)]


def test_a_patient_with_a_bad_slide(
    patient_model: Model, slides: list[Path], blank: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.svs").write_text("no slide")
    images = {"s0": slides[0], "bad": tmp_path / "bad.svs", "s1": slides[1], "blank": blank}
    path = manifest(tmp_path, images, {"s0": "p", "bad": "p", "s1": "q", "blank": "q"})
    run = runner(patient_model, tmp_path / "out")
    result = run(None, path)
    assert [(a.patient_id, a.num_slides) for a in result.patient_artifacts] == [("q", 1)]
    (failed,) = result.failed_patients
    assert failed.patient_id == "p" and isinstance(failed.error, PatientError)
    assert 'on_bad_slide="skip"' in str(failed.error) and [f.sample_id for f in result.failed] == ["bad"]
    assert rows(result)["s0"]["aggregation_status"] == "error" and "patient p" in rows(result)["s0"]["error"]
    assert rows(result)["blank"]["aggregation_status"] == "skipped"
    skipped = run(None, path, on_bad_slide="skip")
    assert [(a.patient_id, a.num_slides) for a in skipped.patient_artifacts] == [("p", 1), ("q", 1)]
    assert skipped.resumed == 2 and not skipped.failed_patients
    assert list(skipped.patient_artifacts[0].metadata["skipped_slides"]) == ["bad"]
    once_more = run(None, path, on_bad_slide="skip")
    assert once_more.resumed == 4 and rows(once_more)["bad"]["feature_status"] == "error"
    assert run(None, path).recomputed == {"on_bad_slide": 2}


def test_whose_slides_they_are_must_be_said(
    patient_model: Model, slides: list[Path], given: Path, tmp_path: Path
) -> None:
    nameless = manifest(tmp_path, {"s0": slides[0], "s1": slides[1]}, {"s0": "p"})
    with pytest.raises(ManifestError, match=r"slides\.csv: .*1 slides have no patient_id \(s1\)"):
        runner(patient_model, tmp_path / "out")(None, nameless)
    given = manifest(tmp_path, {p.stem: p for p in slides}, {"s0": "p", "s1": "p", "s2": "q"})
    runner(patient_model, tmp_path / "out")(None, given)
    pipeline = Pipeline(patient_model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path / "again"))
    with pytest.raises(ManifestError, match="patient_id"):
        pipeline.run_with_coordinates(tmp_path / "out")
    mapped = [{"image_path": path, "patient_id": "r"} for path in slides]
    result = pipeline.run_with_coordinates(tmp_path / "out", slides=mapped)
    assert [(a.patient_id, a.num_slides) for a in result.patient_artifacts] == [("r", 3)]


def test_moved_runs_and_copies_of_manifests(patient_model: Model, given: Path, tmp_path: Path) -> None:
    run = runner(patient_model, tmp_path / "out")
    run(None, given)
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    assert runner(patient_model, Path(moved))(None, given).resumed == 3


def test_shards_hold_whole_patients(patient_model: Model, slides: list[Path], tmp_path: Path) -> None:
    """By slides the largest (s2) would be in a shard, and s0 and s1 in the other."""
    whose = dict(zip(slides, ("a", "b", "a"), strict=True))
    given = [{"image_path": path, "patient_id": patient} for path, patient in whose.items()]
    run = runner(patient_model, tmp_path / "out")
    parts = [run(given, shard=shard) for shard in ("1/2", "2/2")]
    assert [[a.patient_id for a in part.patient_artifacts] for part in parts] == [["a"], ["b"]]
    assert [list(rows(part)) for part in parts] == [["s0", "s2"], ["s1"]]
    merge_shards(tmp_path / "out")
    whole = runner(patient_model, tmp_path / "whole")(given)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for artifact in whole.patient_artifacts:
        made = load_embeddings(tmp_path / f"out/patient_embeddings/{artifact.patient_id}.pt")
        assert torch.equal(made, load_embeddings(artifact.path))
