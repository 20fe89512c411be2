"""`slide2vec tile`, for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slide2vec import Model, PreprocessingConfig
from slide2vec.cohort.process_list import read_process_list
from slide2vec.settings import load_settings
from slide2vec.tiling import load_coordinates
from slide2vec.tiling.archives import find_archive

TILES = ("--spacing", "2", "--tile-size", "64")


def test_coordinates_are_those_of_an_embedding(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("tile", small_slide, *TILES, "-o", tmp_path, "--tissue-threshold", "0.3", "--overlap", "0.5")
    assert result.exit_code == 0, result.output
    tiling = load_coordinates(tmp_path / "tiles", "small")
    config = PreprocessingConfig(
        requested_spacing_um=2.0, requested_tile_size_px=64, tissue_threshold=0.3, overlap=0.5
    )
    expected = Model.from_preset("scattering", device="cpu").embed_slide(small_slide, config)
    assert np.array_equal(tiling.x, expected.x) and np.array_equal(tiling.y, expected.y)
    assert len(tiling) > 5 and f"{len(tiling):,} tiles" in result.stdout
    (row,) = read_process_list(tmp_path / "process_list.csv")
    assert (row["tiling_status"], row["num_tiles"], row["feature_status"]) == (
        "success",
        str(len(tiling)),
        "",
    )
    assert not (tmp_path / "tile_embeddings").exists() and not (tmp_path / "preview").exists()


def test_a_preset_gives_spacing_and_size_without_its_weights(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("tile", small_slide, "--preset", "virchow2", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    geometry = load_coordinates(tmp_path / "tiles", "small").geometry
    assert (geometry.requested_spacing_um, geometry.requested_tile_size_px) == (0.5, 224)
    settings = load_settings(tmp_path / "config.yaml")
    assert (settings.preset, settings.preprocessing.requested_tile_size_px) == ("virchow2", 224)
    finer = run("tile", small_slide, "--preset", "virchow2", "--spacing", "1", "-o", tmp_path / "other")
    assert finer.exit_code == 0
    assert load_coordinates(tmp_path / "other" / "tiles", "small").geometry.requested_spacing_um == 1.0


def test_previews_archives_and_methods(run, small_slide: Path, tmp_path: Path) -> None:
    options = (
        "--previews",
        "--save-tiles",
        "--segmentation-method",
        "otsu",
        "--num-preprocessing-workers",
        "1",
    )
    result = run("tile", small_slide, *TILES, *options, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert all((tmp_path / "preview" / kind / "small.jpg").is_file() for kind in ("mask", "tiling"))
    assert find_archive(tmp_path / "tiles", "small") is not None
    assert load_coordinates(tmp_path / "tiles", "small").segmentation.method == "otsu"


def test_failed_slides_do_not_stop_the_others(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("tile", tmp_path / "gone.svs", small_slide, *TILES, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    tiles = len(load_coordinates(tmp_path / "out" / "tiles", "small"))
    assert (content["slides"], content["tiles"]) == (1, tiles)
    assert [(item["sample_id"], item["stage"]) for item in content["failed"]] == [("gone", "tiling")]
    text = run("tile", tmp_path / "gone.svs", *TILES, "-o", tmp_path / "other")
    assert text.exit_code == 1 and "1 slide failed" in text.stdout and "gone" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--preset", "--spacing", "--tile-size"]),
        (["--spacing", "1"], ["--tile-size"]),
        (["--preset", "unii"], ["uni"]),
        (["--preset", "uni", "--spacing", "-1"], ["--spacing: input"]),
    ],
)
def test_mistakes_are_one_line(
    run, small_slide: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = run("tile", small_slide, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 1 and [word for word in words if word not in result.stderr] == []
    assert not (tmp_path / "out").exists()


def test_two_slides_of_one_name_are_refused(run, small_slide: Path, tmp_path: Path) -> None:
    result = run("tile", small_slide, tmp_path / "small.tif", *TILES, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "appears twice" in result.stderr
    assert not (tmp_path / "out").exists()


def test_classes_of_masks_and_their_areas(run, small_slide: Path, tmp_path: Path) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[10:90, 10:90] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path,mask_path\na,{small_slide},{tmp_path / 'mask.png'}\n")
    masks = "{pixel_mapping: {none: 0, tumor: 1}, min_coverage: {tumor: 0.5}}"
    options = (*TILES, "-o", tmp_path / "out", "--min-piece", "0")
    result = run("tile", manifest, *options, "--masks", masks)
    assert result.exit_code == 0, result.output
    tiling = load_coordinates(tmp_path / "out" / "tiles", "tumor/a")
    assert tiling.annotation == "tumor" and len(tiling) > 5
    (row,) = read_process_list(tmp_path / "out" / "process_list.csv")
    assert (row["sample_id"], row["annotation"]) == ("a", "tumor")
    shown = run("export", tmp_path / "out", "-o", tmp_path / "areas", "--format", "geojson", "--json")
    assert shown.exit_code == 0, shown.output
    counts = {item["what"]: item["count"] for item in json.loads(shown.stdout)["exported"]}
    assert counts == {"tissue": 1, "tiles": len(tiling)}
    area = json.loads((tmp_path / "areas" / "tissue" / "tumor" / "a.geojson").read_text())["features"][0]
    corners = np.array(area["geometry"]["coordinates"][0])
    scale = 2048 / 128
    assert (corners.min(), corners.max()) == (10 * scale, 90 * scale)
    (tmp_path / "masks.yaml").write_text("pixel_mapping: {tumor: 1}\nmin_coverage: {tumor: 0.5}\n")
    wrong = run("tile", manifest, *options[:-4], "-o", tmp_path / "b", "--masks", tmp_path / "masks.yaml")
    assert wrong.exit_code == 1 and "holds the values [0], which no label" in " ".join(wrong.output.split())
