"""Patch tokens of every tile of slides."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from openslide import OpenSlide

from slide2vec import EmbedSlidesError, ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cohort.lock import output_lock
from slide2vec.errors import ArtifactError, ConfigError, ManifestError, OutputLockedError, UnsupportedError
from slide2vec.images import slide_tokens
from slide2vec.readers import PyramidReader
from slide2vec.tiling import Tiling, load_coordinates

#: Of float16.
HALF = 1e-3
CONFIG = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=112, tissue_threshold=0.2)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> Path:
    return generated_slide(tmp_path_factory.mktemp("slides") / "a.svs", size_px=1024, seed=3, levels=2)


def loose(model: Model) -> Model:
    """The model, which takes tiles of other sizes."""
    return Model(
        *(model.recipe, model.variant, model.encoder),
        device=model.device,
        precision="fp32",
        weights="random:0",
        origin={"allow_non_recommended_settings": True},
    )


def test_a_run_writes_them_beside_the_embeddings(model: Model, slide: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path, save_patch_tokens=True, batch_size=4)
    result = Pipeline(loose(model), CONFIG, execution).run([slide])
    tiling = load_coordinates(tmp_path / "tiles", "a")
    found = np.load(tmp_path / "patch_tokens/a.npy", mmap_mode="r")
    assert found.shape == (len(tiling), 768, 8, 8) and found.dtype == np.float16 and len(tiling) > 4
    with OpenSlide(slide) as opened:
        place = (int(tiling.x[1]), int(tiling.y[1]))
        pixels = np.asarray(opened.read_region(place, 0, (224, 224)).convert("RGB"))
    tile = torch.from_numpy(cv2.resize(pixels, (112, 112), interpolation=cv2.INTER_AREA))
    made = model.recipe.transform
    mean, std = (torch.tensor(each)[:, None, None] for each in (made.mean, made.std))
    trunk: Any = model.encoder.trunk
    with torch.inference_mode():
        tokens = trunk.forward_features(((tile.permute(2, 0, 1) / 255 - mean) / std)[None])[0]
    expected = tokens[1:].T.reshape(768, 8, 8).numpy()
    assert np.abs(found[1] - expected).max() <= HALF * np.abs(expected).max()
    embedded = torch.load(result.tile_artifacts[0].path, weights_only=True)
    torch.testing.assert_close(embedded[1], tokens[0], atol=1e-4, rtol=0)  # tiles in the same order
    sidecar = json.loads((tmp_path / "patch_tokens/a.meta.json").read_text())
    assert sidecar["num_tiles"] == len(tiling) and sidecar["grid_shape"] == [8, 8]


def test_what_was_made_stays(
    model: Model, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution, ours = ExecutionOptions(output_dir=tmp_path), loose(model)
    artifacts = ours.embed_tiles([slide], preprocessing=CONFIG, execution=execution)
    first = ours.save_patch_tokens(artifacts, execution=execution)
    before = first[0].path.stat().st_mtime_ns
    assert ours.save_patch_tokens(artifacts, execution=execution) == first
    assert first[0].path.stat().st_mtime_ns == before
    Path(first[0].metadata_path).unlink()
    monkeypatch.setattr(slide_tokens, "_tile", lambda *_: 1 / 0)
    with pytest.raises(EmbedSlidesError, match="1 of 1 slides failed"):
        ours.save_patch_tokens(artifacts, execution=execution)
    assert ours.save_patch_tokens(artifacts, execution=execution, on_error="skip") == []
    sidecar = json.loads(artifacts[0].metadata_path.read_text())
    sidecar["compatibility"]["tiles_from"] = "jpeg"
    artifacts[0].metadata_path.write_text(json.dumps(sidecar))
    with pytest.raises(EmbedSlidesError) as raised:
        ours.save_patch_tokens(artifacts, execution=execution)
    assert isinstance(raised.value.failed["a"], ArtifactError) and "came from jpeg" in str(
        raised.value.failed["a"]
    )


def test_a_slide_that_cannot_be_read_is_its_own_failure(
    model: Model, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the operating system on reading is none of the file that is being written."""
    other = tmp_path / "b.svs"
    other.write_bytes(slide.read_bytes())
    execution, ours = ExecutionOptions(output_dir=tmp_path / "out"), loose(model)
    artifacts = ours.embed_tiles([other, slide], preprocessing=CONFIG, execution=execution)
    read = PyramidReader.read_region

    def broken(self: PyramidReader, *where: Any) -> Any:
        if self.name == "b":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, *where)

    monkeypatch.setattr(PyramidReader, "read_region", broken)
    made = ours.save_patch_tokens(artifacts, execution=execution, on_error="skip")
    assert [each.sample_id for each in made] == ["a"]
    with pytest.raises(EmbedSlidesError) as caught:
        ours.save_patch_tokens(artifacts, execution=execution)
    assert "slide b: reading its tiles" in str(caught.value.failed["b"])
    other.unlink()
    with pytest.raises(EmbedSlidesError) as caught:
        ours.save_patch_tokens(artifacts, execution=execution)
    assert list(caught.value.failed) == ["b"]


