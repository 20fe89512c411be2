"""The API end to end on real slides, against the plain reference.

The reference: OpenSlide's pixels, OpenCV area averaging to the requested size, the encoder's own
torchvision transform on a PIL image, the encoder in fp32, one tile at a time.
"""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import openslide
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from slide2vec import EmbedSlidesError, ExecutionOptions, Model, Models, PreprocessingConfig
from slide2vec.errors import ConfigError, ModelLevelError, PresetError, SlideError, WeightsError
from slide2vec.pictures import write_picture
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.progress import RunFinished, activate_progress_reporter
from slide2vec.recipes import load_recipe
from slide2vec.runtime.torch_engine import TorchEngine
from slide2vec.tiling import write_coordinates

#: What the mission allows between an embedding and its reference.
MIN_COSINE = 0.9999
#: Of equal pixels in the same encoder: 3e-13 from 1 was seen. All pixels off by 0.6 grey levels give 2e-6,
#: which the mission's bound would let pass.
SAME_PIXELS_COSINE = 1 - 1e-7


@pytest.fixture(scope="session")
def scattering() -> Model:
    return Model.from_preset("scattering", device="cpu")


@pytest.fixture(scope="session")
def vit() -> Model:
    return Model.from_preset("prost40m", weights="random", device="cpu", allow_non_recommended_settings=True)


@pytest.fixture(scope="session")
def shallow() -> Model:
    """Two of its blocks: what pixels come to an encoder does not depend on their number."""
    options: dict[str, Any] = {"weights": "random", "allow_non_recommended_settings": True}
    return with_two_blocks(Model.from_preset("prost40m", device="cpu", **options))


def with_two_blocks(model: Model) -> Model:
    trunk: Any = model.encoder.trunk
    trunk.blocks = trunk.blocks[:2]
    return model


