"""`Model.aggregate_tiles`: over our tile embeddings and over those that other tools wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig, TileFeatures
from slide2vec.artifacts import load_embeddings, load_stored
from slide2vec.errors import ArtifactError, ManifestError, ModelLevelError
from slide2vec.tiling import load_coordinates

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
#: Fused and plain attention of the encoders in fp32, on values of about 1.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def embedded(slide_model: Model, slides: list[Path]) -> list[EmbeddedSlide]:
    return slide_model.embed_slides(slides, PREPROCESSING)


@pytest.fixture(scope="module")
def run(slide_model: Model, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tile embeddings of all slides."""
    folder = tmp_path_factory.mktemp("run")
    slide_model.embed_tiles(
        slides, preprocessing=PREPROCESSING, execution=ExecutionOptions(output_dir=folder)
    )
    return folder


def check(path: Path, expected: EmbeddedSlide) -> None:
    assert expected.slide_embedding is not None
    assert torch.allclose(load_embeddings(path), expected.slide_embedding, atol=ROUNDING)


def test_our_own(
    slide_model: Model, embedded: list[EmbeddedSlide], slides: list[Path], tmp_path: Path
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    tiles = slide_model.embed_tiles(slides, preprocessing=PREPROCESSING, execution=execution)
    assert [a.metadata["encoder_name"] for a in tiles] == ["lunit"] * 3
    made = slide_model.aggregate_tiles(tiles, execution=execution)
    for artifact, expected in zip(made, embedded, strict=True):
        check(artifact.path, expected)
        assert artifact.metadata["encoder_name"] == "moozy-slide"
        assert artifact.metadata["requested_tile_size_px"] == 64  # as 7.1.4 has it there
    # a run that resumes takes them for its own
    config = PREPROCESSING.updated(resume=True)
    again = Pipeline(slide_model, config, execution).run(slides)
    assert (again.resumed, again.recomputed) == (3, {})


def test_of_a_run_that_was_moved(
    slide_model: Model, embedded: list[EmbeddedSlide], run: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    for meta in (moved / "tile_embeddings").glob("*.meta.json"):
        meta.write_text(meta.read_text().replace(str(run), "/gone"))
    (artifact,) = slide_model.aggregate_tiles(
        [moved / "tile_embeddings/s1.pt"], execution=ExecutionOptions(output_dir=tmp_path)
    )
    check(artifact.path, embedded[1])


def test_tiles_laid_anew_since_are_refused(slide_model: Model, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    meta = moved / "tile_embeddings/s1.meta.json"
    meta.write_text(meta.read_text().replace('"tile_size_lv0": 128', '"tile_size_lv0": 129'))
    with pytest.raises(ArtifactError, match=r"slide s1: .*tile_size_lv0 129, .*embed it again"):
        slide_model.aggregate_tiles(
            [moved / "tile_embeddings/s1.pt"], execution=ExecutionOptions(output_dir=tmp_path)
        )


def write_h5(path: Path, features: Any, coords: Any, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        if features is not None:
            file["features"] = features
        file["coords"] = coords
        file["coords"].attrs.update(attributes)
    return path


@pytest.mark.parametrize("tool", ["trident", "clam", "clam pt", "npz", "hs2p", "given"])
def test_of_other_tools(
    slide_model: Model, embedded: list[EmbeddedSlide], run: Path, tmp_path: Path, tool: str
) -> None:
    """A slide of 0.25 µm/px in tiles of 64 px at 0.5: 128 px at level 0."""
    one = embedded[2]
    features, coords = one.tile_embeddings.numpy(), np.stack([one.x, one.y], 1)
    given: TileFeatures | Path
    match tool:
        case "trident":
            given = write_h5(tmp_path / "x.h5", features[None], coords, patch_size=64, patch_size_level0=128)
        case "clam":
            attributes: dict[str, Any] = {
                "patch_size": 128,
                "patch_level": 0,
                "downsample": np.array([1.0, 1.0]),
            }
            where = write_h5(tmp_path / "patches.h5", None, coords, **attributes)
            given = TileFeatures(path=write_h5(tmp_path / "x.h5", features, coords), coords_path=where)
        case "clam pt":
            torch.save(one.tile_embeddings, tmp_path / "x.pt")
            where = write_h5(
                tmp_path / "patches.h5", None, coords, patch_size=64, downsample=np.array([2.0, 2.0])
            )
            given = TileFeatures(path=tmp_path / "x.pt", coords_path=where)
        case "npz":
            np.savez(tmp_path / "x.npz", features=features)
            given = TileFeatures(path=tmp_path / "x.npz", coords_path=run / "tiles/s2.coordinates.npz")
        case "hs2p":
            torch.save(one.tile_embeddings, tmp_path / "x.pt")
            given = TileFeatures(path=tmp_path / "x.pt", coords_path=run / "tiles/s2.coordinates.npz")
        case _:
            given = TileFeatures(path=write_h5(tmp_path / "x.h5", features, coords), tile_size_lv0=128)
    (artifact,) = slide_model.aggregate_tiles(
        [given], execution=ExecutionOptions(output_dir=tmp_path / "out")
    )
    assert artifact.path.stem == "x"
    check(artifact.path, one)


def test_what_is_not_enough(slide_model: Model, embedded: list[EmbeddedSlide], tmp_path: Path) -> None:
    one, execution = embedded[0], ExecutionOptions(output_dir=tmp_path / "out")
    coords = np.stack([one.x, one.y], 1)
    torch.save(one.tile_embeddings, tmp_path / "a.pt")
    torch.save(one.tile_embeddings[:, :100].clone(), tmp_path / "b.pt")
    sizeless = write_h5(tmp_path / "c.h5", one.tile_embeddings.numpy(), coords)
    short = write_h5(tmp_path / "d.h5", one.tile_embeddings.numpy(), coords[1:], patch_size_level0=128)
    for path, problem in (
        (tmp_path / "a.pt", "slide a: .*where its tiles are: give TileFeatures.*coords_path"),
        (tmp_path / "b.pt", "slide b: .*of lunit, of 384 dimensions, are needed"),
        (sizeless, "slide c: .*how large its tiles are: give TileFeatures.*tile_size_lv0"),
        (short, "slide d: .*not of the same tiles"),
    ):
        with pytest.raises(ArtifactError, match=problem):
            slide_model.aggregate_tiles([path], execution=execution)
    with pytest.raises(ManifestError, match="appears twice"):
        slide_model.aggregate_tiles([TileFeatures(path=sizeless, tile_size_lv0=128)] * 2, execution=execution)


def test_tiles_of_another_encoder_are_refused(
    slide_model: Model, tile_model: Model, slides: list[Path], tmp_path: Path
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    tiles = tile_model.embed_tiles(slides[:1], preprocessing=PREPROCESSING, execution=execution)
    with pytest.raises(ArtifactError, match=r"slide s0: .*tile embeddings of scattering; those of lunit"):
        slide_model.aggregate_tiles(tiles, execution=execution)
    with pytest.raises(ModelLevelError, match="top_tissue"):
        tile_model.aggregate_tiles(tiles, execution=execution)


def test_patients(patient_model: Model, run: Path, slides: list[Path], tmp_path: Path) -> None:
    expected = patient_model.embed_patients(slides, {"s0": "p", "s2": "p"}, preprocessing=PREPROCESSING)
    execution = ExecutionOptions(output_dir=tmp_path, save_slide_embeddings=True)
    given = [TileFeatures(path=run / f"tile_embeddings/s{n}.pt", patient_id="q") for n in range(3)]
    made = patient_model.aggregate_tiles(
        given, execution=execution, patient_id_map={"s0": "p", "s1": "s1", "s2": "p"}
    )
    assert [(a.patient_id, a.num_slides) for a in made] == [("p", 2), ("s1", 1)]
    for artifact, patient in zip(made, expected, strict=True):
        assert patient.patient_embedding is not None
        assert torch.allclose(load_embeddings(artifact.path), patient.patient_embedding, atol=ROUNDING)
    assert sorted(path.name for path in (tmp_path / "slide_embeddings").glob("*.pt")) == [
        "s0.pt",
        "s1.pt",
        "s2.pt",
    ]
    (one,) = patient_model.aggregate_tiles(given, execution=execution)
    assert (one.patient_id, one.num_slides) == ("q", 3)


# without weights ----------------------------------------------------------------------------------


def test_aggregators_against_plain_ones(slide_model: Model, run: Path, tmp_path: Path) -> None:
    execution = ExecutionOptions(output_dir=tmp_path)
    path = run / "tile_embeddings/s2.pt"
    tiles = torch.load(path, weights_only=True)
    fractions = load_coordinates(run / "tiles", "s2").tissue_fractions
    ranked = sorted(fractions.tolist(), reverse=True)
    least = ranked[-(-len(ranked) // 4) - 1]
    top = [tile for tile, fraction in zip(tiles, fractions.tolist(), strict=True) if fraction >= least]
    assert 0 < len(top) < len(tiles)
    expected = {"mean": tiles.mean(0), "max": tiles.max(0).values, "top_tissue": torch.stack(top).mean(0)}
    for aggregator, values in expected.items():
        (artifact,) = slide_model.aggregate_tiles([path], execution=execution, aggregator=aggregator)  # type: ignore[arg-type]
        assert torch.allclose(load_embeddings(artifact.path), values)
        assert artifact.metadata["aggregator"] == aggregator


def test_stored_tiles_of_the_original(run: Path, tmp_path: Path) -> None:
    """Its sidecars have no schema_version, and other keys besides."""
    folder = tmp_path / "tile_embeddings"
    folder.mkdir()
    shutil.copy(run / "tile_embeddings/s0.pt", folder / "s0.pt")
    meta = (
        '{"sample_id": "s0", "artifact_type": "tile_embeddings", "format": "pt", "feature_dim": 384, '
        f'"encoder_name": "lunit", "coordinates_meta_path": "{run}/tiles/s0.coordinates.meta.json"}}'
    )
    (folder / "s0.meta.json").write_text(meta)
    found = load_stored(folder / "s0.pt")
    assert found.coords is not None and len(found.coords) == len(found.features)
    assert found.tile_size_lv0 == 128 and found.tissue_fractions is not None


def test_tiles_with_other_statistics_are_refused(
    slide_model: Model, run: Path, slides: list[Path], tmp_path: Path
) -> None:
    """The preset of the tiles by itself may have others than the authors of the slide encoder fed it with."""
    moved = shutil.copytree(run, tmp_path / "moved")
    for meta in (moved / "tile_embeddings").glob("*.meta.json"):
        content = json.loads(meta.read_text())
        content["compatibility"]["encoder"]["transform"]["mean"] = [0.7, 0.6, 0.7]
        meta.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"slide s1: .*normalised with mean and std .*0\.7, 0\.6, 0\.7"):
        slide_model.aggregate_tiles(
            [moved / "tile_embeddings/s1.pt"], execution=ExecutionOptions(output_dir=tmp_path)
        )
