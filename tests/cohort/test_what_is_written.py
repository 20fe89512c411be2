"""NaN, unwritable files and errors that are not ours: each is its slide's, and is told with a remedy."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_embeddings, load_stored
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.errors import ArtifactError, NotFiniteError, OutputError, PatientError, SlideError

CONFIG = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=64, filtering={"a_t": 0})


class Tiles(nn.Module):
    """The mean colour of a tile, as the 384 numbers of its preset; `spoil` has its way with them."""

    def __init__(self) -> None:
        super().__init__()
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda features: features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.spoil(pixels.mean((2, 3)).repeat(1, 128))


class Slides(nn.Module):
    """The mean tile."""

    value = latent = 0.0

    def forward(self, bag: TileBag) -> SlideFeatures:
        embedding = bag.features.mean(0).repeat(2) + self.value
        return SlideFeatures(embedding=embedding, latents=bag.features[:2] + self.latent)


class SumOfSlides(nn.Module):
    """The sum of slides."""

    value = 0.0

    def forward(self, slides: torch.Tensor) -> torch.Tensor:
        return slides.sum(0) + self.value


@pytest.fixture(scope="module")
def moozy() -> Model:
    return Model.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)


@pytest.fixture
def patient_model(moozy: Model) -> Model:
    model = moozy
    assert model.upstream is not None and model.upstream.upstream is not None
    model.upstream.upstream._encoder, model.upstream._encoder, model._encoder = (
        Tiles(),
        Slides(),
        SumOfSlides(),
    )
    model._tile_embedder.encoder = model.upstream.upstream._encoder
    model._tile_embedder._engines.clear()  # those of the encoder before
    return model


@pytest.fixture
def slide_model(patient_model: Model) -> Model:
    assert patient_model.upstream is not None
    return patient_model.upstream


@pytest.fixture
def tile_model(slide_model: Model) -> Model:
    assert slide_model.upstream is not None
    return slide_model.upstream


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"{n}.svs", size_px=768, seed=n, levels=1) for n in range(2)]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunResult]:
    def run(model: Model, given: Any, **options: Any) -> RunResult:
        return Pipeline(model, CONFIG, ExecutionOptions(output_dir=tmp_path, **options)).run(given)

    return run


def of_patients(slides: list[Path]) -> list[dict[str, Any]]:
    return [{"image_path": path, "patient_id": path.stem} for path in slides]


# NaN and infinities -----------------------------------------------------------------------------------


def some(value: float, first: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put a value into the embeddings of tiles whose first number is that large."""

    def spoil(features: torch.Tensor) -> torch.Tensor:
        features = features.clone()
        features[features[:, 0] >= first, 7] = value
        return features

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tile_is_named(tile_model: Model, slides: list[Path], value: float) -> None:
    good = tile_model.embed_slide(slides[0], CONFIG)
    darkest = float(good.tile_embeddings[:, 0].median())
    encoder: Any = tile_model.encoder
    encoder.spoil = some(value, darkest)
    wrong = (good.tile_embeddings[:, 0] >= darkest).nonzero()[:, 0]
    assert 0 < len(wrong) < len(good.x)
    with pytest.raises(NotFiniteError) as raised:
        tile_model.embed_slide(slides[0], CONFIG)
    first, count = int(wrong[0]), f"{len(wrong)} of {len(good.x)} tiles"
    assert str(raised.value) == (
        f"slide 0: the embeddings of {count} hold NaN or infinities, the first that of tile {first} at "
        f"level-0 px ({good.x[first]}, {good.y[first]}); PyTorch computed them in fp32: check its weights: "
        "numbers do not go further than fp32's"
    )


def test_a_slide_of_nan_fails_alone(
    tile_model: Model, slides: list[Path], run: Callable[..., RunResult], tmp_path: Path
) -> None:
    good = tile_model.embed_slides(slides, CONFIG)
    most = [float(slide.tile_embeddings[:, 0].max()) for slide in good]
    worse = max(range(2), key=most.__getitem__)
    encoder: Any = tile_model.encoder
    encoder.spoil = some(float("nan"), (most[0] + most[1]) / 2)
    result = run(tile_model, slides, precision="bf16")
    assert [item.sample_id for item in result.failed] == [str(worse)]
    assert isinstance(result.failed[0].error, NotFiniteError) and result.failed[0].stage == "embedding"
    assert 'in bf16: use precision="fp32"' in str(result.failed[0].error)
    assert len(result.tile_artifacts) == 1 and not (tmp_path / f"tile_embeddings/{worse}.pt").exists()


def test_what_overflows_only_as_float16(tile_model: Model, slides: list[Path]) -> None:
    encoder: Any = tile_model.encoder
    encoder.spoil = lambda features: features + 1e5
    assert tile_model.embed_slide(slides[0], CONFIG).tile_embeddings.isfinite().all()
    with pytest.raises(NotFiniteError, match=r'as float16 they overflow: use output_dtype="fp32"'):
        tile_model.embed_slide(slides[0], CONFIG, ExecutionOptions(output_dtype="fp16"))


def test_regions(tile_model: Model, slides: list[Path]) -> None:
    encoder: Any = tile_model.encoder
    encoder.spoil = some(float("nan"), -1e9)
    with pytest.raises(NotFiniteError, match="the first that of tile 0 at level-0 px"):
        tile_model.embed_slide(slides[0], CONFIG.updated(region_tile_multiple=2))


