"""Embeddings as AnnData and SpatialData, of a slide and of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.errors import ArtifactError, ConfigError, ExtraMissingError
from slide2vec.frames import SlideFrame, anndata_of, element_name, spatialdata_of


def embedded(count: int = 5, **more: object) -> EmbeddedSlide:
    fields = {
        "sample_id": "a",
        "tile_embeddings": torch.arange(3.0 * count).reshape(count, 3).half(),
        "slide_embedding": torch.arange(4.0),
        "x": np.arange(count, dtype=np.int64) * 100,
        "y": np.arange(count, dtype=np.int64) * 10,
        "tile_size_lv0": 100,
        "image_path": Path("/slides/a.svs"),
        "mask_path": None,
        "num_tiles": count,
    }
    return EmbeddedSlide(**{**fields, **more})


def test_anndata_of_a_slide(tmp_path: Path) -> None:
    slide = embedded()
    slide.to_anndata().write_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.X.dtype == np.float32 and np.array_equal(found.X, slide.tile_embeddings.float())
    assert np.array_equal(found.obs[["x", "y"]], np.stack([slide.x, slide.y], axis=1))
    assert np.array_equal(found.obsm["spatial"], np.stack([slide.x + 50, slide.y + 50], axis=1))
    assert set(found.obs["sample_id"]) == {"a"} and list(found.obs_names)[:2] == ["a-0", "a-1"]
    assert found.uns["slides"].loc["a", "tile_size_lv0"] == 100
    assert np.array_equal(found.uns["slide_embedding"], np.arange(4.0))


def test_regions_are_their_tiles() -> None:
    x = np.array([[0, 10, 0, 10], [20, 30, 20, 30]])
    slide = embedded(
        tile_embeddings=torch.arange(24.0).reshape(2, 4, 3), tile_x=x, tile_y=x + 1, x=x[:, 0], y=x[:, 0]
    )
    found = slide.to_anndata()
    assert found.shape == (8, 3) and found.obs["region"].tolist() == [0] * 4 + [1] * 4
    assert found.obs["x"].tolist() == x.ravel().tolist() and found.X[5].tolist() == [15.0, 16.0, 17.0]


def test_a_slide_without_tiles() -> None:
    assert embedded(0).to_anndata().shape == (0, 3)


def test_classes_and_tissue_in_one_table(tmp_path: Path) -> None:
    one = {"features": np.ones((1, 2)), "x": np.zeros(1, int), "y": np.zeros(1, int), "tile_size_lv0": 1}
    frames = [
        SlideFrame(sample_id="a", **one, about={"annotation": None}),
        SlideFrame(sample_id="tumor/a", **one, about={"annotation": "tumor"}),
    ]
    anndata_of(frames).write_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.uns["slides"]["annotation"].tolist() == ["", "tumor"]
    assert found.obs["sample_id"].tolist() == ["a", "tumor/a"]


@pytest.fixture(scope="module")
def result(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("frames")
    slides = [generated_slide(folder / f"{seed}.svs", size_px=1500, seed=seed, levels=2) for seed in (3, 4)]
    model = Model.from_preset("scattering", device="cpu")
    config = PreprocessingConfig(requested_spacing_um=1.0, requested_tile_size_px=64)
    return Pipeline(model, config, ExecutionOptions(output_dir=folder / "run")).run(slides)


def test_anndata_of_a_run(result: RunResult, tmp_path: Path) -> None:
    whole = result.to_anndata()
    assert len(whole) == sum(artifact.num_tiles for artifact in result.tile_artifacts)
    for artifact in result.tile_artifacts:
        own = whole[whole.obs["sample_id"] == artifact.name]
        assert np.array_equal(own.X, torch.load(artifact.path, weights_only=True).numpy())
    assert list(whole.uns["slides"].index) == ["3", "4"]
    assert (whole.obs["tissue_fraction"] > 0).all()
    whole.write_h5ad(tmp_path / "run.h5ad")
    assert len(result.to_anndata(["4"])) == result.tile_artifacts[1].num_tiles


def test_what_a_run_has_not(result: RunResult) -> None:
    with pytest.raises(ArtifactError, match="no tile embeddings of x, y"):
        result.to_anndata(["x", "3", "y"])
    with pytest.raises(ConfigError, match=r"embeddings of a, b: take one, result.encoders"):
        replace(result, encoders={"a": result, "b": result}).to_anndata()
    with pytest.raises(ArtifactError, match="save_tile_embeddings"):
        replace(result, tile_artifacts=[]).to_spatialdata()


@pytest.mark.parametrize(("method", "extra"), [("to_anndata", "anndata"), ("to_spatialdata", "spatialdata")])
def test_a_missing_package_is_named_with_the_command(
    method: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ExtraMissingError, match=rf"install .*\[{extra}\]"):
        getattr(embedded(), method)()


def test_names_of_elements() -> None:
    assert [element_name(text) for text in ("a", "tumor/a b", "__x", "/")] == ["a", "tumor_a_b", "x", "_"]


def test_spatialdata(result: RunResult, tmp_path: Path) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    embedded().to_spatialdata().write(tmp_path / "a.zarr")
    found = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert found["tiles"].geometry.bounds.iloc[1].tolist() == [100, 10, 200, 110]
    assert found.tables["embeddings"].shape == (5, 3)
    assert not list(embedded(0).to_spatialdata().shapes)
    whole = result.to_spatialdata()
    assert set(whole.shapes) == {"3_tiles", "4_tiles"} and set(whole.coordinate_systems) == {"3", "4"}
    joined = spatialdata.match_table_to_element(whole, "4_tiles", "embeddings")
    assert np.array_equal(joined.X, result.to_anndata(["4"]).X)
    assert joined.obs["x"].tolist() == whole["4_tiles"]["x"].tolist()
    whole.write(tmp_path / "run.zarr")


def test_two_slides_of_one_name() -> None:
    pytest.importorskip("spatialdata")
    one = {"features": np.zeros((1, 2)), "x": np.zeros(1, int), "y": np.zeros(1, int), "tile_size_lv0": 1}
    with pytest.raises(ArtifactError, match="would both be"):
        spatialdata_of([SlideFrame(sample_id="a b", **one), SlideFrame(sample_id="a_b", **one)])
