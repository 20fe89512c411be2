"""Several encoders in several workers: each slide is read once for all of them, in one worker."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_workers
from scale_helpers import SIZES, Breaking, Counting, Recorder, Small, end_workers, files, rows

from slide2vec import EmbedSlidesError, ExecutionOptions, Models, Pipeline, PreprocessingConfig, RunResult
from slide2vec.cohort.process_list import read_process_list
from slide2vec.progress import RunFinished, RunStarted, SlideFinished, activate_progress_reporter
from slide2vec.readers import decoders
from slide2vec.slides import as_slide
from slide2vec.stream.plan import plan_slide

CONFIG = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
RESUMING = CONFIG.updated(resume=True)
ALONE = ExecutionOptions(batch_size=16)
TWO = ExecutionOptions(batch_size=16, devices=("cpu", "cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slides")


@pytest.fixture(scope="module")
def slides(folder: Path, generated_slide: Callable[..., Path]) -> list[Path]:
    return [
        generated_slide(folder / f"s{n}.svs", size_px=size, seed=n, levels=1) for n, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[Models]:
    with pytest.MonkeyPatch.context() as patch:
        fork_workers(patch)
        patch.setenv("SLIDE2VEC_TEST_FOLDER", str(folder))
        given: dict[str, Any] = {"device": "cpu", "allow_non_recommended_settings": True}
        models = Models(
            {
                "scattering": Counting.from_preset("scattering", **given),
                "resnet": Breaking.from_preset("timm:resnet10t", weights="random", **given),
            }
        )
        yield models
        end_workers(models)  # type: ignore[arg-type]


def decodes(do: Callable[[], object]) -> int:
    """How many compressed tiles are decoded here."""
    count, decode = [], decoders.decode_tile

    def counted(*args: Any, **options: Any) -> Any:
        count.append(1)
        return decode(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "decode_tile", counted)
        do()
    return len(count)


def planned(path: Path) -> None:
    """As a later group plans it: a few of its tiles are compared with those of a second decoder."""
    plan_slide(as_slide(path), CONFIG).close()


@pytest.fixture(scope="module")
def decoded(models: Models, slides: list[Path]) -> int:
    """Compressed tiles that one encoder needs."""
    return decodes(lambda: models["scattering"].embed_slides(slides, CONFIG, ALONE))


@pytest.fixture(scope="module")
def alone(models: Models, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("alone")
    return Pipeline(models, CONFIG, ALONE.updated(output_dir=out)).run(slides)


def count(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.decoded"))


def processes(models: Models) -> list[int]:
    pools: Any = [pool for kept in models._pools.values() for pool in kept]
    return [each.process.pid for pool in pools for each in pool._processes.values()]


def same(found: RunResult, expected: RunResult) -> None:
    """Artifacts are, with the batches of the CPU as they come."""
    assert files(found) == files(expected)
    columns = [sorted(map(str, rows(each))) for each in (found, expected)]
    assert columns[0] == columns[1]
    for name, each in expected.encoders.items():
        made = found.encoders[name].tile_artifacts
        assert [one.sample_id for one in made] == [one.sample_id for one in each.tile_artifacts]
        for one, other in zip(made, each.tile_artifacts, strict=True):
            ours, theirs = (torch.load(artifact.path) for artifact in (one, other))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_slides_are_read_once_for_all_encoders(
    models: Models, slides: list[Path], folder: Path, decoded: int, alone: RunResult, tmp_path: Path
) -> None:
    before, recorder = count(folder), Recorder()
    pipeline = Pipeline(models, RESUMING, TWO.updated(output_dir=tmp_path))
    with activate_progress_reporter(recorder):
        result = pipeline.run(slides)
    assert count(folder) - before == decoded > 100
    same(result, alone)
    assert recorder.events[0] == RunStarted(6, "scattering + resnet")
    finished = [event for event in recorder.events if isinstance(event, SlideFinished)]
    assert len({event.sample_id for event in finished}) == len(finished) == 6
    assert isinstance(recorder.events[-1], RunFinished)
    (bill,) = json.loads((tmp_path / "bill.json").read_text())["runs"]
    tiles = sum(artifact.num_tiles for artifact in result.encoders["resnet"].tile_artifacts)
    assert (bill["slides"], bill["failed"], bill["tiles"]) == (6, 0, 2 * tiles)
    assert [each["tiles"] for each in bill["encoders"].values()] == [tiles, tiles]
    assert sum(each["tiles"] for each in bill["of_slides"]) == 2 * tiles
    assert pipeline.run(slides).resumed == 12
    before = count(folder)
    for name in ("s1", "s4"):
        (artifact,) = [a for a in result.encoders["resnet"].tile_artifacts if a.sample_id == name]
        artifact.metadata_path.unlink()
    again = pipeline.run(slides)
    assert again.resumed == 10 and 0 < count(folder) - before < decoded
    same(again, alone)
    end_workers(pipeline.models)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_a_lost_worker_had_finished_counts(
    models: Models, slides: list[Path], alone: RunResult, tmp_path: Path
) -> None:
    models.embed_slides(slides[:2], CONFIG, TWO)
    first, done = processes(models), []
    assert len(first) == 2

    def kill(event: Any) -> None:
        if isinstance(event, SlideFinished):
            done.append(event.sample_id)
            if len(done) == 3:
                for pid in first:
                    os.kill(pid, signal.SIGKILL)

    with activate_progress_reporter(Recorder(kill)):
        result = Pipeline(models, CONFIG, TWO.updated(output_dir=tmp_path)).run(slides)
    assert len(done) == len(set(done)) == 6
    same(result, alone)
    tiles = sum(artifact.num_tiles for artifact in alone.encoders["resnet"].tile_artifacts)
    for each in result.encoders.values():
        assert each.summary is not None and (each.summary.slides, each.summary.tiles) == (6, tiles)
    (bill,) = json.loads((tmp_path / "bill.json").read_text())["runs"]
    assert (bill["slides"], bill["tiles"]) == (6, 2 * tiles)
    assert {each["sample_id"] for each in bill["of_slides"]} == {path.stem for path in slides}


@pytest.mark.slow
def test_encoders_that_do_not_fit_take_turns_in_the_same_workers(
    models: Models, slides: list[Path], alone: RunResult, caplog: pytest.LogCaptureFixture
) -> None:
    least = min(model.memory_bytes(TWO, 64) for model in models.values())
    found = models.embed_slides(slides, CONFIG, TWO.updated(encoders_gb=2.1 * least / 1e9))
    assert "take turns, and each group reads the slides: scattering; then resnet" in caplog.text
    assert len(processes(models)) == 2
    for name, each in alone.encoders.items():
        for one, other in zip(found[name], each.tile_artifacts, strict=True):
            torch.testing.assert_close(one.tile_embeddings, torch.load(other.path), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_decoded_tiles_wait_for_the_next_group_in_any_worker(
    models: Models, slides: list[Path], folder: Path, decoded: int, tmp_path: Path, killed: bool
) -> None:
    """With a tile a batch, so that no embedding depends on who embeds what; also if a worker dies."""
    one, two = (each.updated(batch_size=1, output_dir=tmp_path / "one") for each in (ALONE, TWO))
    expected = Pipeline(models, CONFIG, one).run(slides)
    least, scratch = min(model.memory_bytes(two, 64) for model in models.values()), tmp_path / "scratch"
    execution = two.updated(encoders_gb=2.1 * least / 1e9, scratch_dir=scratch, output_dir=tmp_path / "two")
    models.embed_slides(slides[:2], CONFIG, execution)  # so that there are workers
    before, done, seen, workers = count(folder), [], set[str](), processes(models)

    def at(event: Any) -> None:
        seen.update(path.suffix for path in scratch.glob("*/*"))
        if isinstance(event, SlideFinished):
            done.append(event.sample_id)
            if killed and len(done) in (3, 8):  # one in each turn
                os.kill(workers.pop(), signal.SIGKILL)

    pipeline = Pipeline(models, CONFIG, execution)
    with activate_progress_reporter(Recorder(at)):
        result = pipeline.run(slides)
    assert result.summary is not None and result.summary.readings == ("scattering", "resnet")
    taken, again = result.summary.from_scratch, result.summary.decoded_again
    assert taken + again == 6 and (taken >= 3 if killed else taken == 6) and ".tiles" in seen
    if not killed:
        assert count(folder) - before == decoded + decodes(lambda: [planned(path) for path in slides])
    assert list(scratch.iterdir()) == []
    assert files(result) == files(expected) and len(done) == 12
    for name, each in expected.encoders.items():
        made = result.encoders[name].tile_artifacts
        for ours, theirs in zip(made, each.tile_artifacts, strict=True):
            assert ours.path.read_bytes() == theirs.path.read_bytes()
    end_workers(models)  # type: ignore[arg-type]


def test_patients_in_any_order_beside_another_encoder(
    models: Models, slides: list[Path], folder: Path, decoded: int, tmp_path: Path
) -> None:
    patients = Small.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)
    given = [
        {"sample_id": path.stem, "image_path": path, "patient_id": "pq"[number % 2]}
        for number, path in enumerate(slides)
    ]
    both = {"patients": patients, "scattering": models["scattering"]}
    expected = Pipeline(patients, CONFIG, ALONE.updated(output_dir=tmp_path / "alone")).run(given)
    before, pipeline = count(folder), Pipeline(both, CONFIG, TWO.updated(output_dir=tmp_path / "both"))
    result = pipeline.run(given)
    assert count(folder) - before == decoded
    assert len(result.encoders["scattering"].tile_artifacts) == 6 and not result.failed_patients
    made = result.encoders["patients"].patient_artifacts
    assert [each.patient_id for each in made] == ["p", "q"]
    for one, other in zip(made, expected.patient_artifacts, strict=True):
        torch.testing.assert_close(torch.load(one.path), torch.load(other.path), rtol=1e-5, atol=1e-5)
    end_workers(pipeline.models)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_encoder_that_breaks_off_fails_alone(
    models: Models, slides: list[Path], folder: Path, alone: RunResult, tmp_path: Path
) -> None:
    broken = folder / "broken"
    broken.touch()
    pipeline = Pipeline(models, RESUMING, TWO.updated(output_dir=tmp_path))
    result = pipeline.run(slides)
    resnet = result.encoders["resnet"]
    assert len(result.encoders["scattering"].tile_artifacts) == 6
    assert "s1" in [each.sample_id for each in resnet.failed]
    assert resnet.tile_artifacts and len(resnet.tile_artifacts) + len(resnet.failed) == 6
    assert "the device is gone" in str(resnet.failed[0].error)
    statuses = [row["feature_status"] for row in read_process_list(tmp_path / "process_list.csv")]
    assert statuses.count("error") == len(resnet.failed) and len(statuses) == 12
    with pytest.raises(EmbedSlidesError, match="with resnet") as caught:
        models.embed_slides(slides, CONFIG, TWO)
    assert isinstance(caught.value.results, dict) and None not in caught.value.results["scattering"]
    broken.unlink()
    again = pipeline.run(slides)
    assert again.resumed == 6 + len(resnet.tile_artifacts) and not again.failed
    same(again, alone)
    end_workers(pipeline.models)  # type: ignore[arg-type]
