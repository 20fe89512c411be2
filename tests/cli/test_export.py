"""`slide2vec export`, on a run of real tiles and random embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from slide2vec import ExecutionOptions, Model, Pipeline
from slide2vec.artifacts import (
    find_hierarchical_artifact,
    find_patient_artifact,
    find_tile_artifact,
    load_coords,
    load_embeddings,
    write_patient_embedding,
    write_slide_embedding,
    write_tile_embeddings,
)
from slide2vec.artifacts.export import export_run
from slide2vec.cli.export import export as export_command
from slide2vec.config import PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError, ConfigError, OutputError
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, load_coordinates, tile_slide, write_coordinates

Export = Callable[..., Result]

ENCODER = {"name": "slide-enc", "level": "slide", "input_size_px": None}


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    """Runs `export` with arguments, in a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(export_command)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(small_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three slides, as npz: a and b with tissue, blank without."""
    folder = tmp_path_factory.mktemp("run")
    config = PreprocessingConfig(requested_spacing_um=1.0, requested_tile_size_px=64)
    with open_slide(Slide(sample_id="a", image_path=small_slide)) as reader:
        tiling, _ = tile_slide(reader, Slide(sample_id="a", image_path=small_slide), 0.25, config)
    assert len(tiling) > 10
    none = {"x": tiling.x[:0], "y": tiling.y[:0], "tissue_fractions": tiling.tissue_fractions[:0]}
    write_run(folder, replace(tiling, sample_id="b"))
    write_run(folder, tiling)
    write_run(folder, replace(tiling, sample_id="blank", **none))
    return folder


def write_run(folder: Path, tiling: Tiling) -> None:
    """Coordinates and random embeddings of a slide."""
    slide = EmbeddedSlide(
        sample_id=tiling.sample_id,
        tile_embeddings=torch.randn((len(tiling), 9), generator=torch.Generator().manual_seed(len(tiling))),
        slide_embedding=None,
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        num_tiles=len(tiling),
    )
    write_tile_embeddings(
        folder,
        slide,
        tiling,
        file_format="npz",
        encoder={"name": "tile-enc", "level": "tile", "input_size_px": 64},
        compatibility={"seed": [1, {"a": None}]},
        coordinates=write_coordinates(folder / "tiles", tiling),
        skipped_tiles=[{"x": 1, "y": 2, "error": "damaged"}],
    )


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def embeddings(run: Path, name: str) -> np.ndarray:
    with np.load(run / "tile_embeddings" / f"{name}.npz") as arrays:
        return arrays["features"]


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_h5_of_a_run(export: Export, made: Path, tmp_path: Path) -> None:
    result = export(made, "-o", tmp_path / "h5")
    assert result.exit_code == 0, result.output
    for name in ("a", "b", "blank"):
        tiling = load_coordinates(made / "tiles", name)
        with h5py.File(tmp_path / "h5" / "tile_embeddings" / f"{name}.h5") as file:
            assert np.array_equal(
                file["features"][()], np.load(made / f"tile_embeddings/{name}.npz")["features"]
            )
            assert np.array_equal(file["coords"][()], np.stack([tiling.x, tiling.y], axis=1))
            assert file["coords"].attrs["patch_size_level0"] == tiling.geometry.tile_size_lv0
            assert file["features"].attrs["encoder"] == "tile-enc"
    assert len(tiling) == 0
    text = result.stdout
    assert text.index("a ") < text.index("b ") and "tile_embeddings/" in text and "float32" in text
    assert max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))


def test_the_sidecar_is_that_of_the_run(export: Export, made: Path, tmp_path: Path) -> None:
    assert export(made, "-o", tmp_path, "--format", "safetensors").exit_code == 0
    before = json.loads((made / "tile_embeddings" / "a.meta.json").read_text())
    artifact = find_tile_artifact(tmp_path, "a")
    assert artifact is not None and before["compatibility"]
    size = artifact.path.stat().st_size
    assert artifact.metadata == {**before, "format": "safetensors", "file_size_bytes": size}
    assert sorted(load_file(artifact.path)) == ["coords", "features"]


@pytest.mark.parametrize("file_format", ["pt", "npz", "safetensors", "h5"])
def test_there_and_back_gives_the_same_file(
    file_format: str, export: Export, made: Path, tmp_path: Path
) -> None:
    """With the run's coordinates copied along; bytes of features and sidecars."""
    assert export(made, "-o", tmp_path / "there", "--format", file_format).exit_code == 0
    shutil.copytree(made / "tiles", tmp_path / "there" / "tiles")
    assert export(tmp_path / "there", "-o", tmp_path / "back", "--format", "npz").exit_code == 0
    for name in ("a", "blank"):
        features = Path("tile_embeddings") / f"{name}.npz"
        assert (tmp_path / "back" / features).read_bytes() == (made / features).read_bytes()


def test_other_precision(export: Export, made: Path, tmp_path: Path) -> None:
    assert export(made, "-o", tmp_path, "--format", "pt", "--dtype", "fp16").exit_code == 0
    found = torch.load(tmp_path / "tile_embeddings" / "a.pt", weights_only=True)
    assert torch.equal(found, torch.from_numpy(embeddings(made, "a")).half())
    artifact = find_tile_artifact(tmp_path, "a")
    assert artifact is not None and artifact.metadata["feature_dtype"] == "fp16"


def test_values_that_fp16_has_not_are_not_made_infinite(export: Export, run: Path, tmp_path: Path) -> None:
    values = embeddings(run, "a")
    values[0, 0] = 70_000
    path = run / "tile_embeddings" / "a.npz"
    np.savez(path, features=values)
    edit(path.with_suffix(".meta.json"), file_size_bytes=path.stat().st_size)
    result = export(run, "-o", tmp_path / "out", "--dtype", "fp16", "--json")
    assert result.exit_code == 1
    (failed,) = json.loads(result.stdout)["failed"]
    assert failed["sample_id"] == "a" and "7e+04 do not fit into fp16" in failed["error"]
    assert not (tmp_path / "out" / "tile_embeddings" / "a.h5").exists()


def test_slide_embeddings_and_latents(export: Export, run: Path, tmp_path: Path) -> None:
    embedding, latents = torch.arange(6.0), torch.arange(8.0).reshape(2, 4)
    write_slide_embedding(
        run,
        "a",
        embedding,
        encoder=ENCODER,
        metadata={"num_tiles": 9},
        compatibility={"x": 1},
        latents=latents,
    )
    write_slide_embedding(run, "b", embedding, encoder=ENCODER)
    result = export(run, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    exported = json.loads(result.stdout)["exported"]
    assert [(item["kind"], item["sample_id"]) for item in exported] == [
        ("tile", "a"),
        ("tile", "b"),
        ("tile", "blank"),
        ("slide", "a"),
        ("slide", "b"),
    ]
    assert [item["num_tiles"] for item in exported[2:]] == [0, None, None]
    path = tmp_path / "out" / "slide_embeddings" / "a.h5"
    assert str(path) == exported[3]["path"] and torch.equal(load_embeddings(path), embedding)
    assert torch.equal(load_embeddings(tmp_path / "out" / "slide_latents" / "a.h5"), latents)
    assert not (tmp_path / "out" / "slide_latents" / "b.h5").exists()
    found = json.loads(path.with_name("a.meta.json").read_text())
    assert (found["num_tiles"], found["compatibility"], found["format"]) == (9, {"x": 1}, "h5")


def test_a_run_of_the_original_slide2vec(export: Export, run: Path, tmp_path: Path) -> None:
    """Whose sidecars have neither a schema version nor sizes, and other keys besides."""
    path = run / "tile_embeddings" / "a.meta.json"
    edit(path, schema_version="gone", file_size_bytes="gone", skipped_tiles="gone", annotation=None)
    assert export(run, "-o", tmp_path / "out").exit_code == 0
    assert find_tile_artifact(tmp_path / "out", "a") is not None


def drop_sidecar(run: Path) -> None:
    (run / "tile_embeddings" / "b.meta.json").unlink()


def drop_features(run: Path) -> None:
    (run / "tile_embeddings" / "b.npz").unlink()


def cut_features(run: Path) -> None:
    path = run / "tile_embeddings" / "b.npz"
    path.write_bytes(path.read_bytes()[:-1])


def drop_coordinates(run: Path) -> None:
    (run / "tiles" / "b.coordinates.meta.json").unlink()


def swap_coordinates(run: Path) -> None:
    for end in ("npz", "meta.json"):
        (run / "tiles" / f"b.coordinates.{end}").unlink()
    shutil.copy(run / "tiles" / "blank.coordinates.meta.json", run / "tiles" / "b.coordinates.meta.json")


def other_tiles(run: Path) -> None:
    edit(run / "tile_embeddings" / "b.meta.json", requested_spacing_um=0.5)


def future_schema(run: Path) -> None:
    edit(run / "tile_embeddings" / "b.meta.json", schema_version=99)


def unknown_format(run: Path) -> None:
    edit(run / "tile_embeddings" / "b.meta.json", format="csv")


def no_encoder(run: Path) -> None:
    edit(run / "tile_embeddings" / "b.meta.json", encoder_name=["x"])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (drop_sidecar, "the slide was not finished"),
        (drop_features, "has None bytes, its sidecar says"),
        (cut_features, "bytes, its sidecar says"),
        (drop_coordinates, "does not exist"),
        (swap_coordinates, "its coordinates in tiles/ 0"),
        (other_tiles, "requested_spacing_um 0.5, its coordinates in tiles/ 1.0"),
        (future_schema, "schema_version 99"),
        (unknown_format, "format 'csv'"),
        (no_encoder, "does not name encoder_name"),
    ],
)
def test_a_slide_that_cannot_be_exported_is_listed(
    spoil: Callable[[Path], None], error: str, export: Export, run: Path, tmp_path: Path
) -> None:
    spoil(run)
    result = export(run, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [item["sample_id"] for item in found["exported"]] == ["a", "blank"]
    (failed,) = found["failed"]
    assert (failed["sample_id"], failed["kind"]) == ("b", "tile") and error in failed["error"]
    assert sorted(path.name for path in (tmp_path / "out" / "tile_embeddings").iterdir()) == [
        "a.h5",
        "a.meta.json",
        "blank.h5",
        "blank.meta.json",
    ]


def test_failures_are_in_the_report(export: Export, run: Path, tmp_path: Path) -> None:
    drop_sidecar(run)
    result = export(run, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "1 not exported" in result.stdout
    assert "was not finished" in " ".join(result.stdout.split())
    assert "Traceback" not in result.output


def test_what_a_slide_has_with_every_encoder_is_said_once(export: Export, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "tile_embeddings", run / "encoders" / "other" / "tile_embeddings")
    for sidecar in other.glob("*.meta.json"):
        sidecar.write_text(sidecar.read_text().replace('"tile-enc"', '"other"'))
    result = export(run, "-o", tmp_path / "out", "--layout", "clam")
    said = " ".join(result.stdout.split())
    assert said.count("it has no tiles") == 1 and "blank tile-enc, other it has no tiles" in said


def test_regions_and_patients(export: Export, small_slide: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    model = Model.from_preset("scattering", device="cpu")
    config = PreprocessingConfig(requested_tile_size_px=224, region_tile_multiple=2, tissue_threshold=0.5)
    (made,) = (
        Pipeline(model, config, ExecutionOptions(output_dir=run)).run([small_slide]).hierarchical_artifacts
    )
    encoder = {"name": "moozy", "level": "patient"}
    vector = torch.arange(5.0)
    write_patient_embedding(run, "p 1", vector, num_slides=2, encoder=encoder, metadata={"slides": {"a": {}}})
    result = export(run, "-o", out, "--json")
    assert result.exit_code == 0
    assert [item["kind"] for item in json.loads(result.stdout)["exported"]] == ["hierarchical", "patient"]
    regions = find_hierarchical_artifact(out, made.sample_id)
    assert regions is not None and (regions.format, regions.num_regions) == ("h5", made.num_regions)
    assert torch.equal(load_embeddings(regions.path), load_embeddings(made.path))
    assert regions.metadata["compatibility"] == made.metadata["compatibility"]
    coords = load_coords(regions.path)
    assert coords is not None and len(coords) == made.num_regions > 0
    patient = find_patient_artifact(out, "p 1")
    assert patient is not None and patient.num_slides == 2 and patient.metadata["slides"] == {"a": {}}
    assert torch.equal(load_embeddings(patient.path), vector)


def test_into_itself_or_from_nothing(export: Export, run: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (run / "tile_embeddings").iterdir())
    for output in (run, run / ".." / "run"):
        result = export(run, "-o", output)
        assert isinstance(result.exception, ConfigError) and "is the run itself" in str(result.exception)
    assert sorted(path.name for path in (run / "tile_embeddings").iterdir()) == before
    for folder in (tmp_path, tmp_path / "gone"):
        result = export(folder, "-o", tmp_path / "out")
        assert isinstance(result.exception, ArtifactError) and "output directory of a run" in str(
            result.exception
        )
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_ends_the_export(export: Export, made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    result = export(made, "-o", tmp_path / "out")
    assert isinstance(result.exception, OutputError)


def test_python_gives_what_was_exported_and_what_was_not(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    (run / "tiles" / "b.coordinates.meta.json").unlink()
    done, failed = export_run(run, tmp_path / "out", "safetensors", "fp16")
    assert [(item.sample_id, item.kind, item.feature_dtype) for item in done] == [
        ("a", "tile", "float16"),
        ("blank", "tile", "float16"),
    ]
    expected = load_embeddings(run / "tile_embeddings" / "a.npz").half()
    assert torch.equal(load_file(done[0].path)["features"], expected)
    assert [item.sample_id for item in failed] == ["b"] and "b" in str(failed[0].error)
    with pytest.raises(ConfigError, match="is the run itself"):
        export_run(run, run)