def reference(
    model: Model, path: Path, tiling: PreprocessingConfig, found: object, limit: int = 6
) -> torch.Tensor:
    """Embeddings of the first tiles of a slide, without anything of ours but the encoder."""
    transform = model.recipe.transform
    steps = transforms.Compose(
        [
            transforms.ToTensor(),  # nothing is resized or cropped
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    side, lv0 = tiling.requested_tile_size_px, found.tile_size_lv0  # type: ignore[attr-defined]
    rows = []
    with openslide.OpenSlide(path) as handle, torch.inference_mode():
        for x, y in zip(found.x[:limit].tolist(), found.y[:limit].tolist(), strict=True):  # type: ignore[attr-defined]
            rgba = handle.read_region((x, y), 0, (lv0, lv0))
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            tile = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            if lv0 != side:
                tile = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
            rows.append(model.encoder(steps(Image.fromarray(tile))[None])[0])
    return torch.stack(rows)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double())


@pytest.mark.parametrize("supertiles", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "backend",
    [
        "cucim",
        pytest.param("openslide", marks=pytest.mark.slow),
        pytest.param("vips", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("spacing", "tile"), [(0.5, 448), (1.1, 224)])
def test_embeddings_equal_the_reference(
    slides_dir: Path, shallow: Model, backend: str, supertiles: bool, spacing: float, tile: int
) -> None:
    """Tiles that are encoded at their size; and tiles of 1.1 µm/px, which this slide
    has only as level 0, reduced by area."""
    path = slides_dir / "CMU-1-Small-Region.svs"
    config = PreprocessingConfig(
        backend=backend,  # type: ignore[arg-type]
        use_supertiles=supertiles,
        requested_spacing_um=spacing,
        requested_tile_size_px=tile,
    )
    found = shallow.embed_slide(path, config)
    assert found.num_tiles > 10
    assert found.tile_embeddings.shape == (found.num_tiles, 384)
    expected = reference(shallow, path, config, found)
    assert cosines(found.tile_embeddings[: len(expected)], expected).min() >= SAME_PIXELS_COSINE


@pytest.mark.parametrize("preset", ["scattering", "lunit"])
def test_presets_equal_the_reference(slides_dir: Path, preset: str, scattering: Model) -> None:
    """lunit's published transform, for images, crops."""
    options: dict[str, Any] = {"weights": "random", "allow_non_recommended_settings": True}
    model = (
        scattering
        if preset == "scattering"
        else with_two_blocks(Model.from_preset(preset, device="cpu", **options))
    )
    config = PreprocessingConfig(requested_spacing_um=2.0, requested_tile_size_px=224)
    found = model.embed_slide(slides_dir / "CMU-1-Small-Region.svs", config)
    expected = reference(model, slides_dir / "CMU-1-Small-Region.svs", config, found, limit=4)
    assert cosines(found.tile_embeddings[: len(expected)], expected).min() >= SAME_PIXELS_COSINE


def test_embedded_slide_fields(slides_dir: Path, scattering: Model) -> None:
    path = slides_dir / "aperio-jpeg-pyramid.svs"
    embedded = scattering.embed_slide(str(path))
    assert embedded.sample_id == "aperio-jpeg-pyramid"
    assert embedded.image_path == path and embedded.mask_path is None
    assert embedded.tile_embeddings.shape == (embedded.num_tiles, scattering.feature_dim)
    assert embedded.x.dtype == embedded.y.dtype == np.int64
    order = np.lexsort((embedded.y, embedded.x))
    assert np.array_equal(order, np.arange(embedded.num_tiles))
    assert embedded.tile_size_lv0 == 224
    assert embedded.slide_embedding is embedded.latents is embedded.mask_preview_path is None
    assert not embedded.tile_embeddings.is_inference()


def test_many_slides_equal_one_by_one(slides_dir: Path, scattering: Model) -> None:
    """Batches hold tiles of several slides; every slide must come out as it does alone, in order."""
    names = ["CMU-1-Small-Region.svs", "generic-jpeg-bigtiff-pyramid.tiff", "aperio-jpeg-pyramid.svs"]
    config = PreprocessingConfig(requested_spacing_um=1.0)
    together = scattering.embed_slides(
        [slides_dir / name for name in names], config, ExecutionOptions(batch_size=7)
    )
    assert [e.sample_id for e in together] == [Path(name).stem for name in names]
    for name, embedded in zip(names, together, strict=True):
        alone = scattering.embed_slide(slides_dir / name, config)
        assert np.array_equal(alone.x, embedded.x)
        torch.testing.assert_close(embedded.tile_embeddings, alone.tile_embeddings, atol=1e-5, rtol=1e-5)


def test_bad_slides_do_not_stop_the_others(slides_dir: Path, tmp_path: Path, scattering: Model) -> None:
    (tmp_path / "broken.svs").write_bytes(b"II*\0 this is no slide")
    good = slides_dir / "CMU-1-Small-Region.svs"
    slides = [tmp_path / "missing.svs", good, tmp_path / "broken.svs"]
    config = PreprocessingConfig(requested_spacing_um=2.0)
    with pytest.raises(EmbedSlidesError) as caught:
        scattering.embed_slides(slides, config)
    error = caught.value
    assert list(error.failed) == ["missing", "broken"]
    assert all(isinstance(cause, SlideError) for cause in error.exceptions)
    assert [result is not None for result in error.results] == [False, True, False]
    assert error.results[1].num_tiles > 0
    (skipped,) = scattering.embed_slides(slides, config, on_error="skip")
    assert torch.equal(skipped.tile_embeddings, error.results[1].tile_embeddings)
    with pytest.raises(SlideError, match="missing"):
        scattering.embed_slide(tmp_path / "missing.svs")


def test_what_is_finished_survives_a_failing_encoder(
    slides_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_preset("scattering", device="cpu")
    run, calls = TorchEngine.run, []

    def failing(engine: TorchEngine, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if sum(calls) > 30:
            raise RuntimeError("the device is gone")
        return run(engine, pixels)

    monkeypatch.setattr(TorchEngine, "run", failing)
    path = slides_dir / "CMU-1-Small-Region.svs"
    slides = [{"sample_id": name, "image_path": path} for name in "abcdef"]
    config = PreprocessingConfig(requested_spacing_um=2.0)
    execution = ExecutionOptions(batch_size=5, num_workers=1)  # one reader: batches complete in order
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_slides(slides, config, execution, on_error="skip")
    assert [result is not None for result in caught.value.results] == [True] * 3 + [False] * 3
    assert str(caught.value.failed["f"]) == "the device is gone"
    with pytest.raises(RuntimeError, match="gone"):  # nothing finished: the error as it is
        model.embed_slides(slides, config, execution)


def test_slide_without_tissue_is_there(tmp_path: Path, slides_dir: Path, scattering: Model) -> None:
    """A mask without tissue stands for blank glass."""
    Image.fromarray(np.zeros((297, 222), np.uint8)).save(tmp_path / "mask.png")
    blank = {
        "sample_id": "blank",
        "image_path": slides_dir / "CMU-1-Small-Region.svs",
        "mask_path": tmp_path / "mask.png",
    }
    config = PreprocessingConfig(requested_spacing_um=2.0)
    first, second = scattering.embed_slides([blank, slides_dir / "CMU-1-Small-Region.svs"], config)
    assert (first.sample_id, first.num_tiles) == ("blank", 0)
    assert first.tile_embeddings.shape == (0, scattering.feature_dim)
    assert second.num_tiles > 0


def test_name_and_mask_beside_a_path(slides_dir: Path, scattering: Model, tmp_path: Path) -> None:
    """As 7.1.4 takes them: they are a path's, and nothing else's."""
    path, mask = slides_dir / "CMU-1-Small-Region.svs", tmp_path / "mask.png"
    Image.fromarray(np.zeros((100, 75), np.uint8)).save(mask)
    config = PreprocessingConfig(requested_spacing_um=2.0)
    named = scattering.embed_slide(path, config, sample_id="7", mask_path=mask)
    assert (named.sample_id, named.num_tiles, named.mask_path) == ("7", 0, mask)
    with pytest.raises(ValueError, match="given as a path"):
        scattering.embed_slide({"image_path": path}, sample_id="7")


def test_spacing_at_level_0(slides_dir: Path, scattering: Model) -> None:
    path = slides_dir / "CMU-1-Small-Region.svs"
    finer = scattering.embed_slide(path, spacing_at_level_0=0.25)
    assert finer.tile_size_lv0 == 448
    with pytest.raises(SlideError, match=r"CMU-1-Small-Region|upsampled"):
        scattering.embed_slide(path, spacing_at_level_0=2.0)


def test_a_directory_into_which_nothing_is_written_is_told(
    tmp_path: Path, scattering: Model, caplog: pytest.LogCaptureFixture
) -> None:
    told = f"not written into {tmp_path}: Pipeline(model, …).run(slides) writes them"
    models = Models({"scattering": scattering})
    for embed in (scattering.embed_slides, models.embed_slides):
        for execution in (ExecutionOptions(), ExecutionOptions(output_dir=tmp_path)):
            caplog.clear()
            with pytest.raises(EmbedSlidesError):
                embed([tmp_path / "gone.svs"], execution=execution)
            assert (told in caplog.text) == (execution.output_dir is not None)


def test_previews_are_written_and_named(
    slides_dir: Path, tmp_path: Path, scattering: Model, caplog: pytest.LogCaptureFixture
) -> None:
    config = PreprocessingConfig(
        requested_spacing_um=2.0,
        preview={"save_mask_preview": True, "save_tiling_preview": True, "downsample": 8},  # type: ignore[arg-type]
    )
    found = scattering.embed_slide(
        slides_dir / "CMU-1-Small-Region.svs", config, ExecutionOptions(output_dir=tmp_path)
    )
    assert "not written into" not in caplog.text
    assert found.mask_preview_path == tmp_path / "preview" / "mask" / "CMU-1-Small-Region.jpg"
    assert found.tiling_preview_path == tmp_path / "preview" / "tiling" / "CMU-1-Small-Region.jpg"
    for path, kind in ((found.mask_preview_path, "tissue"), (found.tiling_preview_path, "tiles")):
        with Image.open(path) as picture:
            assert picture.width == 748 and picture.height > 1000  # at least 1,000 px, and words below
        plotted = np.asarray(found.plot(kind, size_px=1000))
        assert write_picture(tmp_path / f"{kind}.jpg", plotted).read_bytes() == path.read_bytes()


def test_plots_are_of_what_was_embedded(slides_dir: Path, scattering: Model) -> None:
    path = slides_dir / "CMU-1-Small-Region.svs"
    found = scattering.embed_slide(path, PreprocessingConfig(requested_spacing_um=2.0, tissue_threshold=0.5))
    plotted = found.plot()
    height = 1024
    assert (plotted.width, plotted.mode) == (766, "RGB") and height < plotted.height < 1300
    pixels = np.asarray(plotted)[:height].astype(int)
    coloured = pixels.max(-1) - pixels.min(-1) > 12  # the slide itself is grey
    scale = height / 2967
    for x, y in zip(found.x * scale, found.y * scale, strict=True):
        middle = round(y + 0.5 * found.tile_size_lv0 * scale), round(x + 0.5 * found.tile_size_lv0 * scale)
        if middle[0] < height:
            assert coloured[middle]
    whole = len(found.x) * (found.tile_size_lv0 * scale) ** 2
    assert 0.6 * whole < coloured.sum() < 1.05 * whole
    regions = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=2.0, region_tile_multiple=2)
    assert scattering.embed_slide(path, regions).plot("tiles").width == 766
    moved = replace(found, image_path=slides_dir / "XYC-half-mpp.tiff")
    shown = found._repr_html_()
    assert shown.count("<img ") == 2 and "num_tiles=" in shown and "data:image/jpeg" in shown
    gone = replace(found, image_path=Path("<gone>.svs"))._repr_html_()
    assert "<img" not in gone and "&lt;gone&gt;.svs" in gone and "<gone>" not in gone
    for slide, kind, error, words in (
        (found, "heat", ConfigError, "map, tiles, tissue"),
        (replace(found, tiling=None), "map", ConfigError, "embed_slide"),
        (replace(found, image_path=Path("gone.svs")), "map", SlideError, "gone.svs"),
        (moved, "tiles", SlideError, "2220, 2967"),
    ):
        with pytest.raises(error, match=words):
            slide.plot(kind)  # type: ignore[arg-type]


def test_installed_reporter_gets_the_events_and_stays(slides_dir: Path, scattering: Model) -> None:
    class Reporter:
        def __init__(self) -> None:
            self.events: list[object] = []
            self.closed = False

        def emit(self, event: object) -> None:
            self.events.append(event)

        def close(self) -> None:
            self.closed = True

    reporter = Reporter()
    with activate_progress_reporter(reporter):
        for _ in range(2):
            scattering.embed_slide(
                slides_dir / "CMU-1-Small-Region.svs", PreprocessingConfig(requested_spacing_um=2.0)
            )
            assert not reporter.closed
    assert reporter.closed
    assert sum(isinstance(event, RunFinished) for event in reporter.events) == 2


def test_clear_errors(slides_dir: Path, scattering: Model) -> None:
    with pytest.raises(PresetError, match="virchow2"):
        Model.from_preset("virchow-2")
    with pytest.raises(ConfigError, match="precision"):
        Model.from_preset("scattering", precision="fp7")
    with pytest.raises(ConfigError, match="device"):
        Model.from_preset("scattering", device="gpu0")
    with pytest.raises(ModelLevelError, match="patient-level"):
        scattering.embed_patient([slides_dir / "CMU-1-Small-Region.svs"])
    with pytest.raises(ValueError, match="patient-level"):
        scattering.embed_patients([])
    with pytest.raises(ConfigError, match="on_error"):
        scattering.embed_slides([], on_error="ignore")  # type: ignore[arg-type]


def test_torch_compiles_once(scattering: Model) -> None:
    compiled, plain = ExecutionOptions(torch_compile=True), ExecutionOptions()
    tiles = scattering._tile_embedder
    engine = tiles.select(compiled).engine
    assert tiles.select(compiled).engine is engine
    assert tiles.select(plain).engine is not engine


def test_random_weights_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    Model.from_preset("prost40m", weights="random", device="cpu")
    assert "mean nothing" in caplog.text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"requested_spacing_um": 1.0}, ["prost40m", "1 µm/px", "trained at 0.5"]),
        ({"requested_tile_size_px": 252}, ["prost40m", "252 px", "trained on 224"]),
        ({"requested_spacing_um": 0.53, "requested_tile_size_px": 98}, ["0.53 µm/px", "98 px"]),
    ],
)
def test_what_a_preset_was_not_trained_on_needs_permission(
    vit: Model, caplog: pytest.LogCaptureFixture, values: dict[str, Any], told: list[str]
) -> None:
    strict = Model.from_preset("prost40m", weights="random", device="cpu")
    with pytest.raises(ValueError, match="allow_non_recommended_settings=True") as refused:
        strict.resolve_preprocessing(PreprocessingConfig(**values))
    caplog.clear()
    resolved = vit.resolve_preprocessing(PreprocessingConfig(**values))
    assert all(getattr(resolved, key) == value for key, value in values.items())
    for word in told:
        assert word in str(refused.value) and word in caplog.text


