"""Regions and patients on the command line, for real, but for the blocks that encoders have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from shallow import few_blocks
from typer.testing import Result

from slide2vec.artifacts import find_hierarchical_artifact

Run = Callable[..., Result]

#: One tile of 224 px per slide: the tile encoder is slow on a CPU.
ONE_TILE = ("tiling.filter_params.a_t=0", "--spacing", "2", "--allow-non-recommended-settings")


@pytest.fixture(autouse=True)
def shallow() -> Iterator[None]:
    with few_blocks():
        yield


@pytest.fixture
def manifest(small_slide: Path, tmp_path: Path) -> Path:
    path = tmp_path / "slides.csv"
    rows = [f"{name},{small_slide},{patient}" for name, patient in (("a", "p"), ("b", "p"), ("c", "q"))]
    path.write_text("\n".join(["sample_id,image_path,patient_id", *rows]) + "\n")
    return path


def test_patients(run: Run, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights = ("--weights", "lunit=random,moozy-slide=random,moozy=random", "--device", "cpu")
    arguments = ("run", *ONE_TILE, "-m", manifest, "-p", "moozy", "-o", out, *weights)
    result = run(*arguments, "--save-slide-embeddings")
    assert result.exit_code == 0, result.output
    assert "patient_embeddings/, each (768,)" in result.stdout
    for name in ("p", "q"):
        assert torch.load(out / f"patient_embeddings/{name}.pt", weights_only=True).shape == (768,)
    assert len(list((out / "slide_embeddings").glob("*.pt"))) == 3
    again = run("run", out / "config.yaml", "resume=true", "--json")  # which repeats it
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["resumed"] == 3 and [item["patient_id"] for item in found["patients"]] == ["p", "q"]
    state = json.loads(run("status", out, "--json").stdout)
    assert (state["finished"], state["slides"], state["encoders"]) == (3, 3, ["moozy"])


def test_a_failing_patient_is_told(run: Run, manifest: Path, tmp_path: Path) -> None:
    with manifest.open("a") as file:
        file.write(f"d,{tmp_path / 'gone.svs'},q\n")
    where = ("-m", manifest, "-o", tmp_path / "out")
    arguments = ("run", *ONE_TILE, *where, "-p", "moozy", "--weights", "random", "--device", "cpu")
    result = run(*arguments)
    text = " ".join(result.stdout.split())
    assert result.exit_code == 1 and "1 patient failed" in text and "1 slide failed" in text
    skipped = run(*arguments, "--on-bad-slide", "skip")
    assert skipped.exit_code == 1 and "patient failed" not in skipped.stdout
    assert len(list((tmp_path / "out/patient_embeddings").glob("*.pt"))) == 2


@pytest.mark.parametrize("how", ["flags", "file", "embed"])
def test_regions(run: Run, small_slide: Path, manifest: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    tiles = ("--spacing", "2", "--tile-size", "32", "--device", "cpu", "--region-tile-multiple", "3")
    tiles += ("--input-size", "64")  # too small for the encoder as they are
    if how == "flags":
        result = run("run", "-m", manifest, "-p", "scattering", "-o", out, *tiles)
    elif how == "embed":
        result = run("embed", small_slide, "-p", "scattering", "-o", out, *tiles, "--map")
    else:
        params = {"requested_spacing_um": 2.0, "requested_tile_size_px": 32, "requested_region_size_px": 96}
        model = {"name": "scattering", "input_size_px": 64}
        config = {"csv": str(manifest), "output_dir": str(out), "model": model}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**config, "tiling": {"params": params}}))
        result = run("run", path, "--run-on-cpu")
    assert result.exit_code == 0, result.output
    assert "regions, tiles, 195" in " ".join(result.stdout.split())
    artifact = find_hierarchical_artifact(out, "small" if how == "embed" else "a")
    assert artifact is not None and artifact.tiles_per_region == 9 and artifact.num_regions > 0
    assert (out / "preview/map/small.png").is_file() == (how == "embed")


def test_regions_are_tiled(run: Run, small_slide: Path, tmp_path: Path) -> None:
    arguments = ("tile", small_slide, "-o", tmp_path, "--spacing", "2", "--tile-size", "32")
    result = run(*arguments, "--region-tile-multiple", "3")
    assert result.exit_code == 0, result.output
    meta = json.loads((tmp_path / "tiles/small.coordinates.meta.json").read_text())
    assert meta["tiling"]["requested_tile_size_px"] == 96
    wrong = run(*arguments, "--region-tile-multiple", "3", "--overlap", "0.5")
    assert wrong.exit_code == 1 and "side by side" in " ".join(wrong.output.split())
