"""What a run will take: tiles as the run finds them, arithmetic with stated speeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.errors import ConfigError
from slide2vec.estimate import (
    COORDINATES_BYTES,
    HARDWARE,
    Output,
    _Enough,
    _Stopwatch,
    count_tiles,
    on_hardware,
    seconds_for,
    trial_speed,
)
from slide2vec.progress import SlidePlanned, TilesEncoded
from slide2vec.slides import Slide

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


def test_a_bad_slide_is_told_of_and_stops_none(slides: list[Slide], tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    todo = [slides[0], Slide(sample_id="bad", image_path=bad), slides[1]]
    found = list(count_tiles(todo, {"a": Output(CONFIG, 10)}, 2))
    assert [bool(each.errors) for each in found] == [False, True, False]
    assert "slide bad" in str(found[1].errors["a"]) and found[1].read_bytes == found[1].written_bytes == 0


def test_encoders_of_one_device_take_turns() -> None:
    tiles, speeds = {"a": 1000, "b": 300, "c": 50}, {"a": 10.0, "b": 3.0, "c": 1.0}
    assert seconds_for(tiles, speeds, dict.fromkeys(tiles, "cpu")) == 250.0
    assert seconds_for(tiles, speeds, {"a": "cuda:0", "b": "cuda:1", "c": "cuda:1"}) == 150.0
    assert seconds_for({}, {}, {}) == 0.0
    with pytest.raises(ConfigError, match="speed of a must be above 0"):
        seconds_for({"a": 1}, {"a": 0.0}, {"a": "cpu"})


def test_known_hardware_takes_what_its_published_speed_says() -> None:
    gpu = next(gpu for gpu in HARDWARE if gpu.name == "RTX 4090")
    assert on_hardware(gpu, {"vit-h": 398}, {"vit-h": 334.6}) == pytest.approx(1.0)
    assert on_hardware(gpu, {"vit-h": 398, "half": 398}, {"vit-h": 334.6, "half": 167.3}) == pytest.approx(
        1.5
    )


def test_a_trial_leaves_the_first_batch_out_and_ends_in_time() -> None:
    times = iter([5.0, 5.0001, 6.0, 8.0, 10.5])
    watch = _Stopwatch(5.0, lambda: next(times))
    watch.emit(SlidePlanned("a", 64, "tiff"))
    for slide in "abbb":  # the first batch has tiles of two slides
        watch.emit(TilesEncoded(16, slide))
    with pytest.raises(_Enough):
        watch.emit(TilesEncoded(16, "b"))
    assert (watch.ended, watch.tiles) == (10.5, 48)
    assert watch.tiles_per_s == pytest.approx(48 / 5.4999)


def test_a_trial_measures_and_leaves_nothing_behind(
    slides: list[Slide], model: Model, tmp_path: Path
) -> None:
    execution = ExecutionOptions(batch_size=4, output_dir=tmp_path / "out")
    speed = trial_speed(model, slides, CONFIG, execution, 0.05)
    assert speed is not None and speed > 0
    assert not (tmp_path / "out").exists()
    one_batch = ExecutionOptions(batch_size=1000)
    assert trial_speed(model, slides, CONFIG, one_batch, 0.05) is None
