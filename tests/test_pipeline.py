"""Pipeline: artifacts, resume, failures, coordinates and archives from elsewhere."""

from __future__ import annotations

import csv
import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from slide2vec import (
    BagDataset,
    EmbeddedSlide,
    EmbedSlidesError,
    ExecutionOptions,
    Model,
    Pipeline,
    PreprocessingConfig,
    RunResult,
)
from slide2vec.artifacts import load_embeddings
from slide2vec.artifacts.export import export_run
from slide2vec.audit import audit_run
from slide2vec.cohort import tile_cohort
from slide2vec.cohort.lock import output_lock
from slide2vec.errors import (
    ConfigError,
    ManifestError,
    ModelLevelError,
    OutputLockedError,
    SlideOpenError,
    SlideReadError,
    TilingError,
)
from slide2vec.report.slide_facts import ReportedRun
from slide2vec.stream.tile_sources import SlideSource
from slide2vec.tiling import load_coordinates

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=128, tissue_threshold=0.1)

Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("scattering", device="cpu")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    """Three slides of 1,536 px at 0.25 µm/px, two levels."""
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"s{n}.svs", size_px=1536, seed=n, levels=2) for n in range(3)]


@pytest.fixture(scope="module")
def in_memory(model: Model, slides: list[Path]) -> list[EmbeddedSlide]:
    return model.embed_slides(slides, PREPROCESSING)


@pytest.fixture
def run(model: Model, slides: list[Path], tmp_path: Path) -> Run:
    """Runs the pipeline over the slides into tmp_path/out."""

    def go(given: Any = None, execution: dict[str, Any] | None = None, **preprocessing: Any) -> RunResult:
        options = ExecutionOptions(output_dir=tmp_path / "out", **(execution or {}))
        pipeline = Pipeline(model, PREPROCESSING.updated(**preprocessing), options)
        return pipeline.run(slides if given is None else given)

    return go


def rows(result: RunResult) -> dict[str, dict[str, str]]:
    with result.process_list_path.open(newline="") as file:
        return {row["sample_id"]: row for row in csv.DictReader(file)}


def made_at(result: RunResult) -> dict[str, int]:
    return {artifact.sample_id: artifact.path.stat().st_mtime_ns for artifact in result.tile_artifacts}


def damage(slide: Path, to: Path) -> tuple[Path, list[tuple[int, int]]]:
    """A copy of a slide with its largest JPEG tile overwritten, and where this tile begins (level-0 px)."""
    import tifffile

    with tifffile.TiffFile(slide) as file:
        page: Any = file.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        largest = int(np.argmax(page.databytecounts))
        offset, count = page.dataoffsets[largest], page.databytecounts[largest]
    data = bytearray(slide.read_bytes())
    data[offset : offset + count] = b"\x00" * count
    to.write_bytes(data)
    return to, [(largest % across * 256, largest // across * 256)]


# artifacts -------------------------------------------------------------------------------------


def test_artifacts_equal_in_memory_embeddings(
    run: Run, in_memory: list[EmbeddedSlide], tmp_path: Path
) -> None:
    result = run()
    assert [artifact.sample_id for artifact in result.tile_artifacts] == ["s0", "s1", "s2"]
    assert not result.failed and result.summary is not None and result.summary.failed == 0
    for artifact, expected in zip(result.tile_artifacts, in_memory, strict=True):
        found = torch.load(artifact.path, weights_only=True)
        assert torch.equal(found, expected.tile_embeddings)
        assert artifact.path == tmp_path / "out/tile_embeddings" / f"{expected.sample_id}.pt"
        meta = artifact.metadata
        coordinates = np.load(meta["coordinates_npz_path"])
        assert np.array_equal(coordinates["x"], expected.x) and np.array_equal(coordinates["y"], expected.y)
    row = rows(result)["s1"]
    assert (row["tiling_status"], row["feature_status"], row["feature_kind"]) == (
        "success",
        "success",
        "tile",
    )
    assert row["num_tiles"] == str(in_memory[1].num_tiles) and row["encoder_name"] == "scattering"
    assert row["feature_path"] == str(result.tile_artifacts[1].path)
    assert (tmp_path / "out/config.yaml").is_file() and list((tmp_path / "out/logs").glob("*.log"))


@pytest.mark.parametrize("file_format", ["pt", "npz", "safetensors", "h5"])
@pytest.mark.parametrize("output_dtype", [None, "fp16"])
def test_formats_and_dtypes(
    run: Run, in_memory: list[EmbeddedSlide], file_format: str, output_dtype: str | None
) -> None:
    result = run(execution={"output_format": file_format, "output_dtype": output_dtype})
    for artifact, expected in zip(result.tile_artifacts, in_memory, strict=True):
        dtype = torch.float16 if output_dtype else torch.float32
        assert artifact.path.suffix == f".{file_format}"
        assert torch.equal(load_embeddings(artifact.path), expected.tile_embeddings.to(dtype))


def test_persisted_callback_names_every_artifact(model: Model, slides: list[Path], tmp_path: Path) -> None:
    seen: list[str] = []
    pipeline = Pipeline(model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path))
    pipeline.run(slides, on_slide_persisted=lambda artifact: seen.append(artifact.sample_id))
    assert sorted(seen) == ["s0", "s1", "s2"]


def test_slides_and_result_as_data_frames(
    model: Model, slides: list[Path], in_memory: list[EmbeddedSlide], tmp_path: Path
) -> None:
    frame = pd.DataFrame({"slide_id": ["one", "lost"], "wsi": [slides[0].name, "absent.svs"]})
    pipeline = Pipeline(model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path / "out"))
    result = pipeline.run(frame, slides_dir=slides[0].parent)
    done, failed = result.to_frame().to_dict("records")
    assert (done["level"], done["sample_id"], done["status"]) == ("tile", "one", "done")
    assert torch.equal(load_embeddings(done["path"]), in_memory[0].tile_embeddings)
    assert (failed["sample_id"], failed["status"], failed["stage"]) == ("lost", "failed", "tiling")
    assert "absent.svs" in failed["error"]