def test_near_spacings_and_untrained_encoders_need_none(
    scattering: Model, caplog: pytest.LogCaptureFixture
) -> None:
    strict = Model.from_preset("prost40m", weights="random", device="cpu")
    caplog.clear()
    assert strict.resolve_preprocessing().requested_tile_size_px == 224
    for spacing in (0.475, 0.499, 0.525):
        strict.resolve_preprocessing(PreprocessingConfig(requested_spacing_um=spacing))
    scattering.resolve_preprocessing(PreprocessingConfig(requested_spacing_um=7, requested_tile_size_px=97))
    assert not caplog.records


# any model of timm -------------------------------------------------------------------------------

TINY = "timm:test_vit"  # of timm's own tests: 160 px, 64 dimensions


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """The model with the classifier that published weights come with."""
    torch.manual_seed(4)
    return timm.create_model("test_vit", num_classes=1000).eval()


def own_features(published: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return published.forward_head(published.forward_features(pixels), pre_logits=True)  # type: ignore[operator]


@pytest.mark.parametrize("name", [TINY, "timm:test_resnet"])
def test_any_model_of_timm_equals_the_reference(slides_dir: Path, name: str) -> None:
    model = Model.from_preset(name, weights="random", device="cpu")
    path = slides_dir / "CMU-1-Small-Region.svs"
    with pytest.raises(ValueError, match=r"requested_spacing_um.*--spacing"):
        model.embed_slide(path)
    found = model.embed_slide(path, PreprocessingConfig(requested_spacing_um=2.0))
    config = model.resolve_preprocessing(PreprocessingConfig(requested_spacing_um=2.0))
    assert config.requested_tile_size_px == model.recipe.transform.crop == 160
    assert found.tile_embeddings.shape == (found.num_tiles, model.feature_dim)
    expected = reference(model, path, config, found)
    assert cosines(found.tile_embeddings[: len(expected)], expected).min() >= MIN_COSINE
    other = PreprocessingConfig(requested_spacing_um=2.0, requested_tile_size_px=96)
    assert model.embed_slide(path, other).num_tiles > found.num_tiles


def test_transform_of_any_model_is_timms() -> None:
    recipe = load_recipe("timm:resnet50")
    assert recipe.transform.resize == recipe.transform.crop == recipe.tile_size_px == 224  # no crop_pct
    assert recipe.images is not None
    sizes = {"resize": recipe.images.resize, "crop": recipe.images.crop}
    found = recipe.transform.model_copy(update=sizes)
    steps = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model("resnet50")))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    ours = TorchPreparer(found, torch.device("cpu")).prepare(torch.from_numpy(np.array(picture))[None])
    assert ours.shape == (1, 3, 224, 224)
    grey_level = 1.01 / 255 / min(found.std)
    assert (ours[0] - steps(picture)).abs().max() <= grey_level


