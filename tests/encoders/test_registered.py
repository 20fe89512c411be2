"""Encoders that users register are presets like ours, wherever these are taken."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from slide2vec import (
    BagDataset,
    ExecutionOptions,
    Model,
    Pipeline,
    PreprocessingConfig,
    TorchTileEncoder,
    list_models,
    register_encoder,
)
from slide2vec.artifacts import load_embeddings
from slide2vec.artifacts.export import export_run
from slide2vec.cohort.process_list import read_process_list
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.compile.export_module import typed_copy
from slide2vec.encoders.photometrics import geometry_of, statistics_of
from slide2vec.encoders.registered import reloader
from slide2vec.errors import ConfigError, PatientError, PresetError, SlideError, WeightsError
from slide2vec.recipes import REGISTERED, load_recipe
from slide2vec.report.slide_facts import ReportedRun
from slide2vec.viewer.viewed_run import ViewedRun

with pytest.MonkeyPatch.context() as _patch:  # other tests have no such presets
    _patch.setattr(REGISTERED, "_items", {})
    import brought_encoders as brought

    THEIRS = dict(REGISTERED._items)

#: As much as float32 sums of one product in another order may differ.
ROUNDING = 1e-6
EVERY_TILE = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=64)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTERED, "_items", THEIRS)
        yield


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(REGISTERED, "_items", dict(REGISTERED._items))


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> Path:
    return generated_slide(tmp_path_factory.mktemp("slides") / "a.svs", size_px=768, seed=0, levels=1)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    yield Model.from_preset("tests-tiles", device="cpu")


def test_what_is_known_before_it_is_built() -> None:
    recipe = load_recipe("tests-tiles")
    assert (recipe.level, recipe.tile_size_px, recipe.spacing_um) == ("tile", 64, (0.25, 0.5))
    assert (recipe.title, recipe.summary, recipe.citation) == ("Tiles", "Tiles of 64 px.", "tests")
    assert {"tests-tiles", "tests-by-hand"} <= set(list_models("tile"))
    assert "tests-slides" in list_models("slide") and "tests-patients" in list_models("patient")
    assert load_recipe("tests-by-hand").default_spacing_um is None
    with pytest.raises(ConfigError, match="says nothing of the spacing"):
        load_recipe("tests-by-hand").tiles(None, None)


def test_what_the_built_one_says(model: Model) -> None:
    assert (model.recipe.transform.mean, model.recipe.transform.std) == (brought.MEAN, brought.STD)
    count = sum(each.numel() for each in brought.net(8).parameters())
    assert model.recipe.params_m == pytest.approx(count / 1e6)
    assert model.recipe.gflops == pytest.approx(2 * (64 * 64 * 3 * 16 + 16 * 8) / 1e9)
    assert model.recipe.images is not None and model.recipe.images.square


def test_features_are_those_of_the_module_on_the_pixels_of_the_slide(model: Model, slide: Path) -> None:
    """By OpenSlide and torchvision, without anything of ours."""
    import openslide

    found = model.embed_slide(slide, EVERY_TILE.updated(requested_spacing_um=0.25))
    with openslide.OpenSlide(slide) as opened:
        side = found.tile_size_lv0
        assert side == 64
        tiles = [
            opened.read_region((int(x), int(y)), 0, (side, side)).convert("RGB")
            for x, y in zip(found.x[:8], found.y[:8], strict=True)
        ]
    transform = brought.Tiles().get_normalization_transform()
    with torch.inference_mode():
        expected = brought.net(8)(torch.stack([transform(tile) for tile in tiles]))
    assert torch.allclose(found.tile_embeddings[:8], expected, atol=ROUNDING)


def test_a_run_is_resumed_until_the_code_is_another(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> str:
        model = Model.from_preset("tests-tiles", device="cpu")
        result = Pipeline(model, EVERY_TILE.updated(resume=True), ExecutionOptions(output_dir=tmp_path)).run(
            [slide]
        )
        (artifact,) = result.tile_artifacts
        assert load_embeddings(artifact.path).shape[1] == 8
        return str(artifact.path.stat().st_mtime_ns)

    first = run()
    assert run() == first
    code = {"object": "brought_encoders.Tiles", "version": "another", "source": "tests"}
    monkeypatch.setattr("slide2vec.encoders.registered.code_of", lambda encoder: code)
    assert run() != first


def test_identity_has_weights_code_and_source(model: Model) -> None:
    found = model.identity()
    assert found["weights_source"] == "tests" and len(found["weights"]) == 32
    assert found["code"]["object"] == "brought_encoders.Tiles" and found["code"]["source"] == "tests"
    other = Model.from_preset("tests-slides", device="cpu").identity()
    assert other["code"]["aggregation_revision"] == 2 and other["below"]["code"] == found["code"]
    changed = Model.from_preset("tests-tiles", device="cpu")
    next(changed.encoder.parameters()).mul_(2)
    assert changed.identity()["weights"] != found["weights"]


def test_an_engine_holds_a_copy_that_computes_in_its_precision(model: Model) -> None:
    half = typed_copy(model.encoder, torch.bfloat16, ())
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made, expected = half(pixels.bfloat16()), model.encoder(pixels)
    assert made.dtype == torch.bfloat16 and expected.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(made.float(), expected).min() > 0.999
    assert model.recipe.encoder.kwargs["code"] == model.identity()["code"]


@pytest.mark.slow  # two processes are started as users' are; `reloader` is what they are sent
def test_several_devices(model: Model, slide: Path) -> None:
    alone = model.embed_slide(slide, EVERY_TILE)
    shared = model.embed_slide(slide, EVERY_TILE, ExecutionOptions(devices=("cpu", "cpu")))
    assert torch.equal(alone.tile_embeddings, shared.tile_embeddings)


def test_an_encoder_of_a_script_is_not_for_workers(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    there = reloader(["tests-slides", "tests-tiles"], print)
    assert pickle.loads(pickle.dumps(there)) is not None and reloader(["lunit"], print) is print
    monkeypatch.setattr(brought.Tiles, "__module__", "__main__")
    with pytest.raises(ConfigError, match="tests-tiles: its class is in the script or notebook"):
        reloader(["tests-slides", "tests-tiles"], print)(device="cpu")


def test_outputs(slide: Path) -> None:
    config = PreprocessingConfig(requested_spacing_um=0.5)
    first = Model.from_preset("tests-by-hand", device="cpu").embed_slide(slide, config)
    both = Model.from_preset("tests-by-hand", device="cpu", output_variant="both").embed_slide(slide, config)
    assert (first.tile_embeddings.shape[1], both.tile_embeddings.shape[1]) == (3, 6)
    assert torch.equal(both.tile_embeddings[:, :3] * 2, both.tile_embeddings[:, 3:])
    with pytest.raises(PresetError, match="no output variant 'half'"):
        Model.from_preset("tests-by-hand", output_variant="half")


def test_slides_and_patients(slide: Path) -> None:
    tiles = Model.from_preset("tests-tiles", device="cpu").embed_slide(slide)
    found = Model.from_preset("tests-slides", device="cpu").embed_slide(
        slide, execution=ExecutionOptions(save_latents=True)
    )
    places = np.stack([tiles.x, tiles.y], 1).mean(0) / tiles.tile_size_lv0
    expected = torch.cat([tiles.tile_embeddings.mean(0), torch.tensor(places)])
    assert found.slide_embedding is not None and found.latents is not None
    assert torch.allclose(found.slide_embedding, expected.float(), rtol=1e-5)
    assert torch.equal(found.latents, tiles.tile_embeddings[:2])
    patient = Model.from_preset("tests-patients", device="cpu").embed_patient([slide])
    assert torch.allclose(patient.patient_embedding, expected.float(), rtol=1e-5)
    with pytest.raises(ConfigError, match="no tiles that overlap"):
        Model.from_preset("tests-slides", device="cpu").embed_slide(slide, EVERY_TILE.updated(overlap=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: torch.cat([made, made], 1), r"shape \(20,\), not \(10,\), its encode_dim"),
        (lambda made: torch.cat([made, made]), r"shape \(2, 10\), not \(10,\)"),
        (lambda made: None, "type NoneType"),
    ],
)
def test_embeddings_of_another_shape_fail_their_slide_or_patient(
    monkeypatch: pytest.MonkeyPatch, slide: Path, change: Callable[[Any], Any], message: str
) -> None:
    """They cannot stand beside the others."""
    model = Model.from_preset("tests-slides", device="cpu")
    patients = Model.from_preset("tests-patients", device="cpu")
    made = brought.Slides.encode_slide_with_latents
    monkeypatch.setattr(
        brought.Slides,
        "encode_slide_with_latents",
        lambda self, *args, **more: (change(made(self, *args, **more)[0]), None),
    )
    with pytest.raises(SlideError, match=f"slide a: the slide encoder tests-slides failed .*{message}"):
        model.embed_slide(slide)
    given = brought.Patients.encode_patient
    monkeypatch.setattr(
        brought.Patients, "encode_patient", lambda self, slides: change(given(self, slides)[None])
    )
    with pytest.raises(PatientError, match=f"patient encoder tests-patients failed .*{message}"):
        patients.embed_patient([slide])


def test_features_of_tiles_that_are_no_tensor(monkeypatch: pytest.MonkeyPatch, slide: Path) -> None:
    made = brought.Tiles.encode_tiles
    monkeypatch.setattr(brought.Tiles, "encode_tiles", lambda self, batch: (made(self, batch),))
    with pytest.raises(TypeError, match="it gave tuple for tiles, not a tensor of a row for each: correct"):
        Model.from_preset("tests-tiles", device="cpu").embed_slide(slide)


@pytest.mark.parametrize(
    "names",
    [
        "tests-tiles,tests-slides,tests-again",
        "tests-by-hand,tests-tiles,tests-slides,tests-again,tests-patients",
        "tests-slides,tests-patients,tests-again",
        "tests-patients,tests-tiles,tests-slides",
    ],
)
def test_several_of_one_tile_encoder_have_files_and_rows_of_their_own(
    registry: None, slide: Path, tmp_path: Path, names: str
) -> None:
    """Side by side, which are in one folder only as far as they would be one after the other."""
    register_encoder(
        "tests-again",
        encode_dim=10,
        level="slide",
        tile_encoder="tests-tiles",
        tile_encoder_output_variant="default",
        supported_spacing_um=0.5,
    )(type("Again", (brought.Slides,), {}))
    models = {
        name: Model.from_preset(name, device="cpu", allow_non_recommended_settings=True)
        for name in names.split(",")
    }
    given = [{"sample_id": "a", "image_path": slide, "patient_id": "p"}]
    config = PreprocessingConfig(requested_spacing_um=0.5, resume=True)
    found = {}
    for way, runs in (
        ("one by one", [{name: model} for name, model in models.items()]),
        ("together", [models]),
        ("together again", [models]),
    ):
        out = tmp_path / way.removesuffix(" again")
        execution = ExecutionOptions(output_dir=out, save_tile_embeddings=True, build_engine="never")
        for each in runs:
            assert not Pipeline(each, config, execution).run(given).failed
        embeddings = sorted(str(path.relative_to(out)) for path in out.rglob("*.pt"))
        rows = read_process_list(out / "process_list.csv")
        where = {row["encoder_name"]: str(Path(row["feature_path"]).relative_to(out)) for row in rows}
        assert where.keys() == models.keys() and len(set(where.values())) == len(rows) == len(models)
        found[way] = (embeddings, where)
    assert found["one by one"] == found["together"] == found["together again"]
    for name, path in where.items():  # each is known by the name that the process list has
        export_run(out, tmp_path / name, "npz", encoder=name)
        kind, file = Path(path).with_suffix(".npz").parts[-2:]
        assert (tmp_path / name / kind / file).is_file()


def test_shards_are_those_of_patients_for_all_encoders(slide: Path, tmp_path: Path) -> None:
    """Of two patients; the third shard has nothing."""
    models = {name: Model.from_preset(name, device="cpu") for name in ("tests-tiles", "tests-patients")}
    manifest, out = tmp_path / "slides.csv", tmp_path / "out"
    lines = [f"{name},{slide},{patient}" for name, patient in zip("abcd", "pqpp", strict=True)]
    manifest.write_text("\n".join(["sample_id,image_path,patient_id", *lines]))
    for number in (1, 2, 3):
        execution = ExecutionOptions(output_dir=out, shard=f"{number}/3", build_engine="never")
        result = Pipeline(models, None, execution).run(manifest_path=manifest)
        rows = read_process_list(out / f"process_list.shard-{number}-of-3.csv")
        names = {"a": 2, "c": 2, "d": 2} if number == 1 else {"b": 2} if number == 2 else {}
        assert Counter(row["sample_id"] for row in rows) == names and not result.failed
    merged = merge_shards(out)
    assert merged.complete and not merged.found.in_two and merged.finished == 4


def test_a_slide_is_in_two_shards_of_one_encoder_only(slide: Path, tmp_path: Path) -> None:
    """Runs of one encoder each divide otherwise, where one is of patients."""
    given = [
        {"sample_id": name, "image_path": slide, "patient_id": patient}
        for name, patient in zip("abcd", "pqpp", strict=True)
    ]
    for name in ("tests-tiles", "tests-patients"):
        for number in (1, 2):
            execution = ExecutionOptions(output_dir=tmp_path, shard=f"{number}/2", build_engine="never")
            Pipeline(Model.from_preset(name, device="cpu"), None, execution).run(given)
    merged = merge_shards(tmp_path)
    assert merged.complete and not merged.found.in_two


def test_bags_viewer_and_report_know_both_encoders_of_a_folder(
    registry: None, slide: Path, tmp_path: Path
) -> None:
    """Tiles by the name of the tile encoder, where that was asked for; else of the model of slides."""
    models = {
        name: Model.from_preset(name, device="cpu", allow_non_recommended_settings=True)
        for name in ("tests-tiles", "tests-slides")
    }
    config = PreprocessingConfig(requested_spacing_um=0.5)
    kinds = {}
    for folder, run in (("both", models), ("slides", models["tests-slides"])):
        out = tmp_path / folder
        execution = ExecutionOptions(output_dir=out, save_tile_embeddings=True, build_engine="never")
        assert not Pipeline(run, config, execution).run([{"sample_id": "a", "image_path": slide}]).failed
        reported = ReportedRun(out, out)
        kinds[folder] = {
            name: [artifact.path.parent.name for artifact in reported.slides[0].artifacts(name)]
            for name in reported.encoders
        }
    assert kinds == {
        "both": {"tests-tiles": ["tile_embeddings"], "tests-slides": ["slide_embeddings"]},
        "slides": {"tests-slides": ["tile_embeddings", "slide_embeddings"]},
    }
    assert list(ViewedRun(tmp_path / "slides").encoders) == ["tests-slides"]
    for name in (None, *models):
        viewed = ViewedRun(tmp_path / "both", name)
        assert list(viewed.encoders) == ["tests-tiles"] and viewed.slide(0, 0)["pixels"]
        viewed.close()
    bags = {name: BagDataset(tmp_path / "both", encoders=name)[0]["features"] for name in models}
    assert torch.equal(bags["tests-tiles"], bags["tests-slides"]) and len(bags["tests-tiles"])
    several = BagDataset(tmp_path / "both", encoders=["tests-tiles"])[0]["features"]
    assert several.keys() == {"tests-tiles"}
    with pytest.raises(ConfigError, match="Did you mean tests-tiles"):
        BagDataset(tmp_path / "both", encoders="tests-tile")


def test_tiles_of_other_sizes(registry: None, slide: Path) -> None:
    model = Model.from_preset("tests-tiles", device="cpu", allow_non_recommended_settings=True)
    assert model.embed_slide(slide, EVERY_TILE.updated(requested_tile_size_px=96)).num_tiles
    with pytest.raises(ConfigError, match="patches have 8 px a side"):
        model.embed_slide(slide, EVERY_TILE.updated(requested_tile_size_px=100))
    rigid = Model.from_preset("tests-by-hand", device="cpu", allow_non_recommended_settings=True)
    with pytest.raises(ConfigError, match="it is for 32 px only"):
        rigid.embed_slide(slide, EVERY_TILE)

    @register_encoder(
        "tests-asks",
        input_size=32,
        encode_dim=8,
        supports_variable_input_size=True,
        supported_spacing_um=None,
        variable_input_model_kwargs={"dynamic": True},
    )
    class Asks(TorchTileEncoder):
        def __init__(self, output_variant: str, dynamic: bool = False) -> None:
            super().__init__(net_for(dynamic), encode_dim=8, input_size=32, mean=(0,) * 3, std=(1,) * 3)

    def net_for(dynamic: bool) -> nn.Module:
        class Strict(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = brought.net(8)

            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                assert dynamic or pixels.shape[-1] == 32
                return self.inner(pixels)  # type: ignore[no-any-return]

        return Strict()

    asks = Model.from_preset("tests-asks", device="cpu", allow_non_recommended_settings=True)
    assert asks.embed_slide(slide, EVERY_TILE).num_tiles


OF_TILES: dict[str, Any] = {
    "encode_dim": 8,
    "input_size": 64,
    "supports_variable_input_size": True,
    "supported_spacing_um": 0.5,
}
OF_SLIDES: dict[str, Any] = {
    "encode_dim": 8,
    "level": "slide",
    "tile_encoder": "tests-tiles",
    "tile_encoder_output_variant": "default",
    "supported_spacing_um": 0.5,
}


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        (OF_TILES, {"encode_dim": None}, "has to say encode_dim, or output_variants"),
        (OF_TILES, {"encode_dim": 0}, "positive number, got 0"),
        (OF_TILES, {"default_output_variant": "a"}, "not both"),
        (
            OF_TILES,
            {"encode_dim": None, "output_variants": {"a": {"encode_dim": 1}}, "default_output_variant": "b"},
            "'b' is not in output_variants",
        ),
        (OF_TILES, {"input_size": None}, "side of its tiles"),
        (OF_TILES, {"supports_variable_input_size": None}, "has to be True or False"),
        (OF_TILES, {"aggregation_revision": 1}, "of a slide or patient encoder"),
        (OF_TILES, {"default_spacing_um": 1.0}, "default_spacing_um=1.0 is not in"),
        (OF_TILES, {"precision": "fp8"}, "precision"),
        (OF_TILES, {"level": "cell"}, "level='cell'"),
        (OF_TILES, {"level": "slide"}, "has to say tile_encoder"),
        (OF_SLIDES, {}, "is no SlideEncoder"),
        (OF_SLIDES, {"aggregation_revision": 0}, "has to be 1 or more"),
    ],
)
def test_what_is_refused(registry: None, given: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        register_encoder("tests-wrong", **{**given, **change})(brought.Tiles)
    assert isinstance(caught.value, PresetError) and "'tests-wrong'" in str(caught.value)
    assert REGISTERED.added("tests-wrong") is None


@pytest.mark.parametrize("name", ["virchow2", "tests-by-hand", "a/b", "", ".."])
def test_names_that_are_taken_or_no_names(registry: None, name: str) -> None:
    with pytest.raises(PresetError, match="cannot be registered"):
        register_encoder(name, **OF_TILES)(brought.Tiles)


def test_a_class_is_registered_again_when_its_module_is_loaded_again(registry: None) -> None:
    assert register_encoder("tests-tiles", **OF_TILES)(brought.Tiles) is brought.Tiles


def test_abstract_classes_are_refused(registry: None) -> None:
    class Without(brought.ByHand):
        get_normalization_transform = brought.TileEncoder.get_normalization_transform  # type: ignore[assignment]

    with pytest.raises(PresetError, match="has no get_normalization_transform"):
        register_encoder("tests-wrong", **OF_TILES)(Without)
    with pytest.raises(PresetError, match="has no device, encode_dim, encode_tiles"):
        register_encoder("tests-wrong", **OF_TILES)(type("Bare", (brought.TileEncoder,), {}))


def test_other_features_than_registered_are_told(registry: None) -> None:
    register_encoder("tests-wrong", **{**OF_TILES, "encode_dim": 9})(brought.Tiles)
    with pytest.raises(PresetError, match=r"gives \(1, 8\) instead of \(1, 9\)"):
        Model.from_preset("tests-wrong", device="cpu")
    with pytest.raises(PresetError, match="loads its weights itself"):
        Model.from_preset("tests-tiles", device="cpu", weights="random")
    with pytest.raises(WeightsError, match="3 parts"):
        Model.from_preset("tests-patients", device="cpu", weights="weights.pt")


def test_a_module_with_a_transform(registry: None, slide: Path) -> None:
    config = EVERY_TILE.updated(requested_spacing_um=0.25)
    said = Model.from_preset("tests-tiles", device="cpu").embed_slide(slide, config)
    given: dict[str, Any] = {"tile_size_px": 64, "spacing_um": 0.25, "device": "cpu"}
    model = Model.from_module(brought.net(8), "tests-module", mean=brought.MEAN, std=brought.STD, **given)
    found = model.embed_slide(slide)
    assert torch.equal(found.tile_embeddings, said.tile_embeddings)
    assert model.identity()["code"]["object"] == "torch.nn.modules.container.Sequential"
    assert model.identity()["code"]["version"] == metadata.version("torch")
    transform = v2.Compose([v2.Resize(80), v2.CenterCrop(64), *NORMALISE])
    other = Model.from_module(brought.net(8, seed=1), "tests-module", transform=transform, **given)
    assert (other.recipe.transform.mean, other.recipe.transform.crop) == (CLIP[0], 64)
    assert other.recipe.images is not None and (other.recipe.images.resize, other.recipe.images.crop) == (
        80,
        64,
    )
    assert other.identity()["weights"] != model.identity()["weights"]
    assert "tests-module" in list_models("tile")


def test_a_module_goes_along_to_workers(registry: None, slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.from_module(
        brought.net(8), "tests-module", tile_size_px=64, mean=brought.MEAN, std=brought.STD, device="cpu"
    )
    sent = pickle.dumps(model.loader)
    monkeypatch.setattr(REGISTERED, "_items", {})  # as it is in another process
    assert pickle.loads(sent)(device="cpu").identity() == model.identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "give either transform, or mean and std"),
        ({"transform": print}, "give either transform, or mean and std"),
        ({"name": "virchow2"}, "slide2vec has a preset of that name"),
        ({"name": "tests-tiles"}, "brought_encoders:Tiles is already registered"),
        ({"module": nn.Conv2d(3, 4, 8)}, r"gives \(1, 4, 57, 57\) instead of \(1, D\)"),
    ],
)
def test_modules_that_are_refused(registry: None, change: dict[str, Any], message: str) -> None:
    given = {"module": brought.net(8), "name": "m", "tile_size_px": 64, "mean": (0,) * 3, "std": (1,) * 3}
    with pytest.raises(PresetError, match=message):
        Model.from_module(**{**given, **change})


def to_square(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1)).float().square()


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMALISE = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*CLIP)]


def test_statistics_are_those_of_the_transform() -> None:
    assert statistics_of(v2.Compose(NORMALISE), "it") == CLIP
    only_arrays = v2.Compose([torch.from_numpy, lambda pixels: pixels.permute(2, 0, 1) / 127.5 - 1])
    assert statistics_of(only_arrays, "it") == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(PresetError, match="no factor and offset per channel"):
        statistics_of(to_square, "it")
    with pytest.raises(PresetError, match="no factor and offset per channel"):
        statistics_of(v2.Compose([v2.GaussianBlur(3, 2.0), *NORMALISE]), "it")
    with pytest.raises(PresetError, match=r"makes \(3, 24, 24\) of \(48, 48, 3\)"):
        statistics_of(v2.Compose([v2.Resize(24), *NORMALISE]), "it")
    with pytest.raises(PresetError, match="its transform of a tile fails: no"):
        statistics_of(lambda picture: (_ for _ in ()).throw(RuntimeError("no")), "it")


def test_geometry_is_that_of_the_transform() -> None:
    found = geometry_of(
        v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), *NORMALISE])
    )
    assert found is not None
    assert (found.resize, found.crop, found.interpolation, found.square) == (256, 224, "bicubic", False)
    squeezed = geometry_of(v2.Compose([v2.Resize((64, 64)), *NORMALISE]))
    assert squeezed is not None and (squeezed.crop, squeezed.square) == (64, True)
    assert geometry_of(v2.Compose(NORMALISE)) is None
    assert geometry_of(v2.Compose([v2.CenterCrop(224), v2.Resize(64), *NORMALISE])) is None


@pytest.fixture
def installed(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code where packages with entry points are installed: {entry point: source of the function}."""

    def run(entries: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
        functions = [f"def {name}():\n    {body}\n" for name, body in entries.items()]
        (tmp_path / "brought_package.py").write_text("\n".join(functions))
        info = tmp_path / "brought-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        points = [f"{name} = brought_package:{name}" for name in reversed(entries)]
        (info / "entry_points.txt").write_text("\n".join(["[slide2vec.encoders]", *points]))
        path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(brought.__file__).parent)!r}]\n"
        return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)

    return run


def test_installed_packages_register_theirs(
    installed: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """When they are first asked for; the one that fails is left out, with what it had registered."""
    entries = {
        "a_good": "import brought_encoders",
        "b_broken": "import brought_encoders as b; from slide2vec import register_encoder as r; "
        "r('half', encode_dim=8, input_size=64, supports_variable_input_size=True, "
        "supported_spacing_um=None)(b.Tiles); raise SystemExit('no  licence')",
    }
    code = """
import slide2vec, slide2vec.cli, warnings
from slide2vec import list_models, list_encoder_provider_diagnostics
assert "brought_package" not in sys.modules and "torch" not in sys.modules
(found,) = list_encoder_provider_diagnostics()
print(found.provider_key, found.provider, found.concise())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert "half" not in list_models() and "tests-tiles" in list_models()
print(said[0].category.__name__, said[0].message)
try:
    slide2vec.recipes.load_recipe("half")
except ValueError as error:
    print(error)
"""
    done = installed(entries, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "b_broken brought_package:b_broken SystemExit: no licence"
    assert lines[1].startswith("RuntimeWarning Encoders of these packages were left out: b_broken")
    assert "there is no preset 'half'" in lines[2] and "b_broken (SystemExit: no licence)" in lines[2]
