"""Embeddings of ready images on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images_helpers import picture
from PIL import Image
from torchvision.transforms import v2

from slide2vec import EmbedImagesError, ExecutionOptions, ImageSpec, Model
from slide2vec.artifacts import load_embeddings
from slide2vec.errors import ConfigError, ManifestError, ModelLevelError
from slide2vec.images import pooled

#: Our normalisation multiplies and adds where torchvision subtracts and divides.
ROUNDING = 1e-5
#: What slide2vec 7.1.4 writes.
KEYS = {
    *("artifact_type", "sample_id", "image_path", "format", "encoder_name", "encoder_level", "compatibility"),
    *("encoder_input_regime", "encoder_input_size_px", "feature_dtype", "feature_dim"),
}


def published(model: Model) -> Any:
    """The transform of slide2vec 7.1.4."""
    statistics = v2.Normalize(model.recipe.transform.mean, model.recipe.transform.std)
    resize = v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose(
        [v2.ToImage(), resize, v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), statistics]
    )


def expected(model: Model, image: Image.Image) -> torch.Tensor:
    with torch.inference_mode():
        features: torch.Tensor = model.encoder(published(model)(image.convert("RGB"))[None])
    return features[0]


def assert_close(found: torch.Tensor, reference: torch.Tensor) -> None:
    assert found.shape == reference.shape
    assert (found - reference).abs().max() <= ROUNDING * reference.abs().max()


@pytest.fixture(scope="module")
def done(model: Model, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with the embeddings of all pictures, for those who only read it."""
    folder = tmp_path_factory.mktemp("done")
    model.embed_images(pictures, execution=ExecutionOptions(output_dir=folder, batch_size=3))
    return folder


def test_features_and_sidecars(model: Model, pictures: list[Path], done: Path) -> None:
    for path in pictures:
        found = load_embeddings(done / "image_embeddings" / f"{path.stem}.pt")
        assert_close(found, expected(model, Image.open(path)))
        sidecar = json.loads((done / "image_embeddings" / f"{path.stem}.meta.json").read_text())
        assert sidecar.keys() == KEYS
        assert sidecar | {"compatibility": None} == {
            "artifact_type": "image_embeddings",
            "sample_id": path.stem,
            "image_path": str(path),
            "format": "pt",
            "encoder_name": "dinov2-vitb14",
            "encoder_level": "tile",
            "encoder_input_regime": "given",
            "encoder_input_size_px": 224,
            "feature_dtype": "fp32",
            "feature_dim": 768,
            "compatibility": None,
        }
    assert len(list((done / "image_embeddings").iterdir())) == 2 * len(pictures)


def test_pixels_in_memory(model: Model, tmp_path: Path) -> None:
    array = picture(250, 300, 9)
    images = [
        ImageSpec(sample_id="array", image=array),
        ImageSpec(sample_id="pil", image=Image.fromarray(array)),
    ]
    made = model.embed_images(images, execution=ExecutionOptions(output_dir=tmp_path, output_format="npz"))
    assert [each.sample_id for each in made] == ["array", "pil"]
    for each in made:
        with np.load(each.path) as stored:
            assert stored.files == ["features"]
            assert_close(torch.from_numpy(stored["features"]), expected(model, Image.fromarray(array)))
        assert each.metadata["image_path"].startswith("memory:")