def test_weights_of_any_model_from_a_file(tmp_path: Path, published: torch.nn.Module) -> None:
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    model = Model.from_preset(TINY, weights=tmp_path, device="cpu")
    pixels = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(model.encoder(pixels), own_features(published, pixels), atol=1e-5, rtol=0)
    broken = {key: value for key, value in published.state_dict().items() if key != "norm.bias"}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match=r"missing: norm\.bias"):
        Model.from_preset(TINY, weights=tmp_path / "broken.safetensors", device="cpu")


def test_weights_of_any_model_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, published: torch.nn.Module
) -> None:
    """The hub is stood in for, timm's own loading is not."""
    asked = []

    def fetched(repo: str, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        asked.append(repo)
        return {key: value.clone() for key, value in published.state_dict().items()}

    config = dict(timm.create_model("test_vit").pretrained_cfg)
    described = ({**config, "hf_hub_id": "lab/tiny@abc", "mean": (0.7, 0.6, 0.7)}, "test_vit", {})
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetched)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: described)
    model = Model.from_preset("hf-hub:lab/tiny@abc", device="cpu")
    pixels = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(model.encoder(pixels), own_features(published, pixels), atol=1e-5, rtol=0)
    assert asked == ["lab/tiny@abc"]
    assert model.recipe.transform.mean == (0.7, 0.6, 0.7)
    assert model.identity()["weights_source"] == "lab/tiny@abc"


