"""200 small slides, a tenth of them broken in every way we know: the others are embedded."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.readers import open_slide
from slide2vec.slides import Slide

Pixels = NDArray[np.uint8]
SIDE = 384


def tiff(path: Path, pixels: Pixels, um: float | None = 0.5) -> Path:
    resolution: dict[str, Any] = (
        {} if um is None else {"resolution": (10_000 / um,) * 2, "resolutionunit": "CENTIMETER"}
    )
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="deflate", **resolution)
    return path


def missing(path: Path, pixels: Pixels) -> dict[str, Any]:
    return {"image_path": path}


def empty(path: Path, pixels: Pixels) -> dict[str, Any]:
    path.write_bytes(b"")
    return {"image_path": path}


def truncated(path: Path, pixels: Pixels) -> dict[str, Any]:
    path.write_bytes(tiff(path, pixels).read_bytes()[:20_000])
    return {"image_path": path}


def text(path: Path, pixels: Pixels) -> dict[str, Any]:
    path.write_text("<html>404</html>")
    return {"image_path": path}


def a_folder(path: Path, pixels: Pixels) -> dict[str, Any]:
    path.mkdir()
    return {"image_path": path}


def no_spacing(path: Path, pixels: Pixels) -> dict[str, Any]:
    return {"image_path": tiff(path, pixels, um=None)}


def too_coarse(path: Path, pixels: Pixels) -> dict[str, Any]:
    return {"image_path": tiff(path, pixels, um=4.0)}


def no_mask(path: Path, pixels: Pixels) -> dict[str, Any]:
    return {"image_path": tiff(path, pixels), "mask_path": path.with_suffix(".png")}


def bad_mask(path: Path, pixels: Pixels) -> dict[str, Any]:
    path.with_suffix(".png").write_bytes(b"\x89PNG no more")
    return no_mask(path, pixels)


def corrupt_tile(path: Path, pixels: Pixels) -> dict[str, Any]:
    tiff(path, pixels)
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        offset, count = page.dataoffsets[4], page.databytecounts[4]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    return {"image_path": path}


#: What is done to a slide -> the stage it fails in.
WAYS: dict[Callable[[Path, Pixels], dict[str, Any]], str] = dict.fromkeys(
    (missing, empty, truncated, text, a_folder, no_spacing, too_coarse, no_mask, bad_mask, corrupt_tile),
    "tiling",
)


@pytest.mark.slow
def test_two_hundred_slides(model: Model, slides: list[Path], tmp_path: Path) -> None:
    with open_slide(Slide(sample_id="tissue", image_path=slides[0])) as reader:
        tissue = reader.read_region((0, 0), 0, reader.dimensions)
    chance, given, broken = np.random.default_rng(0), [], {}
    for number in range(200):
        name = f"slide{number:03d}"
        x, y = chance.integers(0, tissue.shape[0] - SIDE, 2)
        pixels = np.ascontiguousarray(tissue[y : y + SIDE, x : x + SIDE])
        path = tmp_path / f"{name}.tiff"
        if number % 10 == 9:
            way = list(WAYS)[number // 10 % len(WAYS)]
            given.append({"sample_id": name, **way(path, pixels)})
            broken[name] = way.__name__
        else:
            given.append({"sample_id": name, "image_path": tiff(path, pixels)})
    cv2.imwrite(str(tmp_path / "unused.png"), np.zeros((8, 8), np.uint8))
    assert len(broken) == 20 and set(broken.values()) == {way.__name__ for way in WAYS}

    config = PreprocessingConfig(
        requested_spacing_um=0.5, requested_tile_size_px=96, filtering={"a_t": 0}, resume=True
    )
    pipeline = Pipeline(model, config, ExecutionOptions(output_dir=tmp_path / "out"))
    result = pipeline.run(given)
    assert {item.sample_id: broken[item.sample_id] for item in result.failed} == broken
    assert len(result.tile_artifacts) == 180
    with result.process_list_path.open(newline="") as file:
        rows = {row["sample_id"]: row for row in csv.DictReader(file)}
    assert list(rows) == [slide["sample_id"] for slide in given]
    for item in result.failed:
        row = rows[item.sample_id]
        assert row["feature_status"] == "error" and item.sample_id in row["error"] and row["traceback"]
    assert all(rows[a.sample_id]["feature_status"] == "success" for a in result.tile_artifacts)
    in_memory = model.embed_slides([given[0], given[101]], config.updated(resume=False))
    found = {artifact.sample_id: artifact for artifact in result.tile_artifacts}
    assert [found[e.sample_id].num_tiles for e in in_memory] == [e.num_tiles for e in in_memory]
    again = pipeline.run(given)
    assert again.resumed == 180 and len(again.failed) == 20