def test_data_frame_in_memory(model: Model, slides: list[Path], in_memory: list[EmbeddedSlide]) -> None:
    (found,) = model.embed_slides(
        pd.DataFrame({"sample_id": ["x"], "image_path": [slides[1]]}), PREPROCESSING
    )
    assert found.sample_id == "x" and torch.equal(found.tile_embeddings, in_memory[1].tile_embeddings)


def test_no_output_directory(model: Model) -> None:
    with pytest.raises(ConfigError, match="output_dir"):
        Pipeline(model, PREPROCESSING)
    with pytest.raises(ConfigError, match="output_dir"):
        model.embed_slides(["s.svs"], PREPROCESSING.updated(on_the_fly=False))


def test_slides_or_manifest(model: Model, tmp_path: Path) -> None:
    pipeline = Pipeline(model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path))
    with pytest.raises(ManifestError, match="either"):
        pipeline.run()


# resume ----------------------------------------------------------------------------------------


def test_finished_work_is_kept(run: Run, tmp_path: Path) -> None:
    first = run()
    made = made_at(first)
    again = run(resume=True)
    assert (again.resumed, again.recomputed, again.summary) == (3, {}, None)
    assert made_at(again) == made
    assert again.tile_artifacts == first.tile_artifacts
    assert rows(again) == rows(first)
    anew = run()
    assert anew.resumed == 0
    assert all(made_at(anew)[name] > when for name, when in made.items())