def test_models_that_timm_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PresetError, match="resnet50"):
        Model.from_preset("timm:resnet5O")
    with pytest.raises(PresetError, match="nope"):
        Model.from_preset("timm:resnet50.nope")
    with pytest.raises(PresetError, match=r"huggingface\.co"):
        Model.from_preset("hf-hub:nobody/nothing-at-all")
    with pytest.raises(WeightsError, match=r"timm:test_vit.*weights="):
        Model.from_preset(TINY, device="cpu")


def test_code_of_a_repository_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("uni")
    remote = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"family": "remote"})})
    monkeypatch.setattr("slide2vec.model.load_recipe", lambda _: remote)
    with pytest.raises(PresetError, match="trust_remote_code") as refused:
        Model.from_preset("uni", device="cpu")
    assert recipe.weights is not None
    assert recipe.weights.repo in str(refused.value) and recipe.weights.revision in str(refused.value)


@pytest.mark.parametrize("depth", ["shallow", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("fp16", torch.float16)])
def test_half_precision_stays_close(
    slides_dir: Path,
    request: pytest.FixtureRequest,
    precision: Literal["bf16", "fp16"],
    dtype: torch.dtype,
    depth: str,
) -> None:
    """bf16 keeps 8 bits of mantissa: the measured cosine of a ViT-S is above 0.9995. fp16 keeps 11,
    and its embeddings are fp16 unless asked otherwise."""
    model: Model = request.getfixturevalue(depth)
    path = slides_dir / "CMU-1-Small-Region.svs"
    config = PreprocessingConfig(requested_spacing_um=2.0)
    exact = model.embed_slide(path, config).tile_embeddings
    reduced = model.embed_slide(path, config, ExecutionOptions(precision=precision)).tile_embeddings
    assert reduced.dtype == dtype
    assert not torch.equal(exact.to(dtype), reduced), "computed in it, not only kept in it"
    assert cosines(exact, reduced.float()).min() > 0.9995


