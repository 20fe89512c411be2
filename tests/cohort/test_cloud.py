"""Pipelines whose output directory is a URL: the same files as in a folder, resumed, of every level."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_embeddings
from slide2vec.artifacts.tile_features import load_stored
from slide2vec.cohort import output_dir
from slide2vec.cohort.recorder import first_rows
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.errors import ConfigError, ManifestError, OutputError
from slide2vec.files import as_path
from slide2vec.manifests import read_manifest
from slide2vec.tiling import load_coordinates
from slide2vec.tiling.previous_files import recorded_slides

URL = "memory://bucket/run"
PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5, resume=True)


class Tiles(nn.Module):
    """The mean colour of a tile, as the 384 numbers of its preset; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.mean((2, 3)).repeat(1, 128)


class Slides(nn.Module):
    """The mean tile."""

    def forward(self, bag: TileBag) -> SlideFeatures:
        return SlideFeatures(embedding=bag.features.mean(0).repeat(2), latents=bag.features[:2].clone())


class SumOfSlides(nn.Module):
    """The sum of slides."""

    def forward(self, slides: torch.Tensor) -> torch.Tensor:
        return slides.sum(0)


@pytest.fixture(autouse=True)
def memory() -> MemoryFileSystem:
    """An empty memory://."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return MemoryFileSystem()


@pytest.fixture(scope="module")
def patient_model() -> Model:
    model = Model.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)
    assert model.upstream is not None and model.upstream.upstream is not None
    model.upstream.upstream._encoder = model._tile_embedder.encoder = Tiles()
    model.upstream._encoder = Slides()
    model._encoder = SumOfSlides()
    model.upstream.upstream.resolve_preprocessing(
        PREPROCESSING
    )  # tries one tile of another size, which counts
    seen(model)
    return model


@pytest.fixture(scope="module")
def slide_model(patient_model: Model) -> Model:
    assert patient_model.upstream is not None
    return patient_model.upstream


@pytest.fixture(scope="module")
def tile_model(slide_model: Model) -> Model:
    assert slide_model.upstream is not None
    return slide_model.upstream


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"s{n}.svs", size_px=768, seed=n, levels=1) for n in range(2)]


def run(
    model: Model,
    slides: list[Path],
    output_dir: str | Path = URL,
    execution: Any = None,
    **preprocessing: Any,
) -> RunResult:
    given = [{"sample_id": path.stem, "image_path": path, "patient_id": "p"} for path in slides]
    options = ExecutionOptions(output_dir=output_dir, **(execution or {}))  # type: ignore[arg-type]
    return Pipeline(model, PREPROCESSING.updated(**preprocessing), options).run(given)


def seen(model: Model) -> int:
    """Tiles that were embedded since the last question."""
    while model.upstream is not None:
        model = model.upstream
    encoder: Any = model._encoder
    count, encoder.seen = encoder.seen, 0
    return int(count)


def names(store: MemoryFileSystem, folder: str) -> list[str]:
    return [name.removeprefix(f"/bucket/run/{folder}/") for name in store.find(f"/bucket/run/{folder}")]


@pytest.mark.parametrize("file_format", ["pt", "npz", "safetensors", "h5"])
def test_tiles_in_every_format(
    tile_model: Model, slides: list[Path], tmp_path: Path, memory: MemoryFileSystem, file_format: str
) -> None:
    execution = {"output_format": file_format}
    here = run(tile_model, slides, tmp_path, execution)
    tiles = seen(tile_model)
    result = run(tile_model, slides, URL, execution)
    assert tiles > 0 and seen(tile_model) == tiles and not result.failed
    for there, local in zip(result.tile_artifacts, here.tile_artifacts, strict=True):
        assert str(there.path) == f"{URL}/tile_embeddings/{there.sample_id}.{file_format}"
        assert torch.equal(load_embeddings(there.path), load_embeddings(local.path))
        recorded, expected = there.metadata, local.metadata
        assert recorded["coordinates_npz_path"] == f"{URL}/tiles/{there.sample_id}.coordinates.npz"
        assert recorded["compatibility"] == expected["compatibility"]
        assert recorded["num_tiles"] == expected["num_tiles"]
        assert load_stored(there).coords.tolist() == load_stored(local).coords.tolist()  # type: ignore[union-attr]
    expected_names = sorted(f"s{n}.{end}" for n in range(2) for end in ("meta.json", file_format))
    assert names(memory, "tile_embeddings") == expected_names
    again = run(tile_model, slides, URL, execution)
    assert again.resumed == 2 and seen(tile_model) == 0
    assert [a.path for a in again.tile_artifacts] == [a.path for a in result.tile_artifacts]


def test_the_books(tile_model: Model, slides: list[Path], memory: MemoryFileSystem) -> None:
    previews = {"save_mask_preview": True, "save_tiling_preview": True}
    result = run(tile_model, slides, preview=previews, save_tiles=True)
    rows = list(csv.DictReader(io.StringIO(memory.cat("/bucket/run/process_list.csv").decode())))
    assert [row["feature_path"] for row in rows] == [str(a.path) for a in result.tile_artifacts]
    assert rows[0]["tiles_tar_path"] == f"{URL}/tiles/s0.tiles.tar"
    assert rows[1]["mask_preview_path"] == f"{URL}/preview/mask/s1.jpg"
    assert names(memory, "preview") == ["mask/s0.jpg", "mask/s1.jpg", "tiling/s0.jpg", "tiling/s1.jpg"]
    assert memory.cat("/bucket/run/preview/mask/s0.jpg")[:2] == b"\xff\xd8"  # JPEG
    assert len(names(memory, "tiles")) == 10  # arrays, metadata, archive, manifest and source of each
    assert memory.cat("/bucket/run/config.yaml").decode().splitlines()[1] == f"output_dir: {URL}"
    (log,) = names(memory, "logs")
    assert "slide s1: " in memory.cat(f"/bucket/run/logs/{log}").decode()
    assert not memory.exists("/bucket/run/.slide2vec.lock")


def test_other_settings_are_embedded_anew(tile_model: Model, slides: list[Path]) -> None:
    run(tile_model, slides)
    assert seen(tile_model) > 0
    with pytest.raises(ConfigError, match=r"tissue_threshold 0\.01, not 0\.2"):
        run(tile_model, slides, tissue_threshold=0.2)
    again = run(tile_model, slides, URL, {"output_dtype": "fp16"})
    assert again.resumed == 0 and again.recomputed == {"output_dtype": 2} and seen(tile_model)


def test_half_of_a_run(tile_model: Model, slides: list[Path]) -> None:
    run(tile_model, slides)
    tiles = seen(tile_model)
    as_path(f"{URL}/tile_embeddings/s1.meta.json").unlink()
    again = run(tile_model, slides)
    assert again.resumed == 1 and 0 < seen(tile_model) < tiles and len(again.tile_artifacts) == 2


def test_slides_and_their_tiles(slide_model: Model, slides: list[Path], tmp_path: Path) -> None:
    execution = {"save_tile_embeddings": True, "save_latents": True}
    here, there = (run(slide_model, slides, place, execution) for place in (tmp_path, URL))
    for local, artifact in zip(here.slide_artifacts, there.slide_artifacts, strict=True):
        assert torch.equal(load_embeddings(artifact.path), load_embeddings(local.path))
        assert artifact.latent_path is not None and local.latent_path is not None
        assert torch.equal(load_embeddings(artifact.latent_path), load_embeddings(local.latent_path))
    seen(slide_model)
    assert run(slide_model, slides, URL, execution).resumed == 2 and seen(slide_model) == 0
    as_path(f"{URL}/slide_embeddings/s0.meta.json").unlink()
    again = run(slide_model, slides, URL, execution)  # from its tiles
    assert again.resumed == 1 and len(again.slide_artifacts) == 2 and seen(slide_model) == 0


def test_patients(patient_model: Model, slides: list[Path], tmp_path: Path) -> None:
    execution = {"save_slide_embeddings": True}
    here, there = (run(patient_model, slides, place, execution) for place in (tmp_path, URL))
    (local,), (artifact,) = here.patient_artifacts, there.patient_artifacts
    assert str(artifact.path) == f"{URL}/patient_embeddings/p.pt" and artifact.num_slides == 2
    assert torch.equal(load_embeddings(artifact.path), load_embeddings(local.path))
    seen(patient_model)
    assert run(patient_model, slides, URL, execution).resumed == 2 and seen(patient_model) == 0


def test_tiles_are_aggregated_from_and_to_urls(
    tile_model: Model, slide_model: Model, slides: list[Path]
) -> None:
    tiles = run(tile_model, slides).tile_artifacts
    execution = ExecutionOptions(output_dir="memory://bucket/other")  # type: ignore[arg-type]
    given: Callable[..., Any] = slide_model.aggregate_tiles
    for which in (tiles, [str(artifact.path) for artifact in tiles]):
        made = given(which, execution=execution)
        assert str(made[0].path) == "memory://bucket/other/slide_embeddings/s0.pt"
        expected = load_embeddings(tiles[0].path).mean(0).repeat(2)
        torch.testing.assert_close(load_embeddings(made[0].path), expected)


@pytest.mark.parametrize("lost", ["s1.pt", "s1.meta.json"])
def test_a_failed_upload_leaves_no_sidecar(
    tile_model: Model,
    slides: list[Path],
    memory: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    """Features before, the sidecar last: what has a sidecar is whole."""
    run(tile_model, slides)
    put_file = MemoryFileSystem.put_file

    def put(fs: MemoryFileSystem, lpath: str, rpath: str, **options: Any) -> None:
        if rpath.endswith(f"tile_embeddings/{lost}"):
            raise ConnectionResetError(104, "Connection reset by peer")
        put_file(fs, lpath, rpath, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", put)
        with pytest.raises(OutputError, match=rf"{lost} cannot be written: Connection reset.*resume"):
            run(tile_model, slides, resume=False)
    assert not memory.exists("/bucket/run/tile_embeddings/s1.meta.json")
    assert memory.exists("/bucket/run/tile_embeddings/s1.pt")
    assert any("Connection reset" in as_path(f"{URL}/logs/{n}").read_text() for n in names(memory, "logs"))
    assert run(tile_model, slides).resumed == 1


def test_shards_are_merged(tile_model: Model, slides: list[Path], memory: MemoryFileSystem) -> None:
    whole = run(tile_model, slides, "memory://bucket/whole").tile_artifacts
    for shard in ("1/2", "2/2"):
        assert len(run(tile_model, slides, URL, {"shard": shard}).tile_artifacts) == 1
    merged = merge_shards(as_path(URL))
    assert merged.complete and [name for name, _ in merged.found.rows] == ["s0", "s1"]
    assert not [name for name in memory.find("/bucket/run") if "shard-" in name and not name.endswith(".log")]
    for one in whole:
        there = load_embeddings(f"{URL}/tile_embeddings/{one.path.name}")
        assert torch.equal(there, load_embeddings(one.path))


def test_shards_of_two_encoders_that_begin_together(
    tile_model: Model, slides: list[Path], memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    nested: list[RunResult] = []

    def begin(*args: Any) -> Any:
        if not nested:
            monkeypatch.undo()
            nested.append(run(other, slides, URL, {"shard": "2/2"}))
        return first_rows(*args)

    monkeypatch.setattr(output_dir, "first_rows", begin)
    run(tile_model, slides, URL, {"shard": "1/2"})
    run(tile_model, slides, URL, {"shard": "2/2"})
    run(other, slides, URL, {"shard": "1/2"})
    assert merge_shards(as_path(URL)).complete
    for folder in ("tile_embeddings", "encoders/scattering/tile_embeddings"):
        assert [name for name in names(memory, folder) if name.endswith(".pt")] == ["s0.pt", "s1.pt"]
    assert not [name for name in memory.find("/bucket/run") if ".slide2vec." in name]


def test_coordinates_behind_a_url(tile_model: Model, slides: list[Path], tmp_path: Path) -> None:
    first = run(tile_model, slides)
    directory = as_path(URL)
    assert [slide.sample_id for slide in recorded_slides(directory)] == ["s0", "s1"]
    assert len(load_coordinates(directory / "tiles", "s0")) == first.tile_artifacts[0].num_tiles
    pipeline = Pipeline(tile_model, PREPROCESSING, ExecutionOptions(output_dir=tmp_path))
    again = pipeline.run_with_coordinates(URL)
    for old, new in zip(first.tile_artifacts, again.tile_artifacts, strict=True):
        assert torch.equal(load_embeddings(old.path), load_embeddings(new.path))
        assert new.metadata["coordinates_meta_path"] == f"{URL}/tiles/{new.sample_id}.coordinates.meta.json"


def test_manifests_behind_urls(tile_model: Model, slides: list[Path], memory: MemoryFileSystem) -> None:
    text = "sample_id,image_path\n" + "".join(f"{path.stem},{path}\n" for path in slides)
    memory.pipe_file("/bucket/slides.csv", text.encode())
    assert [slide.image_path for slide in read_manifest("memory://bucket/slides.csv")] == slides
    pipeline = Pipeline(tile_model, PREPROCESSING, ExecutionOptions(output_dir=URL))  # type: ignore[arg-type]
    assert len(pipeline.run(manifest_path="memory://bucket/slides.csv").tile_artifacts) == 2
    assert memory.cat("/bucket/run/config.yaml").startswith(b"csv: memory://bucket/slides.csv\n")
    with pytest.raises(ManifestError, match=r"memory://bucket/no\.csv cannot be read"):
        read_manifest("memory://bucket/no.csv")
    with pytest.raises(ManifestError, match="names no bucket"):
        read_manifest("s3://")
    memory.pipe_file("/bucket/wrong.csv", b"sample_id,image_path\na,s3:///a.svs\n")
    with pytest.raises(ManifestError, match=r"line 2: image_path: s3:///a\.svs names no bucket"):
        read_manifest("memory://bucket/wrong.csv")


def test_what_is_refused(tile_model: Model, slides: list[Path]) -> None:
    for given, told in [
        ("s3://", "ExecutionOptions.output_dir: s3:// names no bucket"),
        ("https://a/b", "web"),
    ]:
        with pytest.raises(ConfigError, match=told):
            ExecutionOptions(output_dir=given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="behind a URL"):
        PreprocessingConfig(read_tiles_from=URL)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"on_the_fly=False reads tiles from archives in {URL}"):
        run(tile_model, slides, on_the_fly=False)