@pytest.mark.parametrize(
    ("change", "execution", "reason"),
    [
        ({"on_the_fly": False}, {}, "tiles_from"),
        ({}, {"output_format": "npz"}, "output_format"),
        ({}, {"output_dtype": "fp16"}, "output_dtype"),
    ],
)
def test_changed_settings_are_recomputed(
    run: Run, change: dict[str, Any], execution: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run()
    again = run(resume=True, execution=execution, **change)
    assert (again.resumed, again.recomputed) == (0, {reason: 3})
    left = {path.suffix for path in (tmp_path / "out/tile_embeddings").iterdir()}
    assert left == {f".{execution.get('output_format', 'pt')}", ".json"}  # no features of the other run


def test_what_does_not_matter_is_not_compared(run: Run) -> None:
    run()
    execution = {"batch_size": 3, "num_workers": 1, "prefetch_factor": 1}
    assert run(resume=True, execution=execution, backend="openslide", use_supertiles=False).resumed == 3


def test_a_changed_slide_is_recomputed_and_a_moved_one_is_not(
    run: Run, slides: list[Path], tmp_path: Path
) -> None:
    moved = [shutil.copy(path, tmp_path / path.name) for path in slides]
    run()
    shutil.copy(slides[2], tmp_path / "s1.svs")
    result = run(moved, resume=True)
    assert (result.resumed, result.recomputed) == (2, {"image": 1})


@pytest.mark.parametrize(
    "harm", ["no sidecar", "half a sidecar", "no features", "half the features", "other"]
)
def test_half_written_files_never_count(run: Run, harm: str) -> None:
    first = run()
    artifact = first.tile_artifacts[1]
    content = artifact.path.read_bytes()
    match harm:
        case "no sidecar":
            artifact.metadata_path.unlink()
        case "half a sidecar":
            artifact.metadata_path.write_bytes(artifact.metadata_path.read_bytes()[:300])
        case "no features":
            artifact.path.unlink()
        case "half the features":
            artifact.path.write_bytes(content[: len(content) // 2])
        case "other":
            artifact.metadata_path.write_text(json.dumps({"sample_id": "s1", "path": "../../etc/passwd"}))
    again = run(resume=True)
    assert again.resumed == 2
    assert artifact.path.read_bytes() == content


def test_another_runs_slides_stay(run: Run, slides: list[Path]) -> None:
    run(slides[:2])
    result = run(slides[1:], resume=True)
    assert result.resumed == 1
    assert list(rows(result)) == ["s1", "s2", "s0"]
    assert rows(result)["s0"]["feature_status"] == "success"


def test_tiling_of_an_earlier_run_is_used(
    model: Model, slides: list[Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.resolve_preprocessing(PREPROCESSING)
    tiled = tile_cohort(slides_of(slides), config, ExecutionOptions(output_dir=tmp_path / "out"))
    assert not tiled.failed and not tiled.tile_artifacts
    monkeypatch.setattr("slide2vec.stream.plan.tile_slide", None)  # would raise
    assert len(run(resume=True).tile_artifacts) == 3
    with pytest.raises(ConfigError, match=r"tissue_threshold 0\.1, not 0\.2"):
        run(resume=True, tissue_threshold=0.2)


def slides_of(paths: list[Path]) -> list[Any]:
    from slide2vec.slides import as_slides

    return as_slides(paths)


# failures --------------------------------------------------------------------------------------


def test_failures_are_recorded_and_the_run_goes_on(run: Run, slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    (tmp_path / "mask.png").write_text("no mask")
    bad, _ = damage(slides[0], tmp_path / "bad.svs")
    given = [
        slides[0],
        tmp_path / "missing.svs",
        tmp_path / "text.svs",
        bad,
        {"sample_id": "masked", "image_path": slides[1], "mask_path": tmp_path / "mask.png"},
        {"sample_id": "coarse", "image_path": slides[1], "spacing_at_level_0": 2.0},
        slides[2],
    ]
    result = run(given)
    assert [a.sample_id for a in result.tile_artifacts] == ["s0", "s2"]
    failed = {item.sample_id: item for item in result.failed}
    assert list(failed) == ["missing", "text", "bad", "masked", "coarse"]
    assert isinstance(failed["missing"].error, SlideOpenError) and failed["missing"].stage == "tiling"
    assert isinstance(failed["bad"].error, SlideReadError)
    table = rows(result)
    for name, item in failed.items():
        assert table[name]["feature_status"] == "error"
        assert table[name]["error"] == str(item.error)
        assert (
            table[name]["traceback"].startswith("Traceback")
            and type(item.error).__name__ in table[name]["traceback"]
        )
        assert item.error.__traceback__ is None  # frames would hold pixels
    assert table["missing"]["tiling_status"] == "failed"
    again = run(given, resume=True)
    assert again.resumed == 2 and list(rows(again)) == list(table)
    assert {name: row["error"] for name, row in rows(again).items()} == {
        name: row["error"] for name, row in table.items()
    }


def test_bad_tiles_are_skipped_on_request(run: Run, slides: list[Path], tmp_path: Path) -> None:
    bad, ((x, y),) = damage(slides[0], tmp_path / "bad.svs")
    (failed,) = run([bad]).failed
    assert failed.stage == "embedding" and 'on_bad_tile="skip"' in str(failed.error)
    result = run([bad], on_bad_tile="skip")
    whole = run([slides[0]]).tile_artifacts[0]
    (artifact,) = result.tile_artifacts
    left_out = result.skipped_tiles["bad"]
    assert left_out > 0 and artifact.num_tiles == whole.num_tiles - left_out
    skipped = artifact.metadata["skipped_tiles"]
    side = artifact.metadata["tile_size_lv0"]
    assert len(skipped) == left_out
    assert all(x - side < s["x"] < x + 256 and y - side < s["y"] < y + 256 for s in skipped)
    row = rows(result)["bad"]
    assert row["feature_status"] == "success" and f"{left_out} tiles could not be decoded" in row["error"]
    mine, theirs = (load_coordinates(tmp_path / "out/tiles", name) for name in ("bad", "s0"))
    kept = [
        i for i in range(len(theirs)) if (theirs.x[i], theirs.y[i]) not in {(s["x"], s["y"]) for s in skipped}
    ]
    assert np.array_equal(mine.x, theirs.x[kept]) and np.array_equal(mine.y, theirs.y[kept])
    assert torch.equal(load_embeddings(artifact.path), load_embeddings(whole.path)[kept])
    assert run([bad], resume=True, on_bad_tile="skip").resumed == 1
    assert run([bad], resume=True).recomputed == {"on_bad_tile": 1}


def test_bad_tiles_are_left_out_of_archives(run: Run, slides: list[Path], tmp_path: Path) -> None:
    bad, _ = damage(slides[0], tmp_path / "bad.svs")
    plain = run([bad], on_bad_tile="skip").tile_artifacts[0]
    result = run([bad], on_bad_tile="skip", on_the_fly=False)
    (artifact,) = result.tile_artifacts
    assert artifact.num_tiles == plain.num_tiles
    assert artifact.metadata["skipped_tiles"] == plain.metadata["skipped_tiles"]
    with pytest.raises(IndexError):
        _ = run([bad], on_the_fly=False).tile_artifacts[0]


def test_a_slide_on_failing_storage_does_not_stop_the_run(
    run: Run, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its archive is written, too: that is no full disk."""
    read = SlideSource.fetch

    def fetch(source: SlideSource, number: int) -> Any:
        if source.tiling.sample_id == "s1":
            raise OSError(errno.EIO, "Input/output error")
        return read(source, number)

    monkeypatch.setattr(SlideSource, "fetch", fetch)
    for on_the_fly in (True, False):
        result = run(on_the_fly=on_the_fly)
        assert [item.sample_id for item in result.failed] == ["s1"]
        assert "Input/output error" in str(result.failed[0].error)
        assert [artifact.sample_id for artifact in result.tile_artifacts] == ["s0", "s2"]


def test_no_tissue_is_recorded(run: Run, tmp_path: Path) -> None:
    import tifffile

    path = tmp_path / "glass.tiff"
    glass = np.full((1024, 1024, 3), 245, np.uint8)
    resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, glass, tile=(256, 256), photometric="rgb", **resolution)
    result = run([path])
    assert result.without_tissue == ("glass",) and not result.failed
    assert load_embeddings(result.tile_artifacts[0].path).shape == (0, 195)
    why = "all its pixels have one colour, RGB (245, 245, 245): there is nothing on the glass"
    for made in (result, run([path], resume=True)):
        assert made.remarks == {"glass": (why,)}
        row = rows(made)["glass"]
        assert (row["num_tiles"], row["coordinates_npz_path"]) == ("0", "")
        assert row["error"] == f"no tissue: 0 tiles: {why}"
    assert made.resumed == 1


def test_two_runs_in_one_folder(run: Run, tmp_path: Path) -> None:
    with output_lock(tmp_path / "out"), pytest.raises(OutputLockedError, match="is writing into"):
        run()
    assert not (tmp_path / "out/config.yaml").exists()
    assert len(run().tile_artifacts) == 3


# tiles and coordinates from elsewhere ----------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_run_with_coordinates(
    model: Model, run: Run, slides: list[Path], in_memory: list[EmbeddedSlide], given: bool, tmp_path: Path
) -> None:
    run()
    shutil.copytree(tmp_path / "out/tiles", tmp_path / "kept")
    (tmp_path / "kept/broken.coordinates.meta.json").write_text("{")
    options = ExecutionOptions(output_dir=tmp_path / "second")
    pipeline = Pipeline(model, PreprocessingConfig(requested_tile_size_px=128), options)
    result = pipeline.run_with_coordinates(tmp_path / "kept", slides=slides[:2] if given else None)
    assert [a.sample_id for a in result.tile_artifacts] == (["s0", "s1"] if given else ["s0", "s1", "s2"])
    for artifact, expected in zip(result.tile_artifacts, in_memory, strict=False):
        assert torch.equal(load_embeddings(artifact.path), expected.tile_embeddings)
        assert artifact.metadata["coordinates_npz_path"] == str(
            tmp_path / f"kept/{expected.sample_id}.coordinates.npz"
        )
    if not given:
        (failed,) = result.failed
        assert failed.sample_id == "broken" and isinstance(failed.error, TilingError)
    coords = BagDataset(tmp_path / "second")[1]["coords"]  # whoever wants them finds them there
    assert np.array_equal(coords, np.stack([in_memory[1].x, in_memory[1].y], axis=1))
    exported, not_exported = export_run(tmp_path / "second", tmp_path / "h5")
    assert len(exported) == len(result.tile_artifacts) and not not_exported
    (audited,) = audit_run(tmp_path / "second")["encoders"]
    assert audited["verdict"] == "agrees" and tmp_path / "kept/s0.coordinates.npz" in map(
        Path, audited["slides"][0]["files"]
    )
    reported = next(
        slide for slide in ReportedRun(tmp_path / "second", tmp_path).slides if slide.name == "s1"
    )
    reported.load()
    (tiling,) = reported.tilings.values()
    assert np.array_equal(tiling.x, in_memory[1].x) and not reported.problems
    with pytest.raises(ManifestError, match="no coordinate files"):
        pipeline.run_with_coordinates(tmp_path / "second/logs")


def test_tile_archives(run: Run, slides: list[Path], in_memory: list[EmbeddedSlide], tmp_path: Path) -> None:
    saved = run(save_tiles=True)
    for artifact, expected in zip(saved.tile_artifacts, in_memory, strict=True):
        assert torch.equal(load_embeddings(artifact.path), expected.tile_embeddings)  # from the slide itself
        assert Path(artifact.metadata["tiles_tar_path"]).is_file()
    shutil.copytree(tmp_path / "out/tiles", tmp_path / "kept")
    first = [load_embeddings(a.path) for a in run(on_the_fly=False).tile_artifacts]
    gone = [{"sample_id": path.stem, "image_path": tmp_path / "gone" / path.name} for path in slides]
    second = [load_embeddings(a.path) for a in run(gone, read_tiles_from=tmp_path / "kept").tile_artifacts]
    for one, other, expected in zip(first, second, in_memory, strict=True):
        assert torch.equal(one, other)
        cosine = torch.cosine_similarity(one, expected.tile_embeddings)
        assert not torch.equal(one, expected.tile_embeddings) and cosine.min() > 0.98  # JPEG once more


def test_archives_of_an_earlier_run_are_used(
    run: Run, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(save_tiles=True)
    monkeypatch.setattr("slide2vec.stream.plan.write_archive", None)  # would raise
    assert len(run(on_the_fly=False, resume=True).tile_artifacts) == 3


# the two halves --------------------------------------------------------------------------------


def test_embed_tiles_and_aggregate(
    model: Model, slides: list[Path], in_memory: list[EmbeddedSlide], tmp_path: Path
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path / "out", output_format="npz")
    tiles = model.embed_tiles(slides, preprocessing=PREPROCESSING, execution=execution)
    tilings = [load_coordinates(tmp_path / "out/tiles", path.stem) for path in slides]
    other = ExecutionOptions(output_dir=tmp_path / "other")
    again = model.embed_tiles(slides, tilings, preprocessing=PREPROCESSING, execution=other)
    for one, two, expected in zip(tiles, again, in_memory, strict=True):
        assert torch.equal(load_embeddings(one.path), expected.tile_embeddings)
        assert torch.equal(load_embeddings(two.path), expected.tile_embeddings)
    with pytest.raises(ModelLevelError, match='aggregator="mean"'):
        model.aggregate_tiles(tiles, execution=execution)
    pooled = model.aggregate_tiles(tiles, execution=execution, aggregator="mean")
    for artifact, expected in zip(pooled, in_memory, strict=True):
        assert artifact.path == tmp_path / f"out/slide_embeddings/{expected.sample_id}.npz"
        assert torch.allclose(load_embeddings(artifact.path), expected.tile_embeddings.mean(0), atol=1e-6)


def test_embed_tiles_says_what_failed(model: Model, slides: list[Path], tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_tiles([slides[0], "gone.svs"], preprocessing=PREPROCESSING, execution=execution)
    assert list(caught.value.failed) == ["gone"]
    assert [r and r.sample_id for r in caught.value.results] == ["s0", None]
    with pytest.raises(ManifestError, match="one per slide"):
        model.embed_tiles(slides, [], preprocessing=PREPROCESSING, execution=execution)


def test_the_reason_is_logged(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run()
    with caplog.at_level(logging.WARNING, "slide2vec"):
        run(resume=True, on_the_fly=False)
    assert "3 slides were finished with another tiles_from" in caplog.text
