"""Runs of regions, of several encoders, and of tiles alone are looked at as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.artifacts.reading import load_embeddings
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.pictures import pca_colours
from slide2vec.viewer.tile_colours import as_hex, clusters_of
from slide2vec.viewer.viewed_run import ViewedRun


@pytest.fixture(scope="module")
def slide(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated_slide(tmp_path_factory.mktemp("slides") / "s.svs", size_px=1536, seed=0, levels=2)


def embedded(
    slide: Any,
    folder: Path,
    size: int,
    multiple: int | None = None,
    preset: str = "scattering",
    **options: Any,
) -> None:
    weights = "random" if preset.startswith("timm:") else None
    model = Model.from_preset(preset, weights=weights, device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(
        requested_tile_size_px=size, requested_spacing_um=0.5, region_tile_multiple=multiple, **options
    )
    Pipeline(model, config, ExecutionOptions(output_dir=folder, num_gpus=1)).run([slide])


def test_tiles_of_regions_are_coloured_and_not_searched(slide: Path, tmp_path: Path) -> None:
    embedded(slide, tmp_path, 96, 2)
    run = ViewedRun(tmp_path)
    tiles = run.slide(0, 0)["tiles"]
    (file,) = (tmp_path / "hierarchical_embeddings").glob("*.pt")
    embeddings = load_embeddings(file).flatten(0, 1).numpy()
    assert len(tiles["x"]) == len(embeddings) > 8 and tiles["side"] == 192
    assert run.colours(0, 0, "pca")["colours"] == as_hex(pca_colours(embeddings).round().astype(np.uint8))
    assert run.tile(0, 0, len(embeddings) - 1) and run.outlines(0, 0)["outer"]
    with pytest.raises(ArtifactError, match="of regions"):
        run.similar(0, 3, 0, 1)
    run.close()


def test_each_encoder_has_its_tiles(slide: Path, tmp_path: Path) -> None:
    for size in (96, 128):
        embedded(slide, tmp_path, size)
    first, second = ViewedRun(tmp_path).encoders
    run = ViewedRun(tmp_path, second)
    assert list(run.encoders) == [second, first]
    for number, side in ((0, 256), (1, 192)):
        tiles = run.slide(0, number)["tiles"]
        assert tiles["side"] == side and tiles["embedded"]
        assert len(run.colours(0, number, "cluster")["colours"]) == 6 * len(tiles["x"])
        assert len(run.similar(number, 5, 0, 1)) == 5
    run.close()


def test_an_encoder_whose_coordinates_were_given_has_its_tiles(slide: Path, tmp_path: Path) -> None:
    """Beside those of another, which found its own with the same settings."""
    mask = np.zeros((192, 192), np.uint8)
    mask[20:120, 20:80] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masked = {"image_path": slide, "mask_path": tmp_path / "mask.png"}
    embedded(masked, tmp_path / "kept", 160)
    embedded(slide, tmp_path / "out", 160)
    timm = "timm:test_vit.r160_in1k"
    embedded(masked, tmp_path / "out", 160, preset=timm, read_coordinates_from=tmp_path / "kept")
    kept, run = ViewedRun(tmp_path / "kept"), ViewedRun(tmp_path / "out", timm)
    tiles = run.slide(0, 0)["tiles"]
    assert tiles["x"] == kept.slide(0, 0)["tiles"]["x"] != run.slide(0, 1)["tiles"]["x"]
    last = len(tiles["x"]) - 1
    assert run.tile(0, 0, last) == kept.tile(0, 0, last) != run.tile(0, 1, last)
    for each in (kept, run):
        each.close()


def test_tiles_alone_are_shown_without_colours(slide: Path, tmp_path: Path) -> None:
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(requested_tile_size_px=96, requested_spacing_um=0.5)
    execution = ExecutionOptions(output_dir=tmp_path, num_gpus=1)
    Pipeline(model, config, execution).run([slide], tiling_only=True)
    run = ViewedRun(tmp_path)
    assert list(run.encoders) == []
    found = run.slide(0, 0)
    assert found["pixels"] and found["tiles"]["x"] and not found["tiles"]["embedded"]
    assert run.picture(0, found["last"], 0, 0) and run.outlines(0, 0)["outer"]
    with pytest.raises(ArtifactError, match="no embeddings"):
        run.colours(0, 0, "pca")
    with pytest.raises(ConfigError, match="0 encoders"):
        run.similar(0, 3, 0, 1)
    run.close()


def test_clusters_part_what_is_apart() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 40))
    sizes = (60, 30, 10)
    rows = np.concatenate(
        [centre + 0.05 * random.normal(size=(size, 40)) for centre, size in zip(centres, sizes, strict=True)]
    ).astype(np.float32)
    found = clusters_of(rows, 3)
    assert found.tolist() == [0] * 60 + [1] * 30 + [2] * 10
    assert (clusters_of(rows, 3) == found).all()
    assert clusters_of(rows[:2]).tolist() == [0, 1]
