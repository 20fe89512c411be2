"""What a run will take: tiles as the run finds them, arithmetic with stated speeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile
from forked import fork_workers

from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.compile.gain import Gain
from slide2vec.errors import ConfigError
from slide2vec.estimate import (
    COORDINATES_BYTES,
    HARDWARE,
    Output,
    SlideEstimate,
    Trial,
    count_tiles,
    in_turns,
    on_hardware,
    read_together,
    reading_seconds,
    seconds_for,
    tried,
    unevenness,
    with_build,
)
from slide2vec.estimate.trial import _Enough, _Stopwatch
from slide2vec.progress import RunFinished, RunStarted, RunSummary, SlidePlanned, TilesEncoded
from slide2vec.slides import Slide
from slide2vec.stream.plan import plan_slide

CONFIG = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Slide]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [generated_slide(folder / f"{n}.svs", size_px=1024, seed=n, levels=1) for n in range(2)]
    return [Slide(sample_id=path.stem, image_path=path) for path in paths]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)


@pytest.mark.parametrize(
    "changes", [{}, {"overlap": 0.5}, {"filtering": {"filter_white": True, "white_threshold": 200}}]
)
def test_tiles_are_those_of_the_run(slides: list[Slide], model: Model, changes: dict[str, object]) -> None:
    config = PreprocessingConfig(**(CONFIG.model_dump(exclude_unset=True) | changes))
    other = config.updated(requested_tile_size_px=96)
    outputs = {
        "a": Output(config, 10),
        "b": Output(other, 7, 2),
        "same": Output(config, 5, keeps_tiles=False),
    }
    found = list(count_tiles(slides, outputs, 2))
    for name, asked in (("a", config), ("b", other), ("same", config)):
        embedded = model.embed_slides(slides, asked)
        assert [each.tiles[name] for each in found] == [each.num_tiles for each in embedded]
    for each in found:
        a, b = each.tiles["a"], each.tiles["b"]
        assert a > 5 and not each.errors
        assert each.written_bytes == a * 10 * 4 + b * 7 * 2 + (a + b) * COORDINATES_BYTES
        assert 0 < each.read_bytes <= each.slide.image_path.stat().st_size


@pytest.mark.parametrize("size", [64, 100, 224])
def test_what_is_read_are_the_compressed_tiles_under_the_tiles(slides: list[Slide], size: int) -> None:
    (found,) = count_tiles(slides[:1], {"a": Output(CONFIG.updated(requested_tile_size_px=size), 1)}, 1)
    with closing(plan_slide(slides[0], CONFIG.updated(requested_tile_size_px=size))) as plan:
        tiling, read = plan.tiling, plan.tiling.geometry.read_tile_size_px
    with tifffile.TiffFile(slides[0].image_path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage) and page.shape[1] == tiling.dimensions[0]
        across = -(-page.imagewidth // page.tilewidth)
        touched = {
            row // page.tilelength * across + column // page.tilewidth
            for x, y in zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)
            for column in range(x, min(x + read, page.imagewidth))
            for row in (y, y + read // 2, min(y + read, page.imagelength) - 1)
        }
        assert found.read_bytes == sum(page.databytecounts[tile] for tile in touched)
        assert 3 < len(touched) <= len(page.databytecounts)


def test_a_bad_slide_is_told_of_and_stops_none(slides: list[Slide], tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    todo = [slides[0], Slide(sample_id="bad", image_path=bad), slides[1]]
    found = list(count_tiles(todo, {"a": Output(CONFIG, 10)}, 2))
    assert [bool(each.errors) for each in found] == [False, True, False]
    assert "slide bad" in str(found[1].errors["a"]) and found[1].read_bytes == found[1].written_bytes == 0


def test_encoders_of_one_device_take_turns() -> None:
    tiles, trials = {"a": 1000, "b": 300, "c": 50}, {"a": Trial(10.0), "b": Trial(3.0), "c": Trial(1.0)}
    assert seconds_for(tiles, trials, dict.fromkeys(tiles, "cpu")) == 250.0
    assert seconds_for(tiles, trials, {"a": "cuda:0", "b": "cuda:1", "c": "cuda:1"}) == 150.0
    assert seconds_for({}, {}, {}) == 0.0
    with pytest.raises(ConfigError, match="speed of a must be above 0"):
        seconds_for({"a": 1}, {"a": Trial(0.0)}, {"a": "cpu"})


def test_groups_begin_one_after_the_other() -> None:
    tiles = {"a": 1000, "b": 300, "c": 50}
    trials = {"a": Trial(10.0, 2.0), "b": Trial(3.0, 5.0, 20.0), "c": Trial(1.0, 7.0)}
    devices = {"a": "cuda:0", "b": "cuda:1", "c": "cuda:0"}
    assert seconds_for(tiles, trials, devices, [["a", "b"], ["c"]]) == 20 + (5 + 100) + (7 + 50)


def test_what_groups_read_and_what_waits_for_them(slides: list[Slide]) -> None:
    outputs = {
        "a": Output(CONFIG, 10),
        "other": Output(CONFIG.updated(requested_tile_size_px=96), 10),
        "b": Output(CONFIG, 5),
        "slide": Output(CONFIG, 5, keeps_tiles=False),
    }
    found = list(count_tiles(slides, outputs, 2))
    size = [each.tiles["a"] * 3 * 64**2 for each in found]
    groups = [["a", "other"], ["b"], ["slide"]]
    room = ExecutionOptions(scratch_dir=Path("scratch"), scratch_gb=size[0] / 1e9)
    turns = in_turns(found, outputs, groups, room, {"slide"})
    first, second = (each.slide.sample_id for each in found)
    assert turns.bytes == turns.bytes_of[first] == size[0] and turns.folder == Path("scratch")
    assert turns.from_scratch == {first: 1} and turns.decoded_again == {second: 1}
    once, again = found[1].read_by(["a", "other"]), found[1].read_by(["b"])
    assert 0 < again <= once
    assert turns.read_bytes == {first: found[0].read_by(["a", "other"]), second: once + again}
    # 10 ms a tile of 64 px are spared, less a 12th of the 33 µs and 50 µs of one of 224 px
    cost = (33e-6 + 50e-6) * (64 / 224) ** 2
    saved = found[0].tiles["a"] * (10e-3 - cost) / 2
    assert turns.saved_seconds({(0.5, 64): 10e-3}, 2) == pytest.approx(saved)
    none = in_turns(found, outputs, groups, room.updated(scratch_gb=0))
    assert none.folder is None and none.decoded_again == {first: 2, second: 2}
    assert none.saved_seconds({}, 2) == 0


def test_workers_take_large_files_first(slides: list[Slide]) -> None:
    outputs = {"a": Output(CONFIG, 10), "b": Output(CONFIG, 5)}
    small, large = (
        replace(each, file_bytes=size)
        for each, size in zip(count_tiles(slides, outputs, 2), (1000, 2000), strict=True)
    )
    one = max(small.tiles["a"], large.tiles["a"]) * 3 * 64**2
    room = ExecutionOptions(scratch_dir=Path("scratch"), scratch_gb=one / 1e9)
    for workers, first in ((1, small), (2, large)):
        told = in_turns([small, large], outputs, [["a"], ["b"]], room, workers=workers)
        assert set(told.from_scratch) == {first.slide.sample_id}


def test_how_unevenly_whole_slides_are_shared_out(slides: list[Slide]) -> None:
    (found,) = count_tiles(slides[:1], {"a": Output(CONFIG, 1)}, 1)

    def of(*tiles: int) -> list[SlideEstimate]:
        return [replace(found, tiles={"a": each // 2, "b": each - each // 2}) for each in tiles]

    assert unevenness(of(40, 30, 20), 1) == unevenness([], 2) == unevenness(of(0, 0), 2) == 1
    assert unevenness(of(40, 30, 20), 2) == pytest.approx(50 / 45)
    assert unevenness(of(40), 4) == 4
    assert seconds_for({"a": 90}, {"a": Trial(9.0, 2.0)}, {"a": "cpu"}, unevenness=1.5) == 2 + 15


def test_encoders_of_patients_read_for_themselves_in_another_order(slides: list[Slide]) -> None:
    groups, levels = [["a", "p", "b"], ["q"]], {"a": "tile", "b": "slide", "p": "patient", "q": "patient"}
    patients = [replace(slides[0], sample_id=f"s{n}", patient_id=patient) for n, patient in enumerate("xxyx")]
    assert read_together(groups, levels, patients[:3]) == groups
    assert read_together(groups, levels, patients) == [["a", "b"], ["p"], ["q"]]
    assert read_together([["p", "a"]], levels, patients) == [["p"], ["a"]]
    assert read_together([["p", "a"]], levels, patients, workers=2) == [["p", "a"]]


def test_reading_is_timed_by_itself(slides: list[Slide]) -> None:
    ticks = iter(range(1000))
    blocks = CONFIG.updated(use_supertiles=False)  # of a tile
    assert reading_seconds(slides, blocks, 8, lambda: next(ticks)) == 1.0
    assert next(ticks) == 1 + 2 * 8  # the first block is not counted
    assert reading_seconds([], blocks, 8) is None


def test_engines_are_built_in_turn_and_starts_go_together() -> None:
    tiles, trials = {"a": 1000, "b": 300}, {"a": Trial(10.0, 2.0, 40.0), "b": Trial(3.0, 5.0, 20.0)}
    assert seconds_for(tiles, trials, {"a": "cuda:0", "b": "cuda:1"}) == 100 + 5 + 60


def test_a_run_that_builds_an_engine_is_planned_with_it() -> None:
    trial, gain = Trial(10.0, 1.0), Gain("openvino", 2.0, 30.0)
    assert with_build(trial, gain, 5_000) == Trial(20.0, 1.0, 30.0)
    assert with_build(trial, gain, 500) == trial  # saves 25 s
    assert with_build(trial, None, 5_000) == trial


def test_known_hardware_takes_what_its_published_speed_says() -> None:
    gpu = next(gpu for gpu in HARDWARE if gpu.name == "RTX 4090")
    assert on_hardware(gpu, {"vit-h": 398}, {"vit-h": 334.6}) == pytest.approx(1.0)
    assert on_hardware(gpu, {"vit-h": 398, "half": 398}, {"vit-h": 334.6, "half": 167.3}) == pytest.approx(
        1.5
    )


def test_a_trial_leaves_the_first_batch_out_and_ends_in_time() -> None:
    times = iter([1.0, 5.0, 5.05, 6.0, 8.0, 10.5])
    watch = _Stopwatch(5.0, lambda: next(times))
    watch.emit(RunStarted(2, "a"))
    watch.emit(SlidePlanned("a", 64, "tiff"))
    for slide in "abbb":  # the first batch has tiles of two slides
        watch.emit(TilesEncoded(16, slide))
    with pytest.raises(_Enough):
        watch.emit(TilesEncoded(16, "b"))
    assert (watch.ended, watch.tiles) == (10.5, 48)
    found = watch.found
    assert found is not None and found.tiles_per_s == pytest.approx(48 / 5.45)
    # 4.05 s until the first batch of 32 was encoded, which takes 3.63
    assert found.start_s == pytest.approx(4.05 - 32 * 5.45 / 48)


def test_a_trial_of_workers_waits_until_all_are_under_way() -> None:
    times = iter([0.0, 2.0, 3.0, 5.0, 6.0])
    watch = _Stopwatch(9.0, lambda: next(times), workers=2)
    watch.emit(RunStarted(2, "a"))
    for slide in "aaba":
        watch.emit(TilesEncoded(8, slide))
    assert watch.found == Trial(8.0, start_s=5.0 - 3)
    with pytest.raises(_Enough):  # which ends the workers
        watch.emit(RunFinished(RunSummary(2, 0, 32, 6.0, (), "")))


def test_workers_are_tried_together_and_end(
    slides: list[Slide], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a slide, of which there is one; no engine would be built for them."""
    fork_workers(monkeypatch)
    execution = ExecutionOptions(batch_size=4, devices=("cpu", "cpu"))
    found = tried(model, slides[:1], CONFIG, execution, 0.05)
    assert found is not None and found.tiles_per_s > 0
    assert not any(model._pools.values())
    monkeypatch.setattr(model._tile_embedder, "gain_of_build", lambda *args: Gain("openvino", 2.0, 30.0))
    assert model.gain_of_build(CONFIG, ExecutionOptions()) is not None
    assert model.gain_of_build(CONFIG, execution) is None


def test_a_trial_measures_and_leaves_nothing_behind(
    slides: list[Slide], model: Model, tmp_path: Path
) -> None:
    execution = ExecutionOptions(batch_size=4, output_dir=tmp_path / "out")
    found = tried(model, slides, CONFIG, execution, 0.05)
    assert found is not None and found.tiles_per_s > 0 and found.start_s >= 0 == found.build_s
    assert not (tmp_path / "out").exists()
    one_batch = ExecutionOptions(batch_size=1000)
    assert tried(model, slides, CONFIG, one_batch, 0.05) is None
