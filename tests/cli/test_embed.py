"""`slide2vec embed` and `demo`, for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slide2vec import Model, PreprocessingConfig
from slide2vec.recipes import load_recipe
from slide2vec.tiling import load_coordinates

DIM = load_recipe("scattering").variants["default"].dim
FAST = ("--preset", "scattering", "--device", "cpu", "--spacing", "1", "--tile-size", "64")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken") / "broken[i].svs"
    path.write_bytes(b"II*\0 this is no slide")
    return path


def test_embeddings_are_those_of_the_api(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("embed", small_slide, *FAST, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    features = torch.load(tmp_path / "tile_embeddings" / "small.pt", weights_only=True)
    config = PreprocessingConfig(requested_spacing_um=1.0, requested_tile_size_px=64)
    expected = Model.from_preset("scattering", device="cpu").embed_slide(small_slide, config)
    assert expected.num_tiles > 10
    torch.testing.assert_close(features, expected.tile_embeddings)
    tiling = load_coordinates(tmp_path / "tiles", "small")
    assert np.array_equal(tiling.x, expected.x) and np.array_equal(tiling.y, expected.y)


def test_report(run, small_slide: Path, tmp_path: Path) -> None:
    text = run("embed", small_slide, *FAST, "-o", tmp_path).stdout
    assert "small" in text and f"tile_embeddings/small.pt, (tiles, {DIM})" in text
    assert "scattering (default), PyTorch, fp32 on cpu" in text
    assert "tiles/s" in text and "bottleneck: " in text and "busy: plan" in text
    assert max(map(len, text.splitlines())) <= 80 + len(str(tmp_path))


def test_failed_slides_do_not_stop_the_others(run, small_slide: Path, broken: Path, tmp_path: Path) -> None:
    result = run("embed", broken, tmp_path / "gone.svs", small_slide, *FAST, "-o", tmp_path)
    assert result.exit_code == 1
    assert (tmp_path / "tile_embeddings" / "small.pt").is_file()
    assert "2 slides failed" in result.stdout
    assert result.stdout.index("broken[i] ") < result.stdout.index("gone "), "in the order given"
    assert "of 1 slide (2 failed)" in result.stdout
    assert "Traceback" not in result.output


def test_json_is_all_there_is_on_stdout(run, small_slide: Path, broken: Path, tmp_path: Path) -> None:
    result = run(
        "embed",
        broken,
        small_slide,
        *FAST,
        "-o",
        tmp_path,
        "--json",
        "--format",
        "npz",
        "--previews",
        "--map",
    )
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (slide,) = found["slides"]
    assert slide["sample_id"] == "small" and found["encoder"]["name"] == "scattering"
    with np.load(slide["embeddings_path"]) as arrays:
        assert arrays["features"].shape == (slide["num_tiles"], DIM)
    for key in ("mask_preview_path", "tiling_preview_path", "map_path"):
        with Image.open(slide[key]) as picture:
            assert min(picture.size) >= 64
    (failed,) = found["failed"]
    assert failed["sample_id"] == "broken[i]" and failed["error_type"] == "SlideOpenError"
    summary = found["summary"]
    assert summary["tiles"] == slide["num_tiles"] and summary["failed"] == 1
    assert summary["per_slide"]["seconds"] == summary["seconds"]
    assert {"watt_hours", "measured_by", "per_1000_tiles", "tiles_per_second"} <= summary.keys()
    assert summary["bottleneck"] in [station["name"] for station in summary["stations"]]


def test_slide_without_tissue(run, small_slide: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "mask.png")
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path,mask_path\nblank,{small_slide},{tmp_path}/mask.png\n")
    result = run("embed", manifest, *FAST, "-o", tmp_path, "--map")
    assert result.exit_code == 0, result.output
    assert "0 tiles: no tissue" in result.stdout
    assert torch.load(tmp_path / "tile_embeddings" / "blank.pt", weights_only=True).shape == (0, DIM)


def test_wrong_preset_is_found_before_anything_is_made(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("embed", small_slide, "--preset", "scatering", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "scattering" in result.stderr
    assert not (tmp_path / "out").exists()


def test_warnings_go_to_stderr(run, small_slide: Path, tmp_path: Path) -> None:
    options = ("--preset", "prost40m", "--weights", "random", "--spacing", "2", "--device", "cpu")
    refused = run("embed", small_slide, *options, "-o", tmp_path, "--json")
    assert refused.exit_code == 1 and "--allow-non-recommended-settings" in refused.stderr
    options += ("--allow-non-recommended-settings",)
    result = run("embed", small_slide, *options, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert "warning: preset prost40m has random weights" in result.stderr
    assert "warning: preset prost40m is not for 2 µm/px (it was trained at 0.5)" in result.stderr
    assert json.loads(result.stdout)["encoder"]["weights"] == "random:0"


def test_demo_makes_everything_and_uses_its_slide_again(run, tmp_path: Path) -> None:
    first = run("demo", "-o", tmp_path / "demo", "--size", "2048")
    assert first.exit_code == 0, first.output
    slide = tmp_path / "demo" / "synthetic-2048-0.svs"
    painted = slide.stat().st_mtime_ns
    made = {
        "tile_embeddings": "synthetic-2048-0.pt",
        "preview/mask": "synthetic-2048-0.jpg",
        "preview/tiling": "synthetic-2048-0.jpg",
        "preview/map": "synthetic-2048-0.png",
    }
    assert all((tmp_path / "demo" / folder / name).is_file() for folder, name in made.items())
    assert "PCA map" in first.stdout and "bottleneck" in first.stdout
    again = run("demo", "-o", tmp_path / "demo", "--size", "2048")
    assert again.exit_code == 0 and "made before" in again.stderr
    assert "warning" not in again.stderr and ".coordinates.npz" in again.stdout
    assert slide.stat().st_mtime_ns == painted
