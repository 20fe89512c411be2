"""Several models over the same slides: the embeddings of separate calls, bit by bit, from one reading."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from shallow import few_blocks

from slide2vec import EmbedSlidesError, ExecutionOptions, Model, Models, Pipeline, PreprocessingConfig
from slide2vec.artifacts import load_embeddings
from slide2vec.cohort import slide_writer
from slide2vec.cohort.process_list import read_process_list
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ConfigError, OutputError
from slide2vec.estimate import Output, count_tiles, in_turns
from slide2vec.models import placed_on
from slide2vec.progress import NullReporter, ProgressEvent, SlideFailed, activate_progress_reporter
from slide2vec.readers import decoders
from slide2vec.slides import as_slide
from slide2vec.stream import Stream, shared_slides
from slide2vec.stream.tile_sources import SlideSource
from slide2vec.tiling import tile

CONFIG = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5, resume=True)
#: No look at the slides before they are read: these tests count what is read.
EXECUTION = ExecutionOptions(batch_size=5, build_engine="never")


class Recording(NullReporter):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []

    def emit(self, event: ProgressEvent) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"{n}.svs", size_px=1024, seed=n, levels=1) for n in range(3)]


@pytest.fixture(scope="module")
def models() -> Models:
    def resnet(seed: int) -> Model:
        return Model.from_preset(
            "timm:resnet10t",
            weights="random",
            seed=seed,
            device="cpu",
            allow_non_recommended_settings=True,
        )

    return Models({"first": resnet(0), "second": resnet(1), "third": resnet(2)})


@pytest.fixture(scope="module")
def patients() -> Model:
    with few_blocks():
        return Model.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many compressed tiles are decoded, how often tissue is looked for, and supertiles read."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    counted(SlideSource, "fetch")
    counted(decoders, "decode_tile")
    counted(tile, "segment_tissue")
    yield counts


def with_sizes(
    models: Models, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], **options: Any
) -> dict[str, Any]:
    """Give models tiles of different sizes, as presets do."""
    configs = {name: CONFIG.updated(requested_tile_size_px=sizes[name], **options) for name in models}
    for name, model in models.items():
        own = partial(model.resolve_preprocessing, configs[name])
        monkeypatch.setattr(model, "resolve_preprocessing", lambda config=None, own=own: own())
    return configs


def test_one_reading_gives_the_embeddings_of_separate_calls(
    models: Models, slides: list[Path], counts: Counter[str]
) -> None:
    alone = {}
    for name, model in models.items():
        counts.clear()
        alone[name] = model.embed_slides(slides, CONFIG, EXECUTION)
        once = dict(counts)
    counts.clear()
    together = models.embed_slides(slides, CONFIG, EXECUTION)
    assert dict(counts) == once and once["segment_tissue"] == 3
    assert list(together) == ["first", "second", "third"]
    for name, embedded in together.items():
        for ours, theirs in zip(embedded, alone[name], strict=True):
            assert ours.num_tiles > 10 and torch.equal(ours.tile_embeddings, theirs.tile_embeddings)
            assert (ours.x == theirs.x).all() and (ours.y == theirs.y).all()


def test_tiles_of_other_sizes_share_what_is_decoded(
    models: Models, slides: list[Path], counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = with_sizes(models, monkeypatch, {"first": 64, "second": 96, "third": 160})
    alone, decoded = {}, []
    for name, model in models.items():
        counts.clear()
        alone[name] = model.embed_slides(slides, configs[name], EXECUTION)
        decoded.append(counts["decode_tile"])
    counts.clear()
    together = models.embed_slides(slides, None, EXECUTION)
    # those of 96 px touch one compressed tile more than the others, who touch no other
    assert counts["decode_tile"] == max(decoded) == min(decoded) + 1 > 100
    assert counts["segment_tissue"] == 3
    for name, embedded in together.items():
        for ours, theirs in zip(embedded, alone[name], strict=True):
            assert torch.equal(ours.tile_embeddings, theirs.tile_embeddings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"")
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "logs" and path.name != "bill.json"
    }


@pytest.mark.parametrize("sizes", [pytest.param((64, 64, 64), marks=pytest.mark.slow), (64, 96, 64)])
def test_folders_are_those_of_separate_runs(
    models: Models,
    slides: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int, int],
) -> None:
    with_sizes(models, monkeypatch, dict(zip(models, sizes, strict=True)))
    one, many = (EXECUTION.updated(output_dir=tmp_path / name) for name in ("one", "many"))
    for model in models.values():
        Pipeline(model, None, one).run(slides)
    made = []
    result = Pipeline(models, None, many).run(slides, on_slide_persisted=made.append)
    assert len(made) == len(result.tile_artifacts) == 9 and not result.failed
    ours, theirs = files_of(tmp_path / "many"), files_of(tmp_path / "one")
    tables = [pd.read_csv(tmp_path / name / "process_list.csv") for name in ("many", "one")]
    assert ours.pop("process_list.csv") and theirs.pop("process_list.csv")
    assert ours == theirs
    keys = ["sample_id", "encoder_name"]
    ordered = [table.sort_values(keys)[[*keys, "num_tiles", "feature_status"]] for table in tables]
    assert ordered[0].to_numpy().tolist() == ordered[1].to_numpy().tolist() and len(tables[0]) == 9
    (bill,) = json.loads((tmp_path / "many/bill.json").read_text())["runs"]
    each = next(iter(result.encoders.values())).tile_artifacts
    tiles = [artifact.num_tiles for artifact in result.tile_artifacts]
    assert (bill["slides"], bill["tiles"]) == (3, sum(tiles))
    assert [part["slides"] for part in bill["encoders"].values()] == [3, 3, 3]
    assert set(bill["encoders"]) == set(tables[0]["encoder_name"])
    assert bill["encoders"]["timm:resnet10t"]["tiles"] == sum(artifact.num_tiles for artifact in each)
    assert sorted(part["tiles"] for part in bill["of_slides"]) == sorted(sum(tiles[n::3]) for n in range(3))
    assert result.summary is not None and result.summary.seconds == bill["seconds"]
    stations = {station.name: station for station in result.summary.stations}
    assert {f"encode of {name}" for name in models} < stations.keys() and "encode" not in stations
    busiest = max(stations.values(), key=lambda station: station.utilisation(result.summary.seconds))
    assert result.summary.bottleneck == busiest.name
    assert len(json.loads((tmp_path / "one/bill.json").read_text())["runs"]) == 3
    assert list(result.encoders) == list(models) and len(result.encoders["second"].tile_artifacts) == 3
    assert result.to_frame()["encoder"].tolist() == [name for name in models for _ in range(3)]


@pytest.fixture
def groups(models: Models) -> Iterator[ExecutionOptions]:
    """Room for two of three encoders at once, the last of which is released at the end."""
    size = models["first"].memory_bytes(EXECUTION, 64)
    yield EXECUTION.updated(encoders_gb=2.5 * size / 1e9)
    for model in models.values():
        model.release()


@pytest.mark.slow
def test_encoders_that_do_not_fit_take_turns_in_groups(
    models: Models,
    slides: list[Path],
    groups: ExecutionOptions,
    counts: Counter[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = {name: model.embed_slides(slides, CONFIG, EXECUTION) for name, model in models.items()}
    once = {name: count // 3 for name, count in counts.items()}
    counts.clear()
    found = models.embed_slides(slides, CONFIG, groups.updated(scratch_gb=0))
    assert "take turns, and each group reads the slides: first + second; then third" in caplog.text
    assert dict(counts) == {name: 2 * count for name, count in once.items()}
    counts.clear()
    kept = models.embed_slides(slides, CONFIG, groups)
    assert counts["fetch"] == once["fetch"] == 3  # the third looks for tissue, and reads nothing
    for name, embedded in kept.items():
        for ours, theirs in zip(embedded, alone[name], strict=True):
            assert torch.equal(ours.tile_embeddings, theirs.tile_embeddings)
    assert list(found) == list(models) and not any(model.held_bytes for model in models.values())
    for name, embedded in found.items():
        for ours, theirs in zip(embedded, alone[name], strict=True):
            assert torch.equal(ours.tile_embeddings, theirs.tile_embeddings)


@pytest.mark.slow
def test_no_more_encoders_are_in_memory_than_fit(
    models: Models,
    slides: list[Path],
    groups: ExecutionOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, many = (EXECUTION.updated(output_dir=tmp_path / name) for name in ("one", "many"))
    for model in models.values():
        Pipeline(model, CONFIG, one).run(slides)
    held: list[list[str]] = []
    run = Stream.run

    def noted(self: Stream, *args: Any) -> Any:
        for outcome in run(self, *args):
            held.append([name for name, model in models.items() if model.held_bytes])
            yield outcome

    monkeypatch.setattr(Stream, "run", noted)
    execution = groups.updated(output_dir=tmp_path / "many")
    result = Pipeline(models, CONFIG, execution).run(slides)
    assert len(held) == 9 and held[-3:] == [["third"]] * 3
    assert all(set(names) <= {"first", "second"} for names in held[:6])
    assert result.summary is not None and result.summary.readings == ("first + second", "third")
    assert (
        "slides were read 2 times (3 from the scratch, 0 decoded again), for first + second, then for third"
        in str(result.summary)
    )
    ours, theirs = files_of(tmp_path / "many"), files_of(tmp_path / "one")
    for name in [name for name in theirs if name == "process_list.csv" or name.endswith("config.yaml")]:
        del ours[name], theirs[name]  # which say encoders_gb, and rows in another order
    assert ours == theirs
    held.clear()
    again = Pipeline(models, CONFIG, many).run(slides)
    assert again.resumed == 9 and not any(model.held_bytes for model in models.values())


@pytest.mark.parametrize("scratch_gb", [None, pytest.param(0.001, marks=pytest.mark.slow)])
def test_decoded_tiles_wait_for_the_next_group(
    models: Models,
    slides: list[Path],
    groups: ExecutionOptions,
    counts: Counter[str],
    tmp_path: Path,
    scratch_gb: float | None,
) -> None:
    """All of them, or those of the one slide that fits: files are those of separate runs."""
    two = Models({name: models[name] for name in ("first", "second")})
    one, many = (EXECUTION.updated(output_dir=tmp_path / name) for name in ("one", "many"))
    Pipeline(two["first"], CONFIG, one).run(slides[:2])
    once = dict(counts)
    counts.clear()
    Pipeline(two["second"], CONFIG, one).run(slides[:2])
    alone = dict(counts)
    assert alone["decode_tile"] > 30 and alone["fetch"] == 2 and "segment_tissue" not in alone
    counts.clear()
    turns = {"encoders_gb": groups.encoders_gb and groups.encoders_gb / 2, "scratch_gb": scratch_gb}
    execution = many.updated(**turns, scratch_dir=tmp_path / "scratch")
    result = Pipeline(two, CONFIG, execution).run(slides[:2])
    again = 0 if scratch_gb is None else 1
    assert counts["fetch"] == 2 + again and counts["segment_tissue"] == 2
    # planning compares a few tiles with a second decoder
    assert (counts["decode_tile"] - once["decode_tile"] < alone["decode_tile"] / 2) == (not again)
    said = f"slides were read 2 times ({2 - again} from the scratch, {again} decoded again), for first, then"
    assert result.summary is not None and said in str(result.summary)
    (bill,) = json.loads((tmp_path / "many/bill.json").read_text())["runs"]
    assert bill["readings"] == ["first", "second"] == list(result.summary.bill()["readings"])
    assert (bill["from_scratch"], bill["decoded_again"]) == (2 - again, again)
    assert not any("readings" in each for each in bill["encoders"].values())
    outputs = {name: Output(CONFIG, 10) for name in two}
    found = list(count_tiles([as_slide(path) for path in slides[:2]], outputs, 2))
    told = in_turns(found, outputs, two.in_memory(dict.fromkeys(two, CONFIG), execution), execution)
    assert tuple(" + ".join(group) for group in told.groups) == result.summary.readings
    assert (told.from_scratch.total(), told.decoded_again.total()) == (2 - again, again)
    either = {count * 3 * 64**2 for count in told.counts.values()}  # whichever is planned first
    assert bill["scratch_bytes"] in (either if again else {told.bytes})
    assert result.summary.scratch_bytes == bill["scratch_bytes"]
    assert list((tmp_path / "scratch").iterdir()) == []
    ours, theirs = files_of(tmp_path / "many"), files_of(tmp_path / "one")
    for name in [name for name in theirs if name == "process_list.csv" or name.endswith("config.yaml")]:
        del ours[name], theirs[name]  # which say encoders_gb, and rows in another order
    assert ours == theirs
    counts.clear()
    shutil.rmtree(tmp_path / "many/tile_embeddings")
    result = Pipeline(two, CONFIG, execution).run(slides[:2])
    assert result.resumed == 2 and counts["fetch"] == 2 and list((tmp_path / "scratch").glob("*")) == []
    assert result.summary is not None and result.summary.readings == ("first",)
    (tmp_path / "damaged.tiff").write_bytes(b"II*\0")
    result = Pipeline(two, CONFIG, execution).run([*slides[:2], tmp_path / "damaged.tiff"])
    assert len(result.failed) == 2 and result.summary is not None
    assert result.summary.readings == () and "slides were read" not in str(result.summary)


def test_resume_adds_what_is_missing_and_segments_nothing(
    models: Models, slides: list[Path], tmp_path: Path, counts: Counter[str]
) -> None:
    execution = EXECUTION.updated(output_dir=tmp_path)
    Pipeline(Models({"first": models["first"]}), CONFIG, execution).run(slides)
    counts.clear()
    result = Pipeline(models, CONFIG, execution).run(slides)
    assert not counts["segment_tissue"]
    assert result.resumed == 3 and result.encoders["first"].summary is None
    assert Pipeline(models, CONFIG, execution).run(slides).resumed == 9
    rows = read_process_list(tmp_path / "process_list.csv")
    assert len(rows) == 9 and {row["feature_status"] for row in rows} == {"success"}


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, False])
def test_regions_of_one_size_made_of_tiles_of_two_have_coordinates_of_their_own(
    models: Models, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """How small a piece of tissue may be is told in tiles, so that they may be other regions."""
    sizes = {"first": 128, "second": 64, "third": 64}
    with_sizes(models, monkeypatch, sizes, requested_region_size_px=256, resume=resume)
    two = {name: models[name] for name in ("first", "second")}
    for name, model in two.items():
        Pipeline(model, None, EXECUTION.updated(output_dir=tmp_path / name)).run(slides[:2])
    out = EXECUTION.updated(output_dir=tmp_path / "both")
    result = Pipeline(two, None, out).run(slides[:2])
    made = result.encoders["second"].hierarchical_artifacts[0]
    folder = made.path.parents[1].relative_to(tmp_path / "both")
    of_first, of_second, both = (files_of(tmp_path / name) for name in ("first", "second", "both"))
    tiling = "tilings/256px-0.5um-regions4"
    for name in ("0", "1"):
        for file in (f"tiles/{name}.coordinates.meta.json", f"tiles/{name}.coordinates.npz"):
            assert both[file] == of_first[file]
            assert both[f"{tiling}/{file}"] == of_second[file]
        features = f"hierarchical_embeddings/{name}.pt"
        assert both[features] == of_first[features]
        assert both[f"{folder}/{features}"] == of_second[features]
        sidecars = [
            json.loads(content)["compatibility"]
            for content in (
                of_second[f"hierarchical_embeddings/{name}.meta.json"],
                both[f"{folder}/hierarchical_embeddings/{name}.meta.json"],
            )
        ]
        assert sidecars[0] == sidecars[1]
    if resume:
        assert Pipeline(two, None, out).run(slides[:2]).resumed == 4
        for model in two.values():
            assert Pipeline(model, None, out).run(slides[:2]).resumed == 2


@pytest.mark.slow
def test_an_encoder_that_breaks_off_fails_alone(
    models: Models, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = EXECUTION.updated(num_workers=1)  # tiles come in order
    engine = models["second"]._tile_embedder.select(execution, 64).engine
    run, calls = engine.run, []

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if sum(calls) > 70:
            raise RuntimeError("the device is gone")
        return run(pixels)

    monkeypatch.setattr(engine, "run", broken)
    result = Pipeline(models, CONFIG, execution.updated(output_dir=tmp_path)).run(slides)
    assert [len(each.tile_artifacts) for each in result.encoders.values()] == [3, 1, 3]
    failed = result.encoders["second"].failed
    assert [each.sample_id for each in failed] == ["1", "2"] and "device is gone" in str(failed[0].error)
    assert (
        sum(row["feature_status"] == "error" for row in read_process_list(tmp_path / "process_list.csv")) == 2
    )
    calls.clear()
    with pytest.raises(EmbedSlidesError, match="1 with second") as caught:
        models.embed_slides(slides, CONFIG, execution)
    found = caught.value.results
    assert isinstance(found, dict) and [len(results) for results in found.values()] == [3, 3, 3]


def test_patients_of_an_encoder_that_breaks_off_fail_with_it(
    models: Models, patients: Model, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = patients._tile_embedder.select(EXECUTION, 64).engine
    run, calls = engine.run, []

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if sum(calls) > 70:  # a slide has 64
            raise RuntimeError("the device is gone")
        return run(pixels)

    monkeypatch.setattr(engine, "run", broken)
    given = [
        {"sample_id": path.stem, "image_path": path, "patient_id": patient}
        for path, patient in zip(slides, "pqr", strict=True)
    ]
    execution = EXECUTION.updated(num_workers=1, output_dir=tmp_path)
    result = Pipeline(Models({"patients": patients, "first": models["first"]}), CONFIG, execution).run(given)
    found = result.encoders["patients"]
    assert [each.patient_id for each in found.patient_artifacts] == ["p"]
    assert [each.sample_id for each in found.failed] == ["1", "2"]
    assert [each.patient_id for each in result.failed_patients] == ["q", "r"]
    assert "patient q: moozy broke off: the device is gone" in str(result.failed_patients[0].error)
    assert len(result.encoders["first"].tile_artifacts) == 3


def test_a_full_disk_ends_the_run_and_fails_no_slide(
    models: Models, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = slide_writer.write_tile_embeddings

    def full(folder: Path, embedded: EmbeddedSlide, *args: Any, **options: Any) -> Any:
        if folder.name == "out" or embedded.sample_id != "0":
            return write(folder, embedded, *args, **options)
        error = OutputError(f"{folder}/{embedded.sample_id}.pt cannot be written: no space left on device")
        error.errno = errno.ENOSPC
        raise error

    monkeypatch.setattr(slide_writer, "write_tile_embeddings", full)
    two = Models({name: models[name] for name in ("first", "second")})
    reporter = Recording()
    out = tmp_path / "out"
    with (
        activate_progress_reporter(reporter),
        pytest.raises(
            OutputError, match=r"/0.pt cannot .* timm:resnet10t: . of 3 slides .*; timm-resnet10t-\w+: . of 3"
        ),
    ):
        Pipeline(two, CONFIG, EXECUTION.updated(output_dir=out)).run(slides)
    assert not [event for event in reporter.events if isinstance(event, SlideFailed)]
    assert not [
        row for row in read_process_list(out / "process_list.csv") if row["feature_status"] == "error"
    ]


def test_what_the_callback_raises_ends_the_run_and_is_raised(
    models: Models, slides: list[Path], tmp_path: Path
) -> None:
    def refuse(artifact: Any) -> None:
        raise LookupError("no room in the database")

    with pytest.raises(LookupError, match="no room"):
        Pipeline(models, CONFIG, EXECUTION.updated(output_dir=tmp_path)).run(
            slides, on_slide_persisted=refuse
        )
    rows = read_process_list(tmp_path / "process_list.csv")
    assert not [row for row in rows if row["feature_status"] == "error"]


@pytest.mark.slow
def test_patients_in_another_order_than_the_manifest_have_a_turn_of_their_own(
    models: Models,
    slides: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    patients: Model,
) -> None:
    """Streams that take slides in other orders would wait for each other, or keep everything."""
    several = Models({"patients": patients, "first": models["first"]})

    def run(name: str, *of: str) -> Any:
        caplog.clear()
        given = [
            {"sample_id": path.stem, "image_path": path, "patient_id": patient}
            for path, patient in zip(slides, of, strict=True)
        ]
        return Pipeline(several, CONFIG, EXECUTION.updated(output_dir=tmp_path / name)).run(given)

    monkeypatch.setattr(shared_slides, "KEPT_SLIDES", 1)
    assert not run("sorted", "p", "p", "q").failed
    assert "different orders" not in caplog.text
    result = run("unsorted", "p", "q", "p")
    assert "patients and first take slides in different" in caplog.text
    assert len(result.patient_artifacts) == 2 and len(result.tile_artifacts) == 3


def test_a_bad_slide_fails_with_every_encoder_and_stops_none(
    models: Models, slides: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(slides[0].read_bytes()[:5000])
    result = Pipeline(models, CONFIG, EXECUTION.updated(output_dir=tmp_path / "out")).run(
        [slides[0], bad, slides[1]]
    )
    assert [each.sample_id for each in result.failed] == ["bad"] * 3
    assert len(result.tile_artifacts) == 6


def test_a_slide_without_tissue_has_no_tiles_of_any_size(
    models: Models, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = tmp_path / "blank.tiff"
    glass = np.full((1024, 1024, 3), 245, np.uint8)
    resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}  # 0.25 µm/px
    tifffile.imwrite(blank, glass, tile=(256, 256), photometric="rgb", **resolution)
    with_sizes(models, monkeypatch, {"first": 64, "second": 96, "third": 160})
    for found in models.embed_slides([blank, slides[0]], None, EXECUTION).values():
        assert found[0].num_tiles == 0 < found[1].num_tiles


def test_encoders_on_several_devices_are_fed_by_one_reader(
    models: Models, slides: list[Path], counts: Counter[str]
) -> None:
    alone = [models[name].embed_slides(slides[:1], CONFIG, EXECUTION) for name in ("first", "second")]
    once = counts["decode_tile"] // 2
    counts.clear()
    placed = Models(
        {
            name: Model.from_preset(
                "timm:resnet10t",
                weights="random",
                seed=seed,
                device=device,
                allow_non_recommended_settings=True,
            )
            for name, seed, device in (("first", 0, "cpu"), ("second", 1, "cpu:0"))
        }
    )
    assert placed.devices_here(EXECUTION) == ("cpu", "cpu:0")
    together = placed.embed_slides(slides[:1], CONFIG, EXECUTION)
    assert counts["decode_tile"] == once
    for ours, (theirs,) in zip(together.values(), alone, strict=True):
        assert torch.equal(ours[0].tile_embeddings, theirs.tile_embeddings)


def test_presets_are_shared_out_among_devices_by_their_work() -> None:
    names = ["prost40m", "uni", "lunit", "virchow2", "titan"]
    assert placed_on(names, ["a", "b"]) == {
        "titan": "a",  # its tile encoder, at 448 px: 536 GFLOP a tile
        "virchow2": "b",  # 340
        "uni": "b",  # 123
        "lunit": "b",  # 45
        "prost40m": "b",  # 12
    }
    assert set(placed_on(["uni", "uni2"], ["a", "b", "c"]).values()) == {"a", "b"}


def test_two_models_of_one_name_need_names_of_their_own(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="timm:resnet10t was given twice"):
        Models([models["first"], models["second"]])
    with pytest.raises(ConfigError, match="no model"):
        Models([])
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="scattering was given twice"):
        patch.setattr(Model, "from_preset", None)  # none is built before that is seen
        Models.from_presets(["scattering", "scattering"])


def test_encoders_of_one_tile_encoder_take_its_features_over(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write into one folder, so that they come one after the other, though nothing is resumed."""
    with few_blocks():
        models = Models.from_presets(["moozy", "moozy-slide"], weights="random", device="cpu")
    given = [
        {"sample_id": path.stem, "image_path": path, "patient_id": name}
        for path, name in zip(slides, "aba", strict=True)
    ]
    execution = ExecutionOptions(batch_size=3, output_dir=tmp_path / "many", save_tile_embeddings=True)
    streams, run = [], Stream.run

    def counted(self: Stream, *args: Any) -> Any:
        streams.append(self)
        return run(self, *args)

    monkeypatch.setattr(Stream, "run", counted)
    config = PreprocessingConfig(filtering={"a_t": 0})  # type: ignore[arg-type]
    result = Pipeline(models, config, execution).run(given)
    assert len(streams) == 1 and not result.failed
    assert [len(result.encoders["moozy"].patient_artifacts), len(result.slide_artifacts)] == [2, 3]
    for artifact in result.encoders["moozy-slide"].tile_artifacts:
        assert artifact.metadata["num_tiles"] == len(load_embeddings(artifact.path)) > 1
