"""Slides sampled by class: an embedding of each class, in memory and on disk."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slide2vec import (
    BagDataset,
    EmbeddedSlide,
    ExecutionOptions,
    Model,
    Models,
    Pipeline,
    PreprocessingConfig,
    RunResult,
)
from slide2vec.artifacts import find_tile_artifact, load_embeddings, tile_artifacts
from slide2vec.artifacts.export import export_run
from slide2vec.artifacts.geojson_export import export_areas
from slide2vec.artifacts.places import owners
from slide2vec.cohort import tile_cohort
from slide2vec.cohort.process_list import key_of, read_process_list
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.errors import ArtifactError, ConfigError, ManifestError, MaskError
from slide2vec.manifests import by_class
from slide2vec.report.slide_facts import ReportedRun
from slide2vec.report.slide_images import draw_images
from slide2vec.search import draw_sheet, searched_run
from slide2vec.slides import Slide
from slide2vec.tiling import load_coordinates
from slide2vec.viewer.viewed_run import ViewedRun

MASKS: dict[str, Any] = {
    "pixel_mapping": {"background": 0, "tumor": 1, "tissue": 2, "stroma": 3},
    "min_coverage": {"tumor": 0.3, "tissue": 0.5},
}
CONFIG = PreprocessingConfig(requested_tile_size_px=64, filtering={"a_t": 0}, masks=MASKS, resume=True)
BAGS = [("s0", "tumor"), ("s0", "tissue"), ("s1", "tumor"), ("s1", "tissue")]


@pytest.fixture(scope="module")
def given(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Slide]:
    """Two slides with masks; the second has no pixel of "tissue"."""
    folder = tmp_path_factory.mktemp("masks")
    found = []
    for number, path in enumerate(slides[:2]):
        mask = np.zeros((192, 192), np.uint8)
        mask[20:110, 20:110] = 1
        mask[80:170, 60:180] = 3 if number else 2
        Image.fromarray(mask).save(folder / f"{number}.png")
        found.append(Slide(sample_id=f"s{number}", image_path=path, mask_path=folder / f"{number}.png"))
    return found


@pytest.fixture(scope="module")
def in_memory(model: Model, given: list[Slide]) -> list[EmbeddedSlide]:
    return model.embed_slides(given, CONFIG)


@pytest.fixture(scope="module")
def whole(
    model: Model, given: list[Slide], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunResult]:
    """A run; not to be changed."""
    out = tmp_path_factory.mktemp("classes") / "out"
    return out, run(model, given, out, CONFIG.updated(preview={"save_mask_preview": True}))


def run(
    model: Model | Models,
    given: Sequence[Slide],
    out: Path,
    config: PreprocessingConfig = CONFIG,
    **options: Any,
) -> RunResult:
    return Pipeline(model, config, ExecutionOptions(output_dir=out, **options)).run(given)


def bags(embedded: Sequence[EmbeddedSlide]) -> list[tuple[str, str | None]]:
    return [(each.sample_id, each.annotation) for each in embedded]


# in memory -----------------------------------------------------------------------------------------


def test_a_result_for_each_class_of_each_slide_in_order(
    model: Model, given: list[Slide], in_memory: list[EmbeddedSlide]
) -> None:
    assert bags(in_memory) == BAGS
    counts = [each.num_tiles for each in in_memory]
    assert counts[0] > 10 and counts[1] > 10 and counts[2] > 10 and counts[3] == 0
    only = model.embed_slides(given, CONFIG, annotations=["tissue", "tumor"])
    assert bags(only) == [("s0", "tissue"), ("s0", "tumor"), ("s1", "tissue"), ("s1", "tumor")]
    assert torch.equal(only[1].tile_embeddings, in_memory[0].tile_embeddings)
    assert [(o.slide.sample_id, o.slide.annotation) for o in model.iter_slides(given[:1], CONFIG)] == [
        ("tumor/s0", "tumor"),
        ("s0", "tissue"),
    ]


def test_one_slide_has_one_result_or_a_list(
    model: Model, given: list[Slide], in_memory: list[EmbeddedSlide]
) -> None:
    one = model.embed_slide(given[0], CONFIG, annotation="tissue")
    assert (one.sample_id, one.annotation) == ("s0", "tissue")
    assert torch.equal(one.tile_embeddings, in_memory[1].tile_embeddings)
    listed = model.embed_slide(given[0], CONFIG, annotation=["tissue", "tumor"])
    assert bags(listed) == [("s0", "tissue"), ("s0", "tumor")]
    with pytest.raises(
        ConfigError, match=r"slide s0: masks samples 2 classes.*annotation='tumor'.*embed_slides"
    ):
        model.embed_slide(given[0], CONFIG)
    with pytest.raises(ConfigError, match=r"'stroma' is not sampled; .* samples: tumor, tissue"):
        model.embed_slide(given[0], CONFIG, annotation="stroma")


def test_tiles_of_all_classes_together(
    model: Model, given: list[Slide], in_memory: list[EmbeddedSlide]
) -> None:
    merged = model.embed_slide(given[0], CONFIG.updated(masks={**MASKS, "output_mode": "merged"}))
    assert (merged.sample_id, merged.annotation) == ("s0", "merged")
    places = {(x, y) for each in in_memory[:2] for x, y in zip(each.x.tolist(), each.y.tolist(), strict=True)}
    assert places == set(zip(merged.x.tolist(), merged.y.tolist(), strict=True)) and len(places) == len(
        merged.x
    )


def test_tissue_is_the_class_of_all_others(model: Model, slides: list[Path]) -> None:
    tissue = PreprocessingConfig(requested_tile_size_px=128)
    assert model.embed_slide(slides[0], tissue, annotation="tissue").annotation == "tissue"
    with pytest.raises(ConfigError, match=r"'tumor' is not sampled; .* samples: tissue"):
        model.embed_slides(slides[:1], tissue, annotations=["tumor"])


def test_what_classes_need(model: Model, given: list[Slide], slides: list[Path]) -> None:
    with pytest.raises(MaskError, match=r"slide tumor/s2: no mask_path is given"):
        model.embed_slide(slides[2], CONFIG, annotation="tumor")
    patients: Any = SimpleNamespace(level="patient", name="moozy")
    with pytest.raises(
        ConfigError, match=r"moozy embeds patients from one bag .* \(tumor, tissue\): say output"
    ):
        Model.resolve_preprocessing(patients, CONFIG)
    own = [{"image_path": s.image_path, "mask_path": s.mask_path, "tissue_threshold": 0.5} for s in given[:1]]
    with pytest.raises(ManifestError, match=r"slide tumor/s0: tissue_threshold is one of tissue"):
        model.embed_slide(own[0], CONFIG, annotation="tumor")


def test_several_models_share_what_is_read_of_classes(
    model: Model, given: list[Slide], in_memory: list[EmbeddedSlide]
) -> None:
    found = Models({"a": model, "b": model}).embed_slides(given[:1], CONFIG)
    assert bags(found["a"]) == bags(found["b"]) == BAGS[:2]
    assert torch.equal(found["b"][1].tile_embeddings, in_memory[1].tile_embeddings)
    one = Models({"a": model}).embed_slide(given[0], CONFIG, annotation="tumor")["a"]
    assert torch.equal(one.tile_embeddings, in_memory[0].tile_embeddings)


# on disk -------------------------------------------------------------------------------------------


def test_files_are_in_folders_of_classes(
    whole: tuple[Path, RunResult], in_memory: list[EmbeddedSlide]
) -> None:
    out, result = whole
    assert [(a.sample_id, a.annotation, a.name) for a in result.tile_artifacts] == [
        ("s0", "tumor", "tumor/s0"),
        ("s0", None, "s0"),
        ("s1", "tumor", "tumor/s1"),
        ("s1", None, "s1"),
    ]
    assert result.without_tissue == ("s1",) and not result.failed
    for artifact, expected in zip(result.tile_artifacts, in_memory, strict=True):
        assert artifact.path == out / "tile_embeddings" / f"{artifact.name}.pt"
        assert torch.equal(load_embeddings(artifact.path), expected.tile_embeddings)
        assert artifact.metadata["sample_id"] == artifact.sample_id
        assert artifact.metadata.get("annotation") == artifact.annotation
        tiling = load_coordinates(out / "tiles", artifact.name)
        assert np.array_equal(tiling.x, expected.x) and tiling.sample_id == artifact.name
        assert tiling.annotation == expected.annotation
        assert (out / "preview" / "mask" / f"{artifact.name}.jpg").is_file()
    assert [a.name for a in tile_artifacts(out)] == ["s0", "s1", "tumor/s0", "tumor/s1"]
    assert find_tile_artifact(out, "s0", "tumor") == result.tile_artifacts[0]
    assert find_tile_artifact(out, "s0") == result.tile_artifacts[1]
    assert find_tile_artifact(out, "../s0", "tumor") is None


def test_the_process_list_has_a_row_for_each_class(whole: tuple[Path, RunResult]) -> None:
    _, result = whole
    found = read_process_list(result.process_list_path)
    assert [(row["sample_id"], row["annotation"], row["feature_status"]) for row in found] == [
        (name, annotation, "success") for name, annotation in BAGS
    ]
    assert [key_of(row)[0] for row in found] == ["tumor/s0", "s0", "tumor/s1", "s1"]
    assert found[3]["error"] == "no tissue: 0 tiles: its mask holds nothing of tissue"
    frame = result.to_frame()
    assert frame["sample_id"].tolist() == ["tumor/s0", "s0", "tumor/s1", "s1"]


def test_lists_without_classes_are_as_ever() -> None:
    assert key_of({"sample_id": "a"}) == key_of({"sample_id": "a", "annotation": "tissue"}) == ("a", "")
    assert key_of({"sample_id": "a", "annotation": "merged", "encoder_name": "e"}) == ("a", "e")


def test_resume_knows_classes(model: Model, given: list[Slide], tmp_path: Path) -> None:
    first = run(model, given, tmp_path)
    made = {a.name: a.path.stat().st_mtime_ns for a in first.tile_artifacts}
    first.tile_artifacts[0].metadata_path.unlink()
    second = run(model, given, tmp_path)
    assert (second.resumed, len(second.tile_artifacts)) == (3, 4)
    again = {a.name: a.path.stat().st_mtime_ns for a in second.tile_artifacts}
    assert {name for name in made if made[name] != again[name]} == {"tumor/s0"}
    coverage = {"tumor": 0.8, "tissue": 0.5}
    other = CONFIG.updated(masks={**MASKS, "min_coverage": coverage})
    with pytest.raises(ConfigError, match=r"of tumor/s0, tumor/s1 with tissue_threshold 0\.3, not 0\.8"):
        run(model, given, tmp_path, other)
    third = run(model, given, tmp_path, other.updated(resume=False))
    tiles = [a.num_tiles for a in third.tile_artifacts]
    assert tiles[0] < first.tile_artifacts[0].num_tiles and tiles[1] == first.tile_artifacts[1].num_tiles


def test_other_values_of_a_label_are_other_tiles(model: Model, given: list[Slide], tmp_path: Path) -> None:
    def config(tumor: int) -> PreprocessingConfig:
        labels = {
            "pixel_mapping": {"rest": [0, 3 - tumor, 3], "tumor": tumor},
            "min_coverage": {"tumor": 0.3},
        }
        return CONFIG.updated(masks=labels)

    before = tile_cohort(
        given[:1], model.resolve_preprocessing(config(1)), ExecutionOptions(output_dir=tmp_path)
    )
    there = load_coordinates(tmp_path / "tiles", "tumor/s0")
    assert not before.failed and before.process_list_path.exists()
    (artifact,) = run(model, given[:1], tmp_path, config(2)).tile_artifacts
    now = load_coordinates(tmp_path / "tiles", "tumor/s0")
    assert artifact.num_tiles == len(now) and not np.array_equal(now.x, there.x)


def test_shards_are_merged(
    model: Model, given: list[Slide], in_memory: list[EmbeddedSlide], tmp_path: Path
) -> None:
    for shard in ("1/3", "2/3", "3/3"):
        run(model, given, tmp_path, shard=shard)
    merged = merge_shards(tmp_path)
    assert (merged.complete, merged.finished, merged.total) == (True, 4, 4)
    found = read_process_list(tmp_path / "process_list.csv")
    assert [(row["sample_id"], row["annotation"]) for row in found] == BAGS
    for name, expected in zip(("tumor/s0", "s0", "tumor/s1", "s1"), in_memory, strict=True):
        assert torch.equal(load_embeddings(tmp_path / f"tile_embeddings/{name}.pt"), expected.tile_embeddings)


def test_export_and_aggregation_keep_classes(
    model: Model, whole: tuple[Path, RunResult], tmp_path: Path
) -> None:
    out, result = whole
    done, failed = export_run(out, tmp_path, "npz")
    assert not failed and [item.sample_id for item in done] == ["s0", "s1", "tumor/s0", "tumor/s1"]
    with np.load(tmp_path / "tile_embeddings" / "tumor" / "s0.npz") as data:
        assert np.array_equal(data["features"], load_embeddings(result.tile_artifacts[0].path).numpy())
    sidecar = json.loads((tmp_path / "tile_embeddings" / "tumor" / "s0.meta.json").read_text())
    assert (sidecar["sample_id"], sidecar["annotation"]) == ("s0", "tumor")
    execution = ExecutionOptions(output_dir=tmp_path / "slides")
    pooled = model.aggregate_tiles(result.tile_artifacts[:3], execution=execution, aggregator="mean")
    assert [each.path.relative_to(tmp_path / "slides").as_posix() for each in pooled] == [
        "slide_embeddings/tumor/s0.pt",
        "slide_embeddings/s0.pt",
        "slide_embeddings/tumor/s1.pt",
    ]
    mean = load_embeddings(result.tile_artifacts[0].path).float().mean(0)
    assert torch.allclose(load_embeddings(pooled[0].path), mean)


def test_bags_of_a_class(
    model: Model, given: list[Slide], whole: tuple[Path, RunResult], tmp_path: Path
) -> None:
    out, _ = whole
    for name in (None, "tissue"):
        bags = BagDataset(out, annotation=name, missing="skip")  # the second slide has none
        assert bags.sample_ids == ["s0"] and list(bags.missing) == ["s1"]
    assert BagDataset(out, annotation="tumor").sample_ids == ["s0", "s1"]
    for name in ("stroma", "merged"):
        with pytest.raises(ConfigError, match=f"no tile embeddings of class '{name}'.*tissue"):
            BagDataset(out, annotation=name)
    run(model, given[:1], tmp_path, CONFIG.updated(masks={**MASKS, "min_coverage": {"tumor": 0.3}}))
    with pytest.raises(ConfigError, match=r"has tile embeddings of tumor: say which"):
        BagDataset(tmp_path)


def test_pictures_of_tiles_of_a_class(whole: tuple[Path, RunResult]) -> None:
    index, tiling = searched_run(whole[0]).index, load_coordinates(whole[0] / "tiles", "tumor/s0")
    asked, query = index.tile_at("tumor/s0", int(tiling.x[0]), int(tiling.y[0]))
    _, problems = draw_sheet(index.nearest(query, 5), asked=asked)
    assert problems == []


def test_coordinates_of_classes_are_embedded_again(
    model: Model, whole: tuple[Path, RunResult], in_memory: list[EmbeddedSlide], tmp_path: Path
) -> None:
    config = PreprocessingConfig(requested_tile_size_px=64)
    pipeline = Pipeline(model, config, ExecutionOptions(output_dir=tmp_path))
    result = pipeline.run_with_coordinates(whole[0])
    assert [a.name for a in result.tile_artifacts] == ["s0", "s1", "tumor/s0", "tumor/s1"]
    assert torch.equal(load_embeddings(result.tile_artifacts[2].path), in_memory[0].tile_embeddings)
    for name in ("tumor/s0", "s0"):  # drawn by the masks that are recorded beside the coordinates
        (tissue, outlines), (expected, expected_outlines) = _drawn(tmp_path, name), _drawn(whole[0], name)
        assert np.array_equal(tissue, expected) and outlines == expected_outlines


def _drawn(out: Path, name: str) -> tuple[Any, Any]:
    """The picture of a slide's tissue in a report, and its outlines in the viewer."""
    slide = next(slide for slide in ReportedRun(out, out).slides if slide.name == name)
    slide.load()
    tissue = next(picture.pixels for picture in draw_images(slide, 300) if picture.kind == "tissue")
    run = ViewedRun(out)
    number = [line["id"] for line in run.facts()["slides"]].index(name)
    outlines = run.outlines(number, 0)
    run.close()
    return tissue, outlines


