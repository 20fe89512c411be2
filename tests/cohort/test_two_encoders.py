"""Several encoders, and several tilings, in one output directory: nothing of one is lost to the other."""

from __future__ import annotations

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort_helpers import files, rows
from PIL import Image

from slide2vec import BagDataset, ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_stored
from slide2vec.artifacts.export import export_run
from slide2vec.artifacts.places import Owner
from slide2vec.cohort import output_dir
from slide2vec.cohort.lock import one_at_a_time, output_lock
from slide2vec.cohort.recorder import first_rows
from slide2vec.cohort.shard_lists import (
    encoders_at_work,
    encoders_path,
    merged_process_list,
    write_encoders,
)
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.cohort.side_by_side import _Readings
from slide2vec.cohort.slide_writer import SlideWriter
from slide2vec.errors import ArtifactError, ConfigError, OutputError
from slide2vec.progress import NullReporter, SlidePlanned
from slide2vec.progress.together import TogetherReporter
from slide2vec.report.slide_facts import ReportedRun
from slide2vec.report.slide_images import embedded_tiles
from slide2vec.tiling import load_coordinates

TIMM = "timm:test_vit.r160_in1k"
FOLDER = "encoders/timm-test_vit.r160_in1k"
CONFIG = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=160, resume=True)

Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {
        "scattering": Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True),
        "timm": Model.from_preset(TIMM, weights="random", device="cpu", allow_non_recommended_settings=True),
    }


@pytest.fixture
def run(models: dict[str, Model], slides: list[Path], tmp_path: Path) -> Run:
    """Runs an encoder over two slides into tmp_path/out, or as said."""

    def go(
        name: str,
        out: str = "out",
        given: Any = None,
        execution: dict[str, Any] | None = None,
        **options: Any,
    ) -> RunResult:
        execution_options = ExecutionOptions(output_dir=tmp_path / out, **(execution or {}))
        pipeline = Pipeline(models[name], CONFIG.updated(**options), execution_options)
        return pipeline.run(given or slides[:2])

    return go


def tile(model: Model, slides: list[Path], out: Path, **options: Any) -> RunResult:
    """An earlier `tile`."""
    config = CONFIG.updated(**options)
    return Pipeline(model, config, ExecutionOptions(output_dir=out)).run(slides, tiling_only=True)


def test_the_second_goes_beside_the_first(run: Run, tmp_path: Path) -> None:
    run("scattering", "alone")
    out, alone = tmp_path / "out", files(tmp_path / "alone")
    assert {name.split("/")[0] for name in alone} == {"config.yaml", "tile_embeddings", "tiles"}
    run("scattering")
    first = files(out)
    assert {name: first[name] for name in alone if name != "config.yaml"} == {
        name: content for name, content in alone.items() if name != "config.yaml"
    }
    second = run("timm")
    both = files(out)
    assert {name: both[name] for name in first} == first  # config.yaml and coordinates, too
    assert {name.split("/")[0] for name in both} == {"config.yaml", "tile_embeddings", "tiles", "encoders"}
    assert {str(a.path.relative_to(out).parent) for a in second.tile_artifacts} == {
        f"{FOLDER}/tile_embeddings"
    }
    assert f"{FOLDER}/config.yaml" in both
    assert [(row["sample_id"], row["encoder_name"]) for row in rows(out)] == [
        *[("s0", TIMM), ("s1", TIMM), ("s0", "scattering"), ("s1", "scattering")],
    ]
    for name in ("scattering", "timm"):  # whoever goes on
        again = run(name)
        assert (again.resumed, again.recomputed) == (2, {}) and files(out) == both
    again = run("scattering", resume=False)
    anew = files(out)
    del anew["config.yaml"], both["config.yaml"]  # which say whether to resume
    assert again.resumed == 0 and anew == both


def test_embeddings_are_those_of_separate_runs(run: Run, tmp_path: Path) -> None:
    for name in ("timm", "scattering"):
        run(name)
        run(name, f"{name}_alone")
    for folder, name in (("", "timm"), ("encoders/scattering/", "scattering")):
        for made in (tmp_path / f"{name}_alone/tile_embeddings").glob("*.pt"):
            assert made.read_bytes() == (tmp_path / f"out/{folder}tile_embeddings/{made.name}").read_bytes()


