"""Several devices on one machine: the same embeddings, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from forked import fork_workers
from scale_helpers import (
    SIZES,
    Deadly,
    Different,
    Recorder,
    Scarce,
    Small,
    Unloadable,
    end_workers,
    files,
    rows,
    same,
    same_on_disk,
)

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.artifacts import load_embeddings
from slide2vec.errors import ConfigError, EmbedSlidesError, OutputError, Slide2VecError, WorkerLostError
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    SlideFinished,
    TilesEncoded,
    activate_progress_reporter,
)

#: Small tiles, so that slides have many.
PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
TWO = ("cpu", "cpu")
#: Tests whose workers are started as users' are; those of the others are forked.
STARTED = (
    "test_the_others_go_on_where_no_worker_can_take_the_place_of_a_lost_one",
    "test_slides_are_the_same_in_the_order_of_the_input",
    "test_a_model_that_workers_cannot_load_is_told",
)


@pytest.fixture(autouse=True)
def forked_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.originalname not in STARTED:
        fork_workers(monkeypatch)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [
        generated_slide(folder / f"s{n}.svs", size_px=size, seed=n, levels=1) for n, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def model() -> Iterator[Deadly]:
    model = Deadly.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    yield model
    end_workers(model)


@pytest.fixture(scope="module")
def alone(model: Deadly, slides: list[Path]) -> list[EmbeddedSlide]:
    return model.embed_slides(slides, PREPROCESSING)


def processes(model: Model) -> dict[str, int]:
    """Of the workers that wait for the next call."""
    pools: Any = [pool for kept in model._pools.values() for pool in kept]
    return {name: each.process.pid for pool in pools for name, each in pool._processes.items()}


def test_slides_are_the_same_in_the_order_of_the_input(
    model: Deadly, slides: list[Path], alone: list[EmbeddedSlide]
) -> None:
    recorder = Recorder()
    with activate_progress_reporter(recorder):
        found = model.embed_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    tiles = sum(each.num_tiles for each in alone)
    assert recorder.events[0] == RunStarted(len(slides), "scattering")
    assert sum(event.count for event in recorder.events if isinstance(event, TilesEncoded)) == tiles
    summary = recorder.events[-1].summary
    assert isinstance(recorder.events[-1], RunFinished) and (summary.slides, summary.tiles) == (6, tiles)
    before = processes(model)
    assert len(before) == 2
    model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    assert processes(model) == before, "workers wait for the next call"


def test_a_killed_worker_costs_nothing(model: Deadly, slides: list[Path], alone: list[EmbeddedSlide]) -> None:
    model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    before = processes(model)
    victims = list(before.values())[:1]

    def kill(event: Any) -> None:
        if isinstance(event, TilesEncoded) and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    recorder = Recorder(kill)
    with activate_progress_reporter(recorder):
        found = model.embed_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    summary, tiles = recorder.events[-1].summary, sum(each.num_tiles for each in alone)
    assert (summary.slides, summary.failed, summary.tiles) == (6, 0, tiles)
    assert sum(summary.roads.values()) == tiles
    assert not victims and len(processes(model)) == 2 and processes(model) != before


def test_what_a_lost_worker_had_finished_counts(model: Deadly, slides: list[Path]) -> None:
    model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    first = list(processes(model).values())
    done: list[str] = []

    def kill(event: Any) -> None:
        if isinstance(event, SlideFinished):
            done.append(event.sample_id)
            if len(done) == 4:  # both have finished one, or one has finished three
                for pid in first:
                    os.kill(pid, signal.SIGKILL)

    recorder = Recorder(kill)
    with activate_progress_reporter(recorder):
        found = model.embed_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    summary, tiles = recorder.events[-1].summary, sum(each.num_tiles for each in found)
    assert (summary.slides, summary.failed, summary.tiles) == (6, 0, tiles)
    assert summary.roads["workers that were lost"] > 0 and sum(summary.roads.values()) == tiles
    assert len(done) == len(set(done)) == 6, "each is told once"


def test_a_slide_that_kills_its_workers_fails_alone(
    model: Deadly, slides: list[Path], alone: list[EmbeddedSlide]
) -> None:
    given: list[Any] = [*slides, {"sample_id": "deadly", "image_path": slides[1]}]
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_slides(given, PREPROCESSING, ExecutionOptions(devices=TWO))
    assert list(caught.value.failed) == ["deadly"]
    error = caught.value.failed["deadly"]
    assert isinstance(error, WorkerLostError) and "slide deadly" in str(error) and "SIGKILL" in str(error)
    for one, other in zip(caught.value.results[:-1], alone, strict=True):
        same(one, other)


def test_a_bad_slide_fails_alone(model: Deadly, slides: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_slides([bad, *slides[:2]], PREPROCESSING, ExecutionOptions(devices=TWO))
    assert list(caught.value.failed) == ["bad"] and "slide bad" in str(caught.value.failed["bad"])
    assert [each and each.sample_id for each in caught.value.results] == [None, "s0", "s1"]


def test_workers_that_cannot_do_anything_end_the_run(model: Deadly, slides: list[Path]) -> None:
    given = [{"sample_id": f"deadly{n}", "image_path": slides[0]} for n in range(20)]
    with pytest.raises(Slide2VecError, match="lost one after the other, and no slide got through"):
        for outcome in model.iter_slides(given, PREPROCESSING, ExecutionOptions(devices=TWO)):
            assert isinstance(outcome.error, WorkerLostError)


def test_an_iterator_that_is_closed_ends_its_workers(model: Deadly, slides: list[Path]) -> None:
    end_workers(model)
    outcomes = model.iter_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    assert next(outcomes).error is None
    outcomes.close()
    assert not processes(model)
    kept = model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    assert [each.sample_id for each in kept] == ["s0", "s1"], "and the next call has new ones"


@pytest.mark.parametrize("options", [{}, {"region_tile_multiple": 3}])
def test_one_slide_is_shared_out(model: Deadly, slides: list[Path], options: dict[str, Any]) -> None:
    config = PREPROCESSING.updated(**options)
    expected = model.embed_slide(slides[1], config)
    recorder = Recorder()
    with activate_progress_reporter(recorder):
        found = model.embed_slide(slides[1], config, ExecutionOptions(devices=TWO))
    same(found, expected)
    if options:
        assert (found.tile_x == expected.tile_x).all() and (found.tile_y == expected.tile_y).all()
    assert recorder.events[0] == RunStarted(1, "scattering")
    summary = recorder.events[-1].summary
    assert (summary.slides, summary.tiles) == (1, expected.num_tiles)


def test_one_slide_shared_out_leaves_its_bad_tiles_out(
    model: Deadly, tmp_path: Path, generated_slide: Callable[..., Path]
) -> None:
    whole = generated_slide(tmp_path / "whole.svs", size_px=1536, seed=1, levels=2)
    damaged = tmp_path / "damaged.svs"
    with tifffile.TiffFile(whole) as file:
        page: Any = file.pages[0]
        largest = int(np.argmax(page.databytecounts))
        offset, count = page.dataoffsets[largest], page.databytecounts[largest]
    content = bytearray(whole.read_bytes())
    content[offset : offset + count] = bytes(count)
    damaged.write_bytes(content)
    config = PREPROCESSING.updated(on_bad_tile="skip")
    expected = model.embed_slide(damaged, config)
    assert 0 < expected.num_tiles < model.embed_slide(whole, PREPROCESSING).num_tiles
    same(model.embed_slide(damaged, config, ExecutionOptions(devices=TWO)), expected)
    with pytest.raises(Slide2VecError, match=r"^slide damaged: .*cannot be decoded"):
        model.embed_slide(damaged, PREPROCESSING, ExecutionOptions(devices=TWO))


def test_one_slide_shared_out_survives_a_killed_worker(model: Deadly, slides: list[Path]) -> None:
    expected = model.embed_slide(slides[1], PREPROCESSING)
    Path(f"{slides[1]}.once").touch()
    same(model.embed_slide(slides[1], PREPROCESSING, ExecutionOptions(devices=TWO)), expected)
    assert not Path(f"{slides[1]}.once").exists(), "a worker has died of a part"


def test_a_slide_without_tissue_is_shared_out(model: Deadly, tmp_path: Path) -> None:
    glass = tmp_path / "glass.tiff"
    resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}  # 0.25 µm/px
    blank = np.full((1024, 1024, 3), 245, np.uint8)
    tifffile.imwrite(glass, blank, tile=(256, 256), photometric="rgb", **resolution)
    for config in (PREPROCESSING, PREPROCESSING.updated(region_tile_multiple=2)):
        expected = model.embed_slide(glass, config)
        assert expected.num_tiles == 0
        found = model.embed_slide(glass, config, ExecutionOptions(devices=TWO))
        same(found, expected)
        assert found.tile_embeddings.shape == expected.tile_embeddings.shape


def test_a_single_slide_that_cannot_be_read_fails_as_one(model: Deadly, tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    for error in (Slide2VecError, RuntimeError):
        with pytest.raises(error, match="slide bad"):
            model.embed_slide(bad, PREPROCESSING, ExecutionOptions(devices=TWO))


def test_a_cohort_on_disk_is_the_same(model: Deadly, slides: list[Path], tmp_path: Path) -> None:
    preprocessing = PREPROCESSING.updated(preview={"save_tiling_preview": True}, resume=True)
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    persisted: list[str] = []

    def run(name: str, **options: Any) -> Any:
        execution = ExecutionOptions(output_dir=tmp_path / name, **options)
        return Pipeline(model, preprocessing, execution).run(
            [*slides, bad], on_slide_persisted=lambda made: persisted.append(made.sample_id)
        )

    expected = run("one")
    persisted.clear()
    Path(f"{slides[2]}.once").touch()
    found = run("two", devices=TWO)
    assert sorted(persisted) == [f"s{n}" for n in range(6)]
    assert (
        [each.sample_id for each in found.failed] == ["bad"] == [each.sample_id for each in expected.failed]
    )
    assert not Path(f"{slides[2]}.once").exists(), "a worker has died of it"
    same_on_disk(found, expected)
    assert run("two").resumed == 6, "what workers have finished is finished"


def test_patients_are_the_same(slides: list[Path], tmp_path: Path) -> None:
    model = Small.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)
    cohort = [
        {"sample_id": path.stem, "image_path": path, "patient_id": f"p{n // 2}"}
        for n, path in enumerate(slides)
    ]
    outputs = {}
    for name, devices in (("one", None), ("two", TWO)):
        execution = ExecutionOptions(output_dir=tmp_path / name, devices=devices, save_slide_embeddings=True)
        outputs[name] = Pipeline(model, PREPROCESSING, execution).run(cohort)
    assert files(outputs["two"]) == files(outputs["one"])
    assert rows(outputs["two"]) == rows(outputs["one"])
    for kind in ("slide_artifacts", "patient_artifacts"):
        pairs = zip(getattr(outputs["two"], kind), getattr(outputs["one"], kind), strict=True)
        for found, expected in pairs:
            assert torch.equal(load_embeddings(found.path), load_embeddings(expected.path))
    below = model.upstream
    assert below is not None
    execution = ExecutionOptions(devices=TWO)
    one, two = (below.embed_slide(slides[1], PREPROCESSING, each) for each in (None, execution))
    assert one.slide_embedding is not None and two.slide_embedding is not None
    assert torch.equal(one.slide_embedding, two.slide_embedding)
    for each in (model, below):
        end_workers(each)


def test_a_directory_that_cannot_be_written_to_ends_the_run(
    model: Deadly, slides: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "tile_embeddings").write_text("in the way")
    execution = ExecutionOptions(output_dir=tmp_path, devices=TWO)
    with pytest.raises(OutputError, match="tile_embeddings"):
        Pipeline(model, PREPROCESSING, execution).run(slides)


def test_workers_that_would_embed_otherwise_are_refused(slides: list[Path]) -> None:
    model = Different.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    with pytest.raises(ConfigError, match="another precision"):
        model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))


@pytest.mark.slow
def test_a_model_that_workers_cannot_load_is_told(
    slides: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = Unloadable.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    with pytest.raises(ValueError, match="no such weights here"):
        model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    assert "Traceback" not in capfd.readouterr().err, "the other worker ends quietly"


@pytest.mark.slow
def test_the_others_go_on_where_no_worker_can_take_the_place_of_a_lost_one(
    slides: list[Path], alone: list[EmbeddedSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDE2VEC_TEST_FOLDER", str(tmp_path))
    model = Scarce.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    model.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))
    Path(f"{slides[0]}.once").touch()
    found = model.embed_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    assert not Path(f"{slides[0]}.once").exists()
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    end_workers(model)


def test_a_model_made_otherwise_is_told(model: Deadly, slides: list[Path]) -> None:
    bare = Model(
        model.recipe, model.variant, model.encoder, device=model.device, precision="fp32", weights="mine"
    )
    with pytest.raises(ConfigError, match=r"Model\.from_preset"):
        bare.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(devices=TWO))


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(slides: list[Path]) -> None:
    code = (
        "import os, signal, sys\n"
        "from slide2vec import Model, ExecutionOptions, PreprocessingConfig\n"
        "model = Model.from_preset('scattering', device='cpu', allow_non_recommended_settings=True)\n"
        "config = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)\n"
        "model.embed_slides(sys.argv[1:], config, ExecutionOptions(devices=('cpu', 'cpu')))\n"
        "(pool,), = model._pools.values()\n"
        "print(*(each.process.pid for each in pool._processes.values()), pool._folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, slides[:2])], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    *pids, folder = done.stdout.split()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()] and not Path(folder).exists()


def test_slide_finished_is_told_once_per_slide(model: Deadly, slides: list[Path]) -> None:
    Path(f"{slides[0]}.once").touch()
    recorder = Recorder()
    with activate_progress_reporter(recorder):
        model.embed_slides(slides, PREPROCESSING, ExecutionOptions(devices=TWO))
    finished = [event.sample_id for event in recorder.events if isinstance(event, SlideFinished)]
    assert sorted(finished) == [f"s{n}" for n in range(6)]


def test_an_unknown_device_is_told() -> None:
    with pytest.raises(ConfigError, match="abacus"):
        Model.from_preset("scattering", device="cpu").embed_slides(
            [], execution=ExecutionOptions(devices=("cpu", "abacus"))
        )