def test_a_folder_of_classes_alone_has_an_owner(model: Model, given: list[Slide], tmp_path: Path) -> None:
    masks = {**MASKS, "min_coverage": {"tumor": 0.3}}
    config = CONFIG.updated(masks=masks, region_tile_multiple=2)
    result = run(model, given[:1], tmp_path, config)
    (artifact,) = result.hierarchical_artifacts
    assert artifact.path == tmp_path / "hierarchical_embeddings" / "tumor" / "s0.pt"
    (owner,) = owners(tmp_path)
    assert (owner.preset, owner.tiling) == (model.name, tmp_path)
    assert run(model, given[:1], tmp_path, config).resumed == 1


def test_what_killed_processes_left_in_folders_of_classes_goes(
    model: Model, given: list[Slide], tmp_path: Path
) -> None:
    run(model, given[:1], tmp_path)
    (tmp_path / "tile_embeddings" / "tumor" / ".x.pt.partial").mkdir()
    left = next((tmp_path / "tile_embeddings" / "tumor").glob(".x*"))
    run(model, given[:1], tmp_path)
    assert left.exists() == (left.suffix != ".partial") or not left.exists()


def test_slides_by_class() -> None:
    slides = [Slide(sample_id=name, image_path=Path(f"{name}.svs")) for name in "ab"]
    named = by_class(slides, CONFIG.masks)
    assert [slide.sample_id for slide in named] == ["tumor/a", "a", "tumor/b", "b"]
    assert by_class(named, CONFIG.masks) == named, "once is enough"
    assert by_class(slides, PreprocessingConfig().masks) == slides
    with pytest.raises(ManifestError, match="becomes a file name"):
        Slide(sample_id="tumor/a", image_path=Path("a.svs"))