def paint_mask(path: Path, left: int) -> None:
    """60 x 100 px of tissue in 192 x 192, `left` px from the left."""
    mask = np.zeros((192, 192), np.uint8)
    mask[20:120, left : left + 60] = 1
    Image.fromarray(mask).save(path)


def test_coordinates_of_another_state_of_a_mask_are_not_those_of_the_embeddings(
    run: Run, slides: list[Path], tmp_path: Path
) -> None:
    """One encoder tiles a slide anew, in other places and as many: those of the other are no longer there."""

    def exported(encoder: str) -> list[str]:
        return [str(each.error) for each in export_run(out, tmp_path / "other", encoder=encoder)[1]]

    out, given = tmp_path / "out", [{"image_path": slides[0], "mask_path": tmp_path / "mask.png"}]
    paint_mask(tmp_path / "mask.png", 20)
    for name in ("scattering", "timm"):
        run(name, given=given)
    before = BagDataset(out, encoders=TIMM)[0]["coords"]
    assert exported(TIMM) == []
    paint_mask(tmp_path / "mask.png", 100)
    assert run("scattering", given=given).recomputed == {"mask": 1}
    now = BagDataset(out, encoders="scattering")[0]["coords"]
    assert now.shape == before.shape and not torch.equal(now, before)
    with pytest.raises(ArtifactError, match=f"slide s0: its image or mask has changed .* by {TIMM} .*again"):
        BagDataset(out, encoders=TIMM)[0]
    with pytest.raises(ArtifactError, match="tiled anew since"):
        load_stored(out / FOLDER / "tile_embeddings/s0.pt")
    assert len(exported(TIMM)) == 1 and exported("scattering") == []
    slide = ReportedRun(out, out).slides[0]
    slide.load()
    with pytest.raises(ArtifactError, match="tiled anew since"):
        embedded_tiles(slide, TIMM, slide.tilings[out])
    paint_mask(
        tmp_path / "mask.png", 20
    )  # as it was: the embeddings agree with it, and the coordinates do not
    again = run("timm", given=given)
    assert (again.resumed, again.recomputed) == (0, {"set of coordinates": 1})
    assert torch.equal(BagDataset(out, encoders=TIMM)[0]["coords"], before) and exported(TIMM) == []
    assert run("timm", given=given).resumed == 1


def archives_alone(out: Path, folder: Path) -> Path:
    """The tile archives of a run, without its coordinates beside them."""
    folder.mkdir()
    for path in (out / "tiles").glob("*.tiles.*"):
        shutil.copy(path, folder)
    return folder


def test_another_encoder_over_archives_leaves_the_embeddings_of_the_slide(run: Run, tmp_path: Path) -> None:
    """What it records of the image is of the archive, which says nothing of the slide."""
    out = tmp_path / "out"
    run("scattering", save_tiles=True)
    archives = archives_alone(out, tmp_path / "archives")
    before = BagDataset(out)[0]["coords"]
    assert not run("timm", read_tiles_from=archives).failed
    for encoder in ("scattering", TIMM):
        assert torch.equal(BagDataset(out, encoders=encoder)[0]["coords"], before)
    for name, options in (("scattering", {"save_tiles": True}), ("timm", {"read_tiles_from": archives})):
        again = run(name, **options)
        assert (again.resumed, again.recomputed) == (2, {})


def test_a_mask_that_changed_between_archives_and_slides_is_seen(
    run: Run, slides: list[Path], tmp_path: Path
) -> None:
    out, given = tmp_path / "out", [{"image_path": slides[0], "mask_path": tmp_path / "mask.png"}]
    paint_mask(tmp_path / "mask.png", 20)
    run("scattering", given=given, save_tiles=True)
    run("timm", given=given, read_tiles_from=archives_alone(out, tmp_path / "archives"))
    assert len(BagDataset(out, encoders=TIMM)) == 1 and BagDataset(out, encoders=TIMM)[0]
    paint_mask(tmp_path / "mask.png", 100)
    run("scattering", given=given, save_tiles=True)
    with pytest.raises(ArtifactError, match=f"slide s0: its image or mask has changed .* by {TIMM} .*again"):
        BagDataset(out, encoders=TIMM)[0]


