"""What every command says of slides whose tissue is implausible, and the options that help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from slide2vec.cohort.process_list import read_process_list
from slide2vec.tiling import load_coordinates

PRESET = ("--preset", "scattering", "--device", "cpu")
TILES = ("--spacing", "2", "--tile-size", "64")
BROWN = "which method hsv does not take for tissue: try method auto"


@pytest.fixture(scope="module")
def brown_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,536 px a side at 1 µm/px: glass with a brown square of 768 px."""
    image = np.full((1536, 1536, 3), 242, np.uint8)
    image[384:1152, 384:1152] = (150, 100, 60)
    path = tmp_path_factory.mktemp("slides") / "dab.tif"
    resolution = {"resolution": (10_000, 10_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", compression="deflate", **resolution)
    return path


def flat(text: str) -> str:
    return " ".join(text.split())


def test_info(run, brown_slide: Path) -> None:
    result = run("info", brown_slide, *TILES)
    assert result.exit_code == 0 and BROWN in flat(result.stdout) and BROWN not in flat(result.stderr)
    found = json.loads(run("info", brown_slide, *TILES, "--json").stdout)["tissue"]
    assert found["tiles"] == 0 and BROWN in found["remarks"][0]
    otsu = json.loads(run("info", brown_slide, *TILES, "--segmentation-method", "otsu", "--json").stdout)
    assert otsu["tissue"]["tiles"] > 30 and otsu["tissue"]["remarks"] == []


@pytest.mark.parametrize("command", ["tile", "embed", "run"])
def test_commands_that_write(run, brown_slide: Path, tmp_path: Path, command: str) -> None:
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path\ndab,{brown_slide}\n")
    arguments = {"tile": [brown_slide, *TILES], "embed": [brown_slide, *TILES, *PRESET]}
    arguments["run"] = ["-m", manifest, *TILES, *PRESET]
    result = run(command, *arguments[command], "-o", tmp_path / "hsv")
    assert result.exit_code == 0, result.output
    assert BROWN in flat(result.stdout)
    (row,) = read_process_list(tmp_path / "hsv" / "process_list.csv")
    assert row["error"].startswith("no tissue: 0 tiles: 100% of") and BROWN in row["error"]
    assert BROWN in flat(run("status", tmp_path / "hsv").stdout)
    content = json.loads(run(command, *arguments[command], "-o", tmp_path / "json", "--json").stdout)
    assert BROWN in content["remarks"]["dab"][0]

    options = ("--segmentation-method", "otsu", "--segmentation-downsample", "2", "--min-piece", "1")
    assert run(command, *arguments[command], *options, "-o", tmp_path / "otsu").exit_code == 0
    (row,) = read_process_list(tmp_path / "otsu" / "process_list.csv")
    assert int(row["num_tiles"]) > 30 and row["error"] == ""
    tiling = load_coordinates(tmp_path / "otsu" / "tiles", "dab")
    assert (tiling.segmentation.method, tiling.segmentation.requested_downsample) == ("otsu", 2)
    assert tiling.filtering.a_t == 1


def test_the_saturation_of_method_threshold(run, brown_slide: Path, tmp_path: Path) -> None:
    options = ("--segmentation-method", "threshold", "--sthresh", "200")
    assert run("tile", brown_slide, *TILES, *options, "-o", tmp_path).exit_code == 0
    tiling = load_coordinates(tmp_path / "tiles", "dab")
    assert (tiling.segmentation.method, tiling.segmentation.sthresh, len(tiling)) == ("threshold", 200, 0)


def test_a_manifest_segments_its_slides_differently(run, brown_slide: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "slides.csv", tmp_path / "out"
    manifest.write_text(
        "sample_id,image_path,segmentation_method,tissue_threshold\n"
        f"plain,{brown_slide},,\nown,{brown_slide},otsu,0.9\n"
    )
    assert run("run", "-m", manifest, *TILES, *PRESET, "-o", out).exit_code == 0
    rows = {row["sample_id"]: row for row in read_process_list(out / "process_list.csv")}
    assert rows["plain"]["num_tiles"] == "0" and int(rows["own"]["num_tiles"]) > 30
    tiling = load_coordinates(out / "tiles", "own")
    assert (tiling.segmentation.method, tiling.tissue_threshold) == ("otsu", 0.9)

    again = json.loads(run("run", "-m", manifest, *TILES, *PRESET, "-o", out, "--json").stdout)
    assert again["resumed"] == 2
    manifest.write_text(manifest.read_text().replace("otsu,0.9", "otsu,0.5"))
    other = run("run", "-m", manifest, *TILES, *PRESET, "-o", out)
    assert other.exit_code == 1 and "tissue_threshold" in flat(other.stderr)
    assert run("run", "-m", manifest, *TILES, *PRESET, "-o", out, "--no-resume").exit_code == 0
    assert load_coordinates(out / "tiles", "own").tissue_threshold == 0.5


def test_what_was_said_of_tiles_is_said_again_when_they_are_taken_over(
    run, brown_slide: Path, tmp_path: Path
) -> None:
    assert run("tile", brown_slide, *TILES, "-o", tmp_path).exit_code == 0
    result = run("embed", brown_slide, *TILES, *PRESET, "-o", tmp_path)
    assert result.exit_code == 0 and BROWN in flat(result.stdout)
    (row,) = read_process_list(tmp_path / "process_list.csv")
    assert row["feature_status"] == "success" and BROWN in row["error"]