def test_decoding_on_a_gpu_needs_one(slides_dir: Path, scattering: Model) -> None:
    with pytest.raises(ConfigError, match="gpu_decode=True needs an NVIDIA GPU, and the model is on cpu"):
        scattering.embed_slide(slides_dir / "CMU-1-Small-Region.svs", PreprocessingConfig(gpu_decode=True))


def test_coordinates_of_a_previous_run_are_reused(
    slides_dir: Path, tmp_path: Path, scattering: Model
) -> None:
    path = slides_dir / "CMU-1-Small-Region.svs"
    config = PreprocessingConfig(requested_spacing_um=2.0, tissue_threshold=0.6)
    (outcome,) = scattering.iter_slides([path], config)
    assert outcome.tiling is not None and outcome.embedded is not None
    write_coordinates(tmp_path, outcome.tiling)
    again = scattering.embed_slide(
        path, PreprocessingConfig(requested_spacing_um=2.0, read_coordinates_from=tmp_path)
    )
    assert np.array_equal(again.x, outcome.embedded.x)
    assert torch.equal(again.tile_embeddings, outcome.embedded.tile_embeddings)
    with pytest.raises(SlideError, match="spacing"):
        scattering.embed_slide(
            path, PreprocessingConfig(requested_spacing_um=1.0, read_coordinates_from=tmp_path)
        )


#: What becomes of every shared slide at 0.5 µm/px without further settings: the number of tiles is
#: checked to be positive or zero, a refusal to say why and what to do.
SHARED = {
    "CMU-1-Small-Region.svs": "tiles",
    "aperio-jpeg-pyramid.svs": "tiles",
    "generic-jpeg-bigtiff-pyramid.tiff": "tiles",
    "generic-pyramid.ome.tiff": "tiles",
    "aperio-nompp-appmag40.svs": "any",
    "CMU-1-Small-Region.webp.tiff": r"spacing_at_level_0",
    "generic-lzw-pyramid.tiff": r"upsampled",
    "rationai-CMU-1-small.tiff": r"upsampled",
    "XYC-half-mpp.tiff": "any",
    "XYC-jpeg.ome.tiff": r"spacing_at_level_0",
    "XYC.png": r"XYC",
    "fluorescence-dapi.ndpi": "any",
    "camelyon-jpeg.dcm": r"spacing_at_level_0",
    "sm_image.dcm": "any",
}