@pytest.mark.parametrize("part", ["value", "latent"])
def test_embeddings_of_slides(
    slide_model: Model, slides: list[Path], run: Callable[..., RunResult], part: str
) -> None:
    encoder: Any = slide_model.encoder
    setattr(encoder, part, float("nan"))
    execution = ExecutionOptions(save_latents=True)
    with pytest.raises(NotFiniteError, match=r"slide 0: the (embedding|latents) that the slide encoder"):
        slide_model.embed_slide(slides[0], CONFIG, execution)
    result = run(slide_model, slides, save_latents=True)
    assert [item.stage for item in result.failed] == ["aggregation"] * 2 and not result.slide_artifacts


def test_embeddings_of_slides_that_overflow_on_disk(
    slide_model: Model, slides: list[Path], run: Callable[..., RunResult]
) -> None:
    encoder: Any = slide_model.encoder
    encoder.value = 1e5
    result = run(slide_model, slides, output_dtype="fp16")
    assert [item.sample_id for item in result.failed] == ["0", "1"]
    assert "as fp16, hold NaN or infinities" in str(result.failed[0].error)
    assert len(run(slide_model, slides).slide_artifacts) == 2


def test_embeddings_of_patients(
    patient_model: Model, slides: list[Path], run: Callable[..., RunResult]
) -> None:
    encoder: Any = patient_model.encoder
    encoder.value = float("inf")
    with pytest.raises(PatientError, match="the patient encoder moozy gives NaN or infinities"):
        patient_model.embed_patient(slides, "p", preprocessing=CONFIG)
    result = run(patient_model, of_patients(slides))
    assert [item.patient_id for item in result.failed_patients] == ["0", "1"]
    assert not result.patient_artifacts


def test_stored_embeddings_of_nan_are_not_aggregated(tmp_path: Path) -> None:
    values = torch.ones(5, 3)
    values[3, 1] = float("nan")
    torch.save(values, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match=r"slide a: 1 of the 5 embeddings in .* the first that of tile 3"):
        load_stored(tmp_path / "a.pt")


# files that cannot be written -------------------------------------------------------------------------


def test_a_folder_in_the_place_of_a_file_is_the_slides_failure(
    tile_model: Model, slides: list[Path], run: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "tile_embeddings/0.pt/in the way").mkdir(parents=True)
    result = run(tile_model, slides)
    assert [item.sample_id for item in result.failed] == ["0"] and len(result.tile_artifacts) == 1
    assert "0.pt cannot be written: Is a directory" in str(result.failed[0].error)


def test_a_folder_in_the_place_of_coordinates_and_of_a_patient(
    patient_model: Model, slides: list[Path], run: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "tiles/0.coordinates.npz/in the way").mkdir(parents=True)
    (tmp_path / "patient_embeddings/1.pt/in the way").mkdir(parents=True)
    result = run(patient_model, of_patients(slides))
    assert [item.sample_id for item in result.failed] == ["0"]
    assert {item.patient_id for item in result.failed_patients} == {"0", "1"}


def test_an_output_directory_that_is_gone_ends_the_run(
    tile_model: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slide2vec.cohort.context import Cohort

    cohort = Cohort(
        tile_model.resolve_preprocessing(CONFIG), ExecutionOptions(output_dir=tmp_path / "x"), tile_model
    )
    gone = OutputError.of("x/a.pt", FileNotFoundError(2, "No such file or directory"))
    assert cohort.is_of_the_run(gone)
    (tmp_path / "x").mkdir()
    assert not cohort.is_of_the_run(gone)
    assert cohort.is_of_the_run(OutputError.of("x/a.pt", OSError(28, "No space left on device")))


# errors that are not ours -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["embed", "tile"])
def test_a_bare_error_names_the_slide_and_what_was_being_done(
    tile_model: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from slide2vec.cohort import tile_cohort
    from slide2vec.slides import as_slides
    from slide2vec.stream import plan

    tile = plan.tile_slide

    def divide(reader: Any, slide: Any, *rest: Any) -> Any:
        return tile(reader, slide, *rest) if slide.sample_id == "1" else 1 // 0

    monkeypatch.setattr(plan, "tile_slide", divide)
    execution = ExecutionOptions(output_dir=tmp_path)
    if command == "embed":
        result = Pipeline(tile_model, CONFIG, execution).run(slides)
    else:
        result = tile_cohort(as_slides(slides), tile_model.resolve_preprocessing(CONFIG), execution)
    (failed,) = result.failed
    assert type(failed.error) is SlideError and isinstance(failed.error.__cause__, ZeroDivisionError)
    assert str(failed.error).startswith(
        "slide 0: finding its tiles failed: ZeroDivisionError: integer division"
    )
    with result.process_list_path.open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["sample_id"] == "0")
    assert "ZeroDivisionError" in row["traceback"] and "in divide" in row["traceback"]


def test_finite_embeddings_are_as_before(tile_model: Model, slides: list[Path], tmp_path: Path) -> None:
    (artifact,) = tile_model.embed_tiles(
        slides[:1], preprocessing=CONFIG, execution=ExecutionOptions(output_dir=tmp_path)
    )
    expected = tile_model.embed_slide(slides[0], CONFIG).tile_embeddings
    assert torch.equal(load_embeddings(artifact.path), expected)