def test_bad_images_stop_no_others(
    model: Model, pictures: list[Path], done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    images = [pictures[0], bad, *pictures[1:3], tmp_path / "gone.png", pictures[3]]
    execution = ExecutionOptions(output_dir=tmp_path / "out", batch_size=2)
    with pytest.raises(EmbedImagesError) as raised:
        model.embed_images(images, execution=execution)
    assert set(raised.value.failed) == {"bad", "gone"}
    assert [None if each is None else each.sample_id for each in raised.value.results] == [
        "a",
        None,
        "b",
        "c",
        None,
        "d",
    ]
    with caplog.at_level(logging.WARNING):
        made = model.embed_images(images, execution=execution, on_error="skip")
    assert [each.sample_id for each in made] == ["a", "b", "c", "d"]
    assert f"image bad ({bad}): it is no PNG" in caplog.text
    for each in made:
        torch.testing.assert_close(
            load_embeddings(each.path), load_embeddings(done / "image_embeddings" / each.path.name)
        )


def test_features_that_are_no_numbers_are_named(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = model.tile_encoding.encoding(ExecutionOptions(batch_size=2), 224)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        features = torch.ones((len(pixels), 768))
        features[0, 3] = torch.nan
        return features

    monkeypatch.setattr(engine, "run", run)
    images = [ImageSpec(sample_id=name, image=np.zeros((9, 9, 3), np.uint8)) for name in "abc"]
    with pytest.raises(EmbedImagesError) as raised:
        model.embed_images(images, execution=ExecutionOptions(output_dir=tmp_path, batch_size=2))
    assert set(raised.value.failed) == {"a", "c"}
    assert "image a: its features, as float32, hold NaN" in str(raised.value.failed["a"])


# resume ---------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of images that are decoded from now on."""
    found: list[str] = []
    pixels = pooled._pixels

    def seen(geometry: Any, image: ImageSpec) -> Any:
        found.append(image.sample_id)
        return pixels(geometry, image)

    monkeypatch.setattr(pooled, "_pixels", seen)
    return found


@pytest.fixture
def run(model: Model, tmp_path: Path) -> Any:
    """Embeds one or two images into a folder of the test, with options."""

    def embed(*images: ImageSpec, **options: Any) -> Any:
        execution = ExecutionOptions(output_dir=tmp_path, **options)
        return model.embed_images(images, execution=execution)

    return embed


def spec(name: str, seed: int = 0) -> ImageSpec:
    return ImageSpec(sample_id=name, image=picture(30, 30, seed))


def test_what_is_done_stays(run: Any, encoded: list[str]) -> None:
    (first,) = run(spec("a"))
    before = first.path.stat().st_mtime_ns
    again = run(spec("b"), spec("a"))
    assert encoded == ["a", "b"] and again[1] == first and first.path.stat().st_mtime_ns == before


def test_another_image_of_the_name(run: Any, encoded: list[str]) -> None:
    (first,) = run(spec("a"))
    values = load_embeddings(first.path)
    with pytest.raises(ConfigError, match=r"image a: its embedding in .* is of memory:.*on_image_mismatch"):
        run(spec("a", seed=1))
    torch.testing.assert_close(load_embeddings(first.path), values)
    run(spec("a", seed=1), on_image_mismatch="reencode")
    assert encoded == ["a", "a"] and not torch.equal(load_embeddings(first.path), values)


def test_another_identity_is_refused_in_any_format(run: Any) -> None:
    run(spec("a"))
    for options in ({"output_dtype": "fp16"}, {"output_dtype": "fp16", "output_format": "npz"}):
        with pytest.raises(ConfigError, match="feature_dtype was 'fp32', is 'fp16'"):
            run(spec("a"), on_image_mismatch="reencode", **options)


def test_another_transform_is_named_to_the_leaf(
    run: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spec("a"))
    changed = model.recipe.images.model_copy(update={"resize": 248})  # type: ignore[union-attr]
    monkeypatch.setattr(model, "recipe", model.recipe.model_copy(update={"images": changed}))
    with pytest.raises(ConfigError, match=r"transform.resize.size was \[256\], is \[248\]"):
        run(spec("a"))


@pytest.mark.parametrize(
    "missing", ["sidecar", "image_path", "compatibility", "weights", "feature_dim", "format", "payload"]
)
def test_missing_provenance_is_encoded_anew(run: Any, encoded: list[str], missing: str) -> None:
    (first,) = run(spec("a"))
    sidecar = first.metadata
    if missing == "payload":
        first.path.unlink()
    elif missing == "sidecar":
        first.metadata_path.write_text("{")
    else:
        sidecar.pop(missing, None)
        sidecar["compatibility"] = {k: v for k, v in sidecar.get("compatibility", {}).items() if k != missing}
        first.metadata_path.write_text(json.dumps(sidecar))
    run(spec("a"))
    assert encoded == ["a", "a"]
    assert first.metadata.keys() == KEYS and first.path.is_file()


def test_another_format_replaces_the_file(run: Any, encoded: list[str]) -> None:
    (first,) = run(spec("a"))
    (second,) = run(spec("a"), output_format="npz")
    assert encoded == ["a", "a"] and second.metadata["format"] == "npz"
    assert second.path.is_file() and not first.path.exists()


# refusals -------------------------------------------------------------------------------------


def test_a_spacing_means_nothing_here(model: Model, tmp_path: Path) -> None:
    image = ImageSpec(sample_id="a", image_path="a.png", spacing_at_level_0=0.5)
    with pytest.raises(ManifestError, match="image a has spacing_at_level_0"):
        model.embed_images([image], execution=ExecutionOptions(output_dir=tmp_path))


def test_files_need_a_folder(model: Model) -> None:
    with pytest.raises(ConfigError, match="embed_images writes files"):
        model.embed_images([spec("a")])


def test_only_tile_encoders_take_images(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "recipe", model.recipe.model_copy(update={"level": "slide"}))
    with pytest.raises(ModelLevelError, match="embed_images needs a tile-level preset"):
        model.embed_images([spec("a")], execution=ExecutionOptions(output_dir=tmp_path))