@pytest.mark.parametrize("name", SHARED)
def test_every_shared_slide_is_embedded_or_refused(slides_dir: Path, scattering: Model, name: str) -> None:
    expected = SHARED[name]
    if expected in ("tiles", "any"):
        embedded = scattering.embed_slide(slides_dir / name)
        assert embedded.num_tiles == len(embedded.tile_embeddings)
        assert embedded.num_tiles > 0 or expected == "any"
        assert torch.isfinite(embedded.tile_embeddings).all()
    else:
        with pytest.raises(SlideError, match=expected) as caught:
            scattering.embed_slide(slides_dir / name)
        assert Path(name).stem in str(caught.value)


def test_no_shared_slide_is_left_out(slides_dir: Path) -> None:
    assert {path.name for path in slides_dir.iterdir()} - {"README.md"} == SHARED.keys()


def test_wrong_spacings_are_mended_by_the_caller(slides_dir: Path, scattering: Model) -> None:
    webp = scattering.embed_slide(slides_dir / "CMU-1-Small-Region.webp.tiff", spacing_at_level_0=0.499)
    assert webp.num_tiles > 0
    coarse = PreprocessingConfig(requested_spacing_um=28.97, requested_tile_size_px=64)
    dicom = scattering.embed_slide(slides_dir / "camelyon-jpeg.dcm", coarse, spacing_at_level_0=28.97)
    assert dicom.tile_size_lv0 == 64


def test_another_input_size(slides_dir: Path) -> None:
    """The encoder sees inputs of that size, and is itself the same."""
    model = Model.from_preset("prost40m", weights="random", device="cpu", input_size_px=112)
    assert model.identity()["input_size_px"] == 112 and model.recipe.gflops == pytest.approx(
        12.25 / 4, rel=0.01
    )
    seen: list[tuple[int, ...]] = []
    model.encoder.register_forward_pre_hook(lambda module, pixels: seen.append(tuple(pixels[0].shape[1:])))
    config = PreprocessingConfig(requested_spacing_um=0.5)
    found = model.embed_slide(slides_dir / "CMU-1-Small-Region.svs", config.updated(tissue_threshold=0.9))
    assert set(seen) == {(3, 112, 112)} and found.tile_embeddings.shape == (found.num_tiles, 384)
    other = Model.from_preset("prost40m", weights="random", device="cpu")
    pixels = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.encoder(pixels), other.encoder(pixels))


@pytest.mark.parametrize(
    ("preset", "size", "message"),
    [("prost40m", 100, "such as 98"), ("scattering", 16, "takes no inputs of 16 px")],
)
def test_impossible_input_sizes(preset: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Model.from_preset(preset, weights="random", device="cpu", input_size_px=size)


def test_methods_written_elsewhere_are_methods_of_model() -> None:
    public = {name: each for name, each in vars(Model).items() if name[0] != "_" and inspect.isfunction(each)}
    assert {"embed_slides", "embed_images", "aggregate_tiles", "attention_maps", "embed_patient"} <= {*public}
    for name, method in public.items():
        assert (method.__module__, method.__qualname__) == ("slide2vec.model", f"Model.{name}")
        first = next(iter(inspect.signature(method).parameters.values()))
        assert (first.name, first.annotation) == ("self", inspect.Parameter.empty) and method.__doc__
        assert pickle.loads(pickle.dumps(method)) is method


def test_an_embedded_slide_says_what_the_encoder_was_handed(generated_slide: Any, tmp_path: Path) -> None:
    slide = generated_slide(tmp_path / "s.svs", size_px=512, seed=0, levels=1)
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(requested_spacing_um=0.25, requested_tile_size_px=96, filtering={"a_t": 1})
    made = model.embed_slide(slide, config)
    recorded = model.identity(tile_size_px=96)
    assert made.encoder_input_size_px == recorded["input_size_px"] == 96
    assert made.transform == recorded["transform"] and made.transform["crop"] == 96