def test_failures_count_in_a_run(
    model: Model, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "b.svs"
    other.write_bytes(slide.read_bytes())
    tile = slide_tokens._tile

    def broken(reader: Any, tiling: Tiling, place: tuple[int, int]) -> Any:
        return 1 / 0 if tiling.sample_id == "b" else tile(reader, tiling, place)

    monkeypatch.setattr(slide_tokens, "_tile", broken)
    execution = ExecutionOptions(output_dir=tmp_path / "out", save_patch_tokens=True, engine="torch")
    result = Pipeline(loose(model), CONFIG, execution).run([other, slide])
    assert [(each.sample_id, each.stage, each.image_path) for each in result.failed] == [
        ("b", "patch_tokens", other)
    ]
    assert result.summary is not None and (result.summary.slides, result.summary.failed) == (2, 1)
    assert len(result.tile_artifacts) == 2  # embedded it is
    rows = result.to_frame().query("status == 'failed'")
    assert rows[["sample_id", "stage"]].values.tolist() == [["b", "patch_tokens"]]
    monkeypatch.setattr(slide_tokens, "_tile", tile)
    result = Pipeline(loose(model), CONFIG.updated(resume=True), execution).run([other, slide])
    assert (result.resumed, result.failed) == (2, ())
    assert {path.stem for path in (tmp_path / "out/patch_tokens").glob("*.npy")} == {"a", "b"}


def test_one_writes_at_a_time(model: Model, slide: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    artifacts = loose(model).embed_tiles([slide], preprocessing=CONFIG, execution=execution)
    with output_lock(tmp_path), pytest.raises(OutputLockedError, match="is writing into"):
        loose(model).save_patch_tokens(artifacts, execution=execution)
    assert not (tmp_path / "patch_tokens").exists()


def test_what_a_run_cannot_write_is_said_before_it(model: Model, slide: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path / "out", save_patch_tokens=True)
    pipeline = Pipeline(loose(model), CONFIG.updated(region_tile_multiple=2), execution)
    with pytest.raises(ConfigError, match="regions are embedded"):
        pipeline.run([slide])
    with pytest.raises(UnsupportedError, match="no patch"):
        Pipeline(Model.from_preset("scattering", device="cpu"), execution=execution).run([slide])
    assert not (tmp_path / "out").exists()


def test_what_has_none_is_refused(model: Model, slide: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path, save_patch_tokens=True)
    other = Model.from_preset("scattering", device="cpu")
    with pytest.raises(ConfigError, match="run of one tile-level preset"):
        Pipeline([model, other], execution=execution)
    with pytest.raises(ManifestError, match="regions and embeddings"):
        loose(model).embed_tiles(
            [slide], preprocessing=CONFIG.updated(region_tile_multiple=2), execution=execution
        )