def test_rows_of_classes_are_read_by_csv(whole: tuple[Path, RunResult]) -> None:
    with whole[1].process_list_path.open(newline="") as file:
        assert {row["annotation"] for row in csv.DictReader(file)} == {"tumor", "tissue"}


def test_areas_and_tiles_as_geojson(
    whole: tuple[Path, RunResult], given: list[Slide], model: Model, tmp_path: Path
) -> None:
    out, _ = whole
    done, failed = export_areas(out, tmp_path)
    assert not failed and len(done) == 8
    tumor = tmp_path / "tissue" / "tumor" / "s0.geojson"
    tiles = json.loads((tmp_path / "tiles" / "tumor" / "s0.geojson").read_text())["features"]
    assert len(tiles) == len(load_coordinates(out / "tiles", "tumor/s0"))
    assert {feature["properties"]["classification"]["name"] for feature in tiles} == {"tumor"}
    # as a mask, the areas give the class's own tiles
    masks = {"pixel_mapping": {"tumor": 1}, "min_coverage": {"tumor": 0.3}, "strategy": "independent"}
    again = replace(given[0], mask_path=tumor)
    made = model.embed_slide(again, CONFIG.updated(masks=masks))
    raster = {**MASKS, "min_coverage": {"tumor": 0.3}, "strategy": "independent"}
    expected = model.embed_slide(given[0], CONFIG.updated(masks=raster))
    assert np.array_equal(made.x, expected.x) and np.array_equal(made.y, expected.y) and len(made.x) > 5


def test_what_cannot_be_exported_as_areas(
    model: Model, given: list[Slide], slides: list[Path], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.svs"
    shutil.copyfile(slides[0], gone)
    config = model.resolve_preprocessing(PreprocessingConfig(requested_tile_size_px=128))
    tile_cohort(
        [Slide(sample_id="g", image_path=gone)], config, ExecutionOptions(output_dir=tmp_path / "out")
    )
    gone.unlink()
    done, failed = export_areas(tmp_path / "out", tmp_path / "areas")
    assert [(item.sample_id, item.what) for item in done] == [("g", "tiles")] and done[0].count > 3
    assert [(item.sample_id, item.what) for item in failed] == [("g", "tissue")]
    with pytest.raises(ConfigError, match="is the run itself"):
        export_areas(tmp_path / "out", tmp_path / "out")
    with pytest.raises(ArtifactError, match="has no coordinate files"):
        export_areas(tmp_path / "areas", tmp_path / "more")
