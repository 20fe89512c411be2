"""Grids of patch tokens on disk, of regions of slides and of ready images."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from images_helpers import picture
from openslide import OpenSlide
from PIL import Image

from slide2vec import (
    MISSING_FIELD,
    DenseImageOptions,
    DenseOptions,
    EmbedImagesError,
    ExecutionOptions,
    ImageSpec,
    Model,
    PreprocessingConfig,
    SlideRegions,
)
from slide2vec.errors import ConfigError, ManifestError, UnsupportedError
from slide2vec.images import dense_run

#: Our normalisation is theirs; sizes of batches differ.
ROUNDING = 1e-5
PLAN_KEYS = {
    *("reader_regime", "spacing_source", "declared_spacing_um", "source_spacing_um", "spacing_at_level_0"),
    *("read_spacing_um", "effective_spacing_um", "requested_backend", "backend", "tolerance", "read_level"),
    *("is_within_tolerance", "read_size", "output_size", "read_tile_size_px", "requested_tile_size_px"),
}
OPTION_KEYS = {
    *("pad_mode", "image_pad_value", "window_size", "overlap", "feature_kind", "attention_blocks"),
    *("attention_include_registers", "compatibility"),
}
COMMON_KEYS = {
    *("artifact_type", "sample_id", "format", "dtype", "feature_dim", "grid_shape", "target_size"),
    *("patch_size", "encoded_size", "pad"),
}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> Path:
    """Two levels, 0.25 and 1 µm/px."""
    return generated_slide(tmp_path_factory.mktemp("slides") / "a.svs", size_px=1024, seed=3, levels=2)


def regions(path: Path, *coordinates: tuple[int, int], **more: Any) -> SlideRegions:
    return SlideRegions(sample_id=path.stem, image_path=path, coordinates=coordinates, **more)


def expected(model: Model, pixels: Any) -> torch.Tensor:
    """Tokens of timm of normalised pixels (H, W, 3) uint8, whose sides are multiples of the patch."""
    made = model.recipe.transform
    values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (made.mean, made.std))
    trunk: Any = model.encoder.trunk
    with torch.inference_mode():
        found = trunk.forward_intermediates(
            (values - mean) / std, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
    return torch.as_tensor(found[-1][0])


def assert_close(found: torch.Tensor, reference: torch.Tensor) -> None:
    assert found.shape == reference.shape and found.dtype == torch.float32
    assert (found - reference).abs().max() <= ROUNDING * reference.abs().max()


def grid(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)


def test_a_grid_of_each_region(model: Model, slide: Path, tmp_path: Path) -> None:
    """At 0.5 µm/px, which the slide does not have: read at 0.25, averaged."""
    execution = ExecutionOptions(output_dir=tmp_path, batch_size=2)
    asked = [regions(slide, (100, 200), (0, 0), (100, 200)), regions(slide, (100, 200), annotation="tumor")]
    dense = DenseOptions(spacing_um=0.5, target_size=112, backend="openslide")
    made = model.embed_regions_dense(asked, dense=dense, execution=execution)
    folder = tmp_path / "dense_embeddings"
    places = [
        folder / "a/100_200.pt",
        folder / "a/0_0.pt",
        folder / "a/100_200.pt",
        folder / "tumor/a/100_200.pt",
    ]
    assert [each.path for each in made] == places and made[0] == made[2]
    assert len(list(folder.rglob("*.pt"))) == 3
    with OpenSlide(slide) as opened:
        pixels = np.asarray(opened.read_region((100, 200), 0, (224, 224)).convert("RGB"))
    reference = expected(model, cv2.resize(pixels, (112, 112), interpolation=cv2.INTER_AREA))
    for each in (made[0], made[3]):
        assert_close(grid(each.path), reference)
    sidecar = made[0].metadata
    assert sidecar.keys() == {"annotation", "x", "y"} | COMMON_KEYS | PLAN_KEYS | OPTION_KEYS
    told = {
        **{"artifact_type": "dense_embeddings", "sample_id": "a", "annotation": None, "x": 100, "y": 200},
        **{"dtype": "float32", "feature_dim": 768, "grid_shape": [8, 8], "target_size": [112, 112]},
        **{"patch_size": [14, 14], "encoded_size": [112, 112], "pad": [0, 0], "spacing_source": "explicit"},
        **{"declared_spacing_um": 0.5, "source_spacing_um": 0.25, "read_spacing_um": 0.25, "read_level": 0},
        **{"effective_spacing_um": 0.5, "is_within_tolerance": False, "backend": "openslide"},
        **{"read_size": [224, 224], "output_size": [112, 112], "read_tile_size_px": 224},
        **{"requested_tile_size_px": 112, "window_size": None, "feature_kind": "patch_features"},
    }
    assert {name: sidecar[name] for name in told} == told
    assert made[3].metadata["annotation"] == "tumor" and made[3].annotation == "tumor"


def test_padding_and_windows(model: Model, slide: Path, tmp_path: Path) -> None:
    """120 px are padded to 126; windows of 56 px (4 patches), a step of 28, the last flush with the edge."""
    dense = DenseOptions(
        spacing_um=0.25,
        target_size=120,
        backend="openslide",
        window_size=50,
        overlap=0.5,
        pad_mode="replicate",
    )
    (made,) = model.embed_regions_dense(
        [regions(slide, (300, 310))], dense=dense, execution=ExecutionOptions(output_dir=tmp_path)
    )
    assert made.grid_shape == (9, 9) and made.metadata["pad"] == [6, 6]
    with OpenSlide(slide) as opened:
        pixels = np.asarray(opened.read_region((300, 310), 0, (120, 120)).convert("RGB"))
    whole = np.pad(pixels, ((0, 6), (0, 6), (0, 0)), mode="edge")
    weights = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1, 5) / 5)
    total, weighed = np.zeros((768, 9, 9)), np.zeros((9, 9))
    for row in (0, 2, 4, 5):
        for column in (0, 2, 4, 5):
            window = whole[14 * row : 14 * row + 56, 14 * column : 14 * column + 56]
            place = np.s_[row : row + 4, column : column + 4]
            total[(slice(None), *place)] += expected(model, window).numpy() * np.outer(weights, weights)
            weighed[place] += np.outer(weights, weights)
    assert_close(grid(made.path), torch.from_numpy(total / weighed).float())


def test_other_features(model: Model, slide: Path, tmp_path: Path) -> None:
    dense = {"spacing_um": 1.0, "target_size": 56}
    found = {}
    for kind in ("patch_features_prenorm", "cls_attention"):
        options = DenseOptions(**dense, feature_kind=kind)
        execution = ExecutionOptions(output_dir=tmp_path / kind, output_dtype="fp16")
        (made,) = model.embed_regions_dense([regions(slide, (0, 0))], dense=options, execution=execution)
        found[kind] = grid(made.path)
        assert made.metadata["dtype"] == "float16" and found[kind].dtype == torch.float16
    assert found["patch_features_prenorm"].shape == (768, 4, 4)
    attention = found["cls_attention"]
    assert attention.shape == (12, 4, 4) and (attention >= 0).all() and (attention.sum((1, 2)) < 1).all()


def test_what_was_made_stays_until_something_differs(
    model: Model, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        dense_run, "_read", lambda job, read=dense_run._read: (calls.append(job.name), read(job))[1]
    )

    def run(**options: Any) -> Any:
        dense = DenseOptions(**{"spacing_um": 1.0, "target_size": 28, **options})
        execution = ExecutionOptions(output_dir=tmp_path)
        return model.embed_regions_dense([regions(slide, (0, 0), (40, 40))], dense=dense, execution=execution)

    first = run()
    assert run() == first and len(calls) == 2
    sidecar = first[0].metadata_path
    content = json.loads(sidecar.read_text())
    del content["compatibility"]["weights"]
    sidecar.write_text(json.dumps(content))
    first[1].path.unlink()
    assert run() == first and len(calls) == 4
    run(pad_mode="zero")
    assert len(calls) == 6 and sidecar.is_file()


def test_bad_slides_and_regions_stop_no_others(model: Model, slide: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(slide.read_bytes()[:1000])
    asked = [regions(bad, (0, 0), (5, 5)), regions(slide, (0, 0))]
    dense, execution = (
        DenseOptions(spacing_um=1.0, target_size=28),
        ExecutionOptions(output_dir=tmp_path / "out"),
    )
    with pytest.raises(EmbedImagesError) as raised:
        model.embed_regions_dense(asked, dense=dense, execution=execution)
    assert set(raised.value.failed) == {"bad 0,0", "bad 5,5"} and str(bad) in str(
        raised.value.failed["bad 0,0"]
    )
    assert raised.value.results[:2] == [None, None] and raised.value.results[2].path.is_file()
    assert len(model.embed_regions_dense(asked, dense=dense, execution=execution, on_error="skip")) == 1


# images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oblong") / "o.png"
    Image.fromarray(picture(112, 168, 5)).save(path)
    return path


def test_a_grid_of_each_image(model: Model, oblong: Path, slide: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    pixels = picture(56, 84, 6)
    images = [
        ImageSpec(sample_id="half", image_path=oblong, spacing_at_level_0=0.25),
        ImageSpec(sample_id="memory", image=pixels, spacing_at_level_0=0.5),
    ]
    made = model.embed_images_dense(
        images, dense=DenseImageOptions(target_size=(56, 84)), execution=execution
    )
    reduced = cv2.resize(picture(112, 168, 5), (84, 56), interpolation=cv2.INTER_AREA)
    for each, reference in zip(made, (reduced, pixels), strict=True):
        assert each.path == tmp_path / f"dense_image_embeddings/{each.sample_id}.pt" and each.grid_shape == (
            4,
            6,
        )
        assert_close(grid(each.path), expected(model, reference))
    sidecar = made[0].metadata
    more = {"image_path", "encoder_name", "encoder_level", "encoder_input_regime"}
    assert sidecar.keys() == more | COMMON_KEYS | PLAN_KEYS | OPTION_KEYS
    told = {
        **{"artifact_type": "dense_image_embeddings", "image_path": str(oblong), "backend": "pil"},
        **{"spacing_source": "model_default", "declared_spacing_um": 0.5, "source_spacing_um": 0.25},
        **{"spacing_at_level_0": 0.25, "effective_spacing_um": 0.5, "read_size": [112, 168]},
        **{"output_size": [56, 84], "target_size": [56, 84], "read_tile_size_px": None},
        **{"encoder_input_regime": "declared", "encoder_level": "tile"},
    }
    assert {name: sidecar[name] for name in told} == told
    before = made[0].path.stat().st_mtime_ns
    model.embed_images_dense(images, dense=DenseImageOptions(target_size=(56, 84)), execution=execution)
    assert made[0].path.stat().st_mtime_ns == before


def test_a_whole_level_of_a_slide(model: Model, slide: Path, tmp_path: Path) -> None:
    dense = DenseImageOptions(target_size=256, spacing_um=1.0, backend="openslide", pad_mode="zero")
    with OpenSlide(slide) as opened:
        assert opened.level_dimensions[1] == (256, 256)
        pixels = np.asarray(opened.read_region((0, 0), 1, (256, 256)).convert("RGB"))
    made = model.embed_images_dense([slide], dense=dense, execution=ExecutionOptions(output_dir=tmp_path))
    sidecar = made[0].metadata
    assert sidecar["read_level"] == 1 and sidecar["is_within_tolerance"] and sidecar["backend"] == "openslide"
    kit = model.prepare_dense_encoder(dense=dense)
    prepared = kit.preprocessor()(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert_close(grid(made[0].path), kit.encode(prepared[None])[0])


def test_images_that_do_not_fit_are_named(model: Model, oblong: Path, tmp_path: Path) -> None:
    images = [
        ImageSpec(sample_id="fits", image_path=oblong, spacing_at_level_0=0.5),
        ImageSpec(sample_id="fine", image_path=oblong, spacing_at_level_0=0.3),
        ImageSpec(sample_id="coarse", image_path=oblong, spacing_at_level_0=1.0),
        ImageSpec(sample_id="unknown", image_path=oblong),
        ImageSpec(sample_id="gone", image_path=tmp_path / "gone.png", spacing_at_level_0=0.5),
    ]
    dense = DenseImageOptions(target_size=(112, 168), spacing_um=0.5)
    with pytest.raises(EmbedImagesError) as raised:
        model.embed_images_dense(images, dense=dense, execution=ExecutionOptions(output_dir=tmp_path / "out"))
    failed = {name: str(error) for name, error in raised.value.failed.items()}
    assert failed.keys() == {"fine", "coarse", "unknown", "gone"}
    assert "it has (67, 101) px (height, width) at 0.5 µm/px" in failed["fine"]
    assert "images are not upsampled" in failed["coarse"]
    assert "give spacing_at_level_0" in failed["unknown"] and "gone.png" in failed["gone"]


# live -----------------------------------------------------------------------------------------


def test_pictures_in_memory_batch_by_batch(model: Model) -> None:
    kit = model.prepare_dense_encoder(dense=DenseImageOptions(target_size=(60, 56), pad_mode="reflect"))
    assert kit.geometry.encoded_size == (70, 56) and kit.geometry.grid_shape == (5, 4)
    prepare = pickle.loads(pickle.dumps(kit.preprocessor()))
    pixels = [picture(60, 56, seed) for seed in (1, 2)]
    batch = torch.stack([prepare(torch.from_numpy(each.copy()).permute(2, 0, 1)) for each in pixels])
    found = kit.encode(batch)
    assert found.shape == (2, 768, 5, 4) and not found.requires_grad
    for each, values in zip(pixels, found, strict=True):
        assert_close(values, expected(model, np.pad(each, ((0, 10), (0, 0), (0, 0)), mode="reflect")))
    (found * torch.nn.Parameter(torch.ones(1))).sum().backward()  # a decoder is trained upon it


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((3, 56, 56), np.uint8), "uint8 tensor on the CPU, got ndarray"),
        (torch.zeros(3, 56, 56), "uint8 tensor on the CPU, got .* float32"),
        (torch.zeros(3, 56, 57, dtype=torch.uint8), "nothing is resized or cropped"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "nothing is resized or cropped"),
    ],
)
def test_wrong_pictures(model: Model, item: Any, message: str) -> None:
    kit = model.prepare_dense_encoder(dense=DenseImageOptions(target_size=56))
    with pytest.raises(ConfigError, match=message):
        kit.preprocessor()(item)
    with pytest.raises(ConfigError, match="a batch must be"):
        kit.encode(torch.zeros(1, 3, 56, 60))
    with pytest.raises(ConfigError, match="a batch must be"):
        kit.encode(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


# what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": 0}, "target_size=0"),
        ({"spacing_um": -1.0}, "spacing_um=-1.0"),
        ({"pad_mode": "wrap"}, "pad_mode='wrap' is not one of reflect"),
        ({"window_size": 0}, "window_size=0"),
        ({"overlap": 1.0}, "overlap=1.0"),
        ({"feature_kind": "tokens"}, "feature_kind='tokens'"),
        ({"attention_blocks": ()}, "attention_blocks"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    for kind in (DenseOptions, DenseImageOptions):
        with pytest.raises(ConfigError, match=message):
            kind(**{"spacing_um": 0.5, "target_size": 224, **options})


def test_wrong_regions(slide: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"coordinates must be \(N, 2\)"):
        SlideRegions(sample_id="a", image_path=slide, coordinates=[1, 2, 3])
    with pytest.raises(ManifestError, match="whole numbers"):
        SlideRegions(sample_id="a", image_path=slide, coordinates=[[1.5, 2.0]])
    with pytest.raises(ManifestError, match="becomes a file name"):
        SlideRegions(sample_id="a", image_path=slide, coordinates=[[1, 2]], annotation="../up")
    two = [regions(slide, (0, 0)), SlideRegions(sample_id="a", image_path="b.svs", coordinates=[[0, 0]])]
    dense, execution = DenseOptions(spacing_um=1.0, target_size=28), ExecutionOptions(output_dir=tmp_path)
    with pytest.raises(ManifestError, match="'a' is of two slides"):
        model.embed_regions_dense(two, dense=dense, execution=execution)
    with pytest.raises(ConfigError, match="embed_regions_dense writes files"):
        model.embed_regions_dense([], dense=dense)
    assert model.embed_regions_dense([], dense=dense, execution=execution) == []


def test_what_an_encoder_does_not_take_is_said_before_anything_is_read(model: Model, tmp_path: Path) -> None:
    scattering = Model.from_preset("scattering", device="cpu")
    dense, execution = DenseOptions(spacing_um=1.0, target_size=28), ExecutionOptions(output_dir=tmp_path)
    nowhere = [SlideRegions(sample_id="a", image_path="nowhere.svs", coordinates=[[0, 0]])]
    with pytest.raises(UnsupportedError, match="no patch tokens"):
        scattering.embed_regions_dense(nowhere, dense=dense, execution=execution)
    with pytest.raises(ConfigError, match="reflect"):
        model.embed_regions_dense(
            nowhere, dense=DenseOptions(spacing_um=1.0, target_size=3), execution=execution
        )
    with pytest.raises(ConfigError, match="has 1 blocks"):
        model.prepare_dense_encoder(
            dense=DenseOptions(
                spacing_um=1.0, target_size=28, feature_kind="cls_attention", attention_blocks=(7,)
            )
        )


# identities -----------------------------------------------------------------------------------


def test_differences_of_dense_identities(model: Model, slide: Path, tmp_path: Path) -> None:
    dense, execution = DenseOptions(spacing_um=1.0, target_size=28), ExecutionOptions(output_dir=tmp_path)
    (made,) = model.embed_regions_dense([regions(slide, (0, 0))], dense=dense, execution=execution)
    recorded = made.metadata["compatibility"]
    assert model.dense_identity_differences(recorded, dense=dense) == {}
    other = DenseOptions(spacing_um=1.0, target_size=28, overlap=0.5)
    found = model.dense_identity_differences({**recorded, "weights": "x"}, dense=other)
    assert found == {"weights": ("x", recorded["weights"]), "overlap": (0.0, 0.5)}
    assert model.dense_identity_differences({}, dense=dense)["precision"] == (MISSING_FIELD, "fp32")
    assert (
        repr(MISSING_FIELD) == "MISSING_FIELD" and pickle.loads(pickle.dumps(MISSING_FIELD)) is MISSING_FIELD
    )
    with pytest.raises(ConfigError, match="reflect"):
        model.dense_identity_differences(recorded, dense=DenseImageOptions(target_size=3, spacing_um=3.0))


def test_differences_of_pooled_identities(model: Model, slide: Path, tmp_path: Path) -> None:
    (image,) = model.embed_images(
        [ImageSpec(sample_id="a", image=picture(30, 30, 0))], execution=ExecutionOptions(output_dir=tmp_path)
    )
    recorded = image.metadata["compatibility"]
    assert model.pooled_identity_differences(recorded, preprocessing=None) == {}
    half = ExecutionOptions(output_dtype="fp16")
    found = model.pooled_identity_differences(recorded, preprocessing=None, execution=half)
    assert found == {"feature_dtype": ("fp32", "fp16")}
    config = PreprocessingConfig(requested_spacing_um=0.5, tissue_threshold=0.5)
    (tiles,) = model.embed_tiles(
        [slide], preprocessing=config, execution=ExecutionOptions(output_dir=tmp_path)
    )
    recorded = tiles.metadata["compatibility"]
    assert model.pooled_identity_differences(recorded, preprocessing=config) == {}
    other = config.updated(overlap=0.5)
    del recorded["encoder"]["transform"]
    found = model.pooled_identity_differences(recorded, preprocessing=other)
    assert found.pop("geometry.overlap") == (0.0, 0.5)
    assert found and all(name.startswith("encoder.transform.") for name in found)
    assert all(pair[0] is MISSING_FIELD for pair in found.values())
    assert model.pooled_identity_differences(recorded, preprocessing=config, encoded_pixels=False) == {}