def test_a_copy_of_a_run_over_archives_has_its_own_coordinates(run: Run, tmp_path: Path) -> None:
    run("scattering", save_tiles=True)
    archives = archives_alone(tmp_path / "out", tmp_path / "archives")
    run("scattering", "original", read_tiles_from=archives)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    before = BagDataset(tmp_path / "copy")[0]["coords"]
    for folder in ("tiles", "tile_embeddings"):
        shutil.rmtree(tmp_path / "original" / folder)
    run("scattering", "original", overlap=0.5, resume=False)  # the slides themselves, in other places
    assert torch.equal(BagDataset(tmp_path / "copy")[0]["coords"], before)


def test_another_precision_is_another_encoder(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("timm")
    first = files(tmp_path / "out")
    other = run("timm", execution={"precision": "bf16"})
    assert "with other settings (precision): they stay, and those of this run go to" in caplog.text
    assert other.recomputed == {} and {a.path.parents[1].name for a in other.tile_artifacts} == {
        "timm-test_vit.r160_in1k-bf16"
    }
    assert {name: content for name, content in files(tmp_path / "out").items() if name in first} == first
    assert run("timm", execution={"precision": "bf16"}).resumed == run("timm").resumed == 2


def test_a_second_run_that_breaks_off_is_taken_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("out", "undisturbed"):
        run("scattering", out)
    run("timm", "undisturbed")
    publish, made = SlideWriter.outcome, []

    def broken(self: SlideWriter, outcome: Any) -> Any:
        made.append(outcome)
        if len(made) > 1:
            raise RuntimeError("broken off")
        yield from publish(self, outcome)

    with monkeypatch.context() as patched:
        patched.setattr(SlideWriter, "outcome", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            run("timm")
    assert run("scattering").resumed == 2
    assert run("timm").resumed == 1
    assert files(tmp_path / "out").keys() == files(tmp_path / "undisturbed").keys()
    for name, content in files(tmp_path / "undisturbed").items():
        assert name.endswith("json") or files(tmp_path / "out")[name] == content
    assert len(rows(tmp_path / "out")) == 4


def test_a_folder_of_two_encoders_mixed_is_refused(run: Run, slides: list[Path], tmp_path: Path) -> None:
    """As earlier versions left it."""
    run("scattering", given=slides[:1])
    run("timm", "other", given=slides[1:2])
    for path in (tmp_path / "other/tile_embeddings").iterdir():
        path.rename(tmp_path / "out/tile_embeddings" / path.name)
    before = files(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"s1\.pt is of another encoder \(timm"):
        run("scattering")
    after = files(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_another_geometry_has_its_own_coordinates(run: Run, tmp_path: Path) -> None:
    run("scattering")
    first = files(tmp_path / "out")
    other = run("timm", requested_tile_size_px=320)
    both = files(tmp_path / "out")
    assert {name: both[name] for name in first} == first
    tilings = tmp_path / "out/tilings/320px-0.5um/tiles"
    assert load_coordinates(tilings, "s0").geometry.requested_tile_size_px == 320
    assert Path(other.tile_artifacts[0].metadata["coordinates_meta_path"]).parent == tilings
    assert run("timm", requested_tile_size_px=320).resumed == run("scattering").resumed == 2


def test_shards_of_a_second_encoder(run: Run, tmp_path: Path) -> None:
    run("scattering")
    for shard in ("1/2", "2/2"):
        assert run("timm", execution={"shard": shard}).failed == ()
        assert len(merged_process_list(tmp_path / "out").missing) == (1 if shard == "1/2" else 0)
    merged = merge_shards(tmp_path / "out")
    assert merged.complete and (merged.finished, merged.total) == (2, 2)
    assert sorted({row["encoder_name"] for row in rows(tmp_path / "out")}) == ["scattering", TIMM]
    assert len(rows(tmp_path / "out")) == 4


def test_shards_of_two_encoders_that_begin_together(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither has written anything when the other looks for its folders."""
    out, nested = tmp_path / "out", []

    def begin(*args: Any, **kwargs: Any) -> Any:
        if not nested:
            nested.append(0)
            nested.append(run("timm", execution={"shard": "2/2"}))
        return first_rows(*args, **kwargs)

    monkeypatch.setattr(output_dir, "first_rows", begin)
    assert not run("scattering", execution={"shard": "1/2"}).failed and not nested[1].failed
    for name, shard in (("scattering", "2/2"), ("timm", "1/2")):
        assert not run(name, execution={"shard": shard}).failed
    merge_shards(out)
    assert len(rows(out)) == 4 and not list(out.glob(".slide2vec.*.encoders"))
    for name in ("scattering", "timm"):
        folder = out if name == "scattering" else out / FOLDER
        assert len(list((folder / "tile_embeddings").glob("*.pt"))) == 2
        assert run(name).resumed == 2


def test_shards_look_for_their_folders_in_turn(
    run: Run, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of them at the same moment: those of an encoder have one folder, and none that of the other."""
    out, places = tmp_path / "out", defaultdict[str, set[Path]](set)
    together = threading.Barrier(6)

    def look(output_dir: Path, shard: str) -> list[Owner]:
        found = encoders_at_work(output_dir, shard)
        time.sleep(0.05)
        return found

    def wait(directory: Path, *args: Any) -> Any:
        together.wait()
        return one_at_a_time(directory)

    def note_place(directory: Path, shard: str, encoders: Sequence[Owner]) -> None:
        write_encoders(directory, shard, encoders)
        (encoder,) = encoders
        places[encoder.name].add(encoder.folder)

    def fail(*args: Any) -> Any:
        together.wait()
        raise OutputError("the disk is full")

    monkeypatch.setattr(output_dir, "encoders_at_work", look)
    monkeypatch.setattr(output_dir, "one_at_a_time", wait)
    monkeypatch.setattr(output_dir, "write_encoders", note_place)
    monkeypatch.setattr(output_dir, "first_rows", fail)  # nothing is written by which one would be known

    def begin(number: int) -> None:
        with pytest.raises(OutputError, match="the disk is full"):
            run(("scattering", "timm")[number % 2], execution={"shard": f"{number + 1}/6"})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, range(6)))
    first, second = places.values()
    assert len(places) == 2 and len(first) == len(second) == 1 and first | second > {out}
    assert not list(out.glob(".slide2vec.*.encoders"))


def test_encoders_of_another_shard_that_cannot_be_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with output_lock(out, "1/2"):
        encoders_path(out, "1/2").write_bytes(b"\xff{")
        with pytest.raises(OutputError, match="says where shard 1/2 writes, cannot be read"):
            run("timm", execution={"shard": "2/2"})
    assert not run("timm", execution={"shard": "2/2"}).failed
    assert not run("timm", execution={"shard": "1/2"}).failed  # what it had left is not looked at


# tile, then embed -------------------------------------------------------------------------------


def test_tiles_that_are_there_are_taken_with_their_settings(
    models: dict[str, Model], slides: list[Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tile(models["timm"], slides[:2], out, segmentation={"method": "otsu"}, tissue_threshold=0.3, overlap=0.25)
    before = {name: load_coordinates(out / "tiles", name) for name in ("s0", "s1")}
    with monkeypatch.context() as patched:
        patched.setattr("slide2vec.stream.plan.tile_slide", None)  # nothing is tiled
        result = run("timm")
    assert not result.failed
    for artifact in result.tile_artifacts:
        assert artifact.num_tiles == len(before[artifact.sample_id])
    text = (out / "config.yaml").read_text()
    assert "method: otsu" in text and "tissue_threshold: 0.3" in text and "overlap: 0.25" in text
    more = run("timm", given=slides[:3])  # a slide that is added later is tiled as the others
    assert more.resumed == 2 and load_coordinates(out / "tiles", "s2").segmentation.method == "otsu"
    again = run("timm", segmentation={"method": "otsu"}, tissue_threshold=0.3)  # the same, said
    assert again.resumed == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"segmentation": {"method": "hsv"}}, "segmentation.method otsu, not hsv"),
        ({"tissue_threshold": 0.01}, "tissue_threshold 0.3, not 0.01"),
        ({"filtering": {"a_t": 1}}, "filtering.a_t 4, not 1"),
        ({"overlap": 0.5}, "overlap 0, not 0.5"),
        ({"requested_tile_size_px": 224}, "tile size in px 160, not 224"),
        ({"region_tile_multiple": 2}, "tile size in px 160, not 320"),
    ],
)
def test_what_differs_is_said_and_nothing_touched(
    models: dict[str, Model], slides: list[Path], run: Run, tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    out = tmp_path / "out"
    tile(models["timm"], slides[:1], out, segmentation={"method": "otsu"}, tissue_threshold=0.3)
    before = files(out)
    with pytest.raises(ConfigError) as caught:
        run("timm", given=slides[:1], **given)
    assert told in str(caught.value) and "--no-resume" in str(caught.value)
    assert "another output directory" in str(caught.value) and files(out) == before


def test_each_slide_keeps_the_tiles_it_has(
    models: dict[str, Model], slides: list[Path], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tile(models["timm"], slides[:1], out, segmentation={"method": "otsu"})
    tile(models["timm"], slides[1:3], out, tissue_threshold=0.4)
    before = {name: content for name, content in files(out).items() if name.endswith(".npz")}
    assert not run("timm", given=slides[:3]).failed
    after = files(out)
    assert {name: after[name] for name in before} == before and run("timm", given=slides[:3]).resumed == 3


def test_tiles_of_embeddings_are_not_replaced(
    models: dict[str, Model], slides: list[Path], run: Run, tmp_path: Path
) -> None:
    run("scattering")
    before = files(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"those of the embeddings of scattering\. Give"):
        tile(models["timm"], slides[:2], tmp_path / "out", tissue_threshold=0.5)
    with pytest.raises(ConfigError, match="embeddings of scattering"):
        run("timm", tissue_threshold=0.5, resume=False)
    with pytest.raises(ConfigError, match="tissue_threshold"):
        run("scattering", tissue_threshold=0.5)
    assert files(tmp_path / "out") == before
    run("scattering", tissue_threshold=0.5, resume=False)  # which says: anew
    assert files(tmp_path / "out") != before


def test_pictures_are_of_this_run(
    models: dict[str, Model], slides: list[Path], run: Run, tmp_path: Path
) -> None:
    out, drawn = tmp_path / "out", {"save_mask_preview": True, "save_tiling_preview": True}
    tile(models["timm"], slides[:1], out, segmentation={"method": "otsu"}, preview=drawn)
    run("timm", given=slides[:1])
    (row,) = rows(out)
    assert row["mask_preview_path"] and row["tiling_preview_path"]  # the tiles are those
    run("timm", given=slides[:1], tissue_threshold=0.5, resume=False)
    (row,) = rows(out)
    assert not row["mask_preview_path"] and not row["tiling_preview_path"]
    assert not list((out / "preview").rglob("*.jpg"))


def test_pooled_tiles_of_two_encoders(run: Run, models: dict[str, Model], tmp_path: Path) -> None:
    made = {name: run(name, name).tile_artifacts for name in ("scattering", "timm")}
    execution = ExecutionOptions(output_dir=tmp_path / "pooled")
    places = [
        models[name].aggregate_tiles(made[name], execution=execution, aggregator=how)[0].path
        for name, how in (
            ("scattering", "mean"),
            ("timm", "mean"),
            ("scattering", "max"),
            ("scattering", "mean"),
        )
    ]
    assert len(set(places)) == 3 and places[0] == places[3]
    assert torch.load(places[0], weights_only=True).shape == (models["scattering"].feature_dim,)


def test_slides_that_a_later_group_decodes_again_are_counted() -> None:
    """With a scratch, and without one; two sizes of tiles are two readings, none of tiles is none."""
    config = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
    configs = {"a": config, "b": config.updated(requested_tile_size_px=96), "c": config}
    turns = [
        {"a": [("x", 5, "tiff"), ("y", 5, "tiff"), ("empty", 0, "tiff")]},
        {"b": [("x", 3, "tiff")], "c": [("x", 5, "scratch"), ("z", 5, "tiff"), ("empty", 0, "tiff")]},
        {"a": [("z", 5, "tiff"), ("y", 5, "scratch")]},
    ]
    readings = _Readings()
    for turn in turns:
        reporter = TogetherReporter(NullReporter(), {name: ["x", "y", "z", "empty"] for name in turn})
        for name, slides in turn.items():
            for slide in slides:
                reporter.take(name, SlidePlanned(*slide))
        readings.add(turn, reporter, configs)
    assert (readings.from_scratch, readings.again) == (2, 2)
