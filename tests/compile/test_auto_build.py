"""Building before the first slide: when, and what is said; with runs of plain numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_helpers import CPU, SIDE, only, tiny_encoder, tiny_recipe
from torch import nn

from slide2vec import PreprocessingConfig
from slide2vec.compile import EngineStore, EngineTarget, auto_build, select_engine
from slide2vec.compile.auto_build import (
    build_where_it_pays,
    expected_tiles,
    gain_of_build,
    most_tiles,
    most_tiles_by_area,
    offer_bf16,
    runtimes_in,
)
from slide2vec.compile.gain import Gain
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import EngineError, OutputError
from slide2vec.recipes import EnginePolicy, Recipe, load_recipe
from slide2vec.slides import Slide
from slide2vec.stream.plan import plan_slide

CONFIG = PreprocessingConfig(requested_tile_size_px=224, requested_spacing_um=0.5)
VIT_S = load_recipe("prost40m")  # 12.25 GFLOP


@pytest.fixture
def slides(tmp_path: Path) -> list[Slide]:
    """Files of 10 MB: of no more than 9,965 tiles of 224 px."""
    made = []
    for name in "abcd":
        path = tmp_path / f"{name}.svs"
        with path.open("wb") as file:
            file.truncate(10_000_000)
        made.append(Slide(sample_id=name, image_path=path))
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, slides: list[Slide], tmp_path: Path) -> Callable[..., list[Any]]:
    """A run of so many tiles at so many a second in PyTorch: the options of what was built for it."""
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(auto_build, "default_runtime", lambda precision, device: "openvino")

    def go(
        tiles: float,
        speed: float = 16.0,
        recipe: Recipe = VIT_S,
        fails: Exception | None = None,
        precision: str = "fp32",
        weights: str = "w",
        **more: Any,
    ) -> list[Any]:
        built: list[Any] = []

        def build(
            encoder: nn.Module, recipe: Recipe, variant: str, device: Any, options: Any, store: Any
        ) -> None:
            built.append(options)
            if fails is not None:
                raise fails

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auto_build, "build_engine", build)
            for counted in ("expected_tiles", "most_tiles_by_area"):
                patch.setattr(auto_build, counted, lambda slides, config: tiles)
            patch.setattr(auto_build, "_torch_speed", lambda *args: speed)
            target = EngineTarget(recipe, "default", CPU, lambda: weights)
            build_where_it_pays(nn.Identity(), target, precision, slides, CONFIG, **more)
        return built

    return go


@pytest.mark.parametrize(
    ("tiles", "speed", "built"),
    # At 16 tiles/s an engine saves 1/16 - 1/33.6 s a tile, 0.0327, and its build takes 12 + 110/16 s, 18.9:
    # it has to save 28.3 s, 864 tiles. At 1 tile/s it is 0.524 s a tile, and 12 + 110 s: 183 s, 350 tiles.
    [(860, 16.0, False), (870, 16.0, True), (345, 1.0, False), (355, 1.0, True), (100_000, 16.0, True)],
)
def test_built_where_it_pays(
    run: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture, tiles: int, speed: float, built: bool
) -> None:
    with caplog.at_level(logging.INFO, "slide2vec"):
        options = run(tiles, speed)
    said = [record.getMessage() for record in caplog.records]
    assert len(options) == len(said) == int(built)
    if built:
        assert (options[0].runtime, options[0].precision) == ("openvino", "fp32")
        assert not options[0].steps_down


def test_what_a_run_may_build_is_known_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(auto_build, "default_runtime", lambda precision, device: "openvino")
    target = EngineTarget(VIT_S, "default", CPU, lambda: "w")
    assert gain_of_build(target, "fp32") == Gain("openvino", 2.1)
    assert gain_of_build(target, "fp8") is gain_of_build(target, "fp16") is None
    never = EngineTarget(VIT_S.model_copy(update={"compile": False}), "default", CPU, lambda: "w")
    assert gain_of_build(never, "fp32") is None
    monkeypatch.setattr(auto_build, "find_engine", lambda *args: SimpleNamespace(matching=["one"]))
    assert gain_of_build(target, "fp32") is None


def test_it_is_said_with_both_figures(
    run: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "slide2vec"):
        run(50_000, 16.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "prost40m: building an engine for openvino first, which takes about 19 s; the run's 50,000 tiles or "
        "so then take about 25 min instead of 52 min in PyTorch (--no-build-engine or --engine torch does "
        "without)"
    )


@pytest.mark.parametrize("error", [EngineError("it is too odd"), RuntimeError("of the exporter")])
def test_a_build_that_fails_is_a_warning(
    run: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert len(run(50_000, fails=error)) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"no openvino engine of prost40m was built, PyTorch runs it: {error}"


def test_a_failed_build_is_not_tried_again_with_the_same_weights(
    run: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    run(50_000, fails=EngineError("it is too odd"))
    with caplog.at_level(logging.INFO, "slide2vec"):
        assert run(50_000) == []
    assert "an earlier build of its openvino engine failed here, and `slide2vec build-engine" in caplog.text
    assert run(50_000, weights="others") and run(50_000, precision="bf16")


def test_a_build_without_room_is_tried_again(run: Callable[..., list[Any]]) -> None:
    assert run(50_000, fails=OutputError("no room")) and run(50_000)


def test_what_is_not_built(run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    many = 1_000_000.0
    assert run(many) and run(many, precision="bf16")
    assert not run(many, recipe=load_recipe("scattering").model_copy(update={"gflops": 100.0}))
    unadvised = VIT_S.model_copy(update={"engine": EnginePolicy(advised=False)})
    assert not run(many, recipe=unadvised)
    assert not run(many, recipe=VIT_S.model_copy(update={"compile": False, "compile_note": "it is not one"}))
    assert not run(many, precision="fp8")
    monkeypatch.setattr(auto_build, "default_runtime", lambda precision, device: "inductor")
    assert not run(many)  # nothing was measured that says it pays

    def none(precision: str, device: Any) -> str:
        raise EngineError("nothing can be built here")

    monkeypatch.setattr(auto_build, "default_runtime", none)
    assert not run(many)


def test_built_for_the_batch_size_of_the_run(run: Callable[..., list[Any]]) -> None:
    assert [options.batch_size for options in run(50_000, batch_size=32)] == [32]


@pytest.mark.parametrize(
    ("encoder", "built"),
    [
        ({"name": "prost40m", "runtime": "torch", "precision": "fp32"}, False),
        ({"name": "x", "below": {"name": "prost40m", "runtime": "torch", "precision": "fp32"}}, False),
        ({"name": "prost40m", "runtime": "torch", "precision": "bf16"}, True),
        ({"name": "prost40m", "runtime": "openvino", "precision": "fp32"}, True),
        ({"name": "uni", "runtime": "torch", "precision": "fp32"}, True),
    ],
)
def test_what_pytorch_began_it_goes_on_with(
    run: Callable[..., list[Any]], tmp_path: Path, encoder: dict[str, Any], built: bool
) -> None:
    folder = tmp_path / "out" / "encoders" / "another" / "tile_embeddings"
    folder.mkdir(parents=True)
    sidecar = {"encoder_name": encoder["name"], "compatibility": {"encoder": encoder}}
    (folder / "a.meta.json").write_text(json.dumps(sidecar))
    assert bool(run(50_000, output_dir=tmp_path / "out")) is built
    assert ("torch" in runtimes_in(tmp_path / "out", "prost40m", "fp32")) is not built


def test_nothing_is_there_before_the_first_run(run: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert runtimes_in(tmp_path / "new", "prost40m", "fp32") == set()
    assert run(50_000, output_dir=tmp_path / "new")


# how many tiles ------------------------------------------------------------------------------------


def test_short_runs_are_not_looked_at(slides: list[Slide], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_build, "EngineStore", None)  # nor the store
    for slide in slides:
        slide.image_path.write_bytes(b"\0" * 10_000)  # ten tiles at most
    target = EngineTarget(VIT_S, "default", CPU, lambda: "w")
    build_where_it_pays(nn.Identity(), target, "fp32", slides, CONFIG)


def test_most_tiles_by_the_sizes_of_files(slides: list[Slide], tmp_path: Path) -> None:
    assert most_tiles(slides, CONFIG) == pytest.approx(4 * 10_000_000 / (0.02 * 224**2))
    overlapping = CONFIG.updated(overlap=0.5)
    assert most_tiles(slides, overlapping) == pytest.approx(4 * most_tiles(slides, CONFIG))
    assert most_tiles([*slides, Slide(sample_id="e", image_path=tmp_path / "missing.svs")], CONFIG) == float(
        "inf"
    )
    assert most_tiles(slides, CONFIG.updated(read_tiles_from=tmp_path)) == float("inf")


def test_expected_tiles_of_a_few(slides: list[Slide], reference_slide: Path) -> None:
    good, broken = Slide(sample_id="good", image_path=reference_slide), slides[0]
    plan = plan_slide(good, CONFIG)
    plan.source.close()
    tiles = len(plan.tiling)
    assert tiles > 5 and expected_tiles([good], CONFIG) == tiles < most_tiles([good], CONFIG)
    area = 2220 * 2967 * 0.499**2 / (224 * 0.5) ** 2  # its pixels and spacing, as OpenSlide gives them
    assert most_tiles_by_area([broken, good], CONFIG) == pytest.approx(2 * area, rel=1e-6)
    assert tiles < area and most_tiles_by_area([broken], CONFIG) == 0.0
    assert expected_tiles([good] * 100, CONFIG) == 100 * tiles
    assert expected_tiles([broken, good], CONFIG) == 2 * tiles  # the run says that it is broken
    assert expected_tiles([broken], CONFIG) == expected_tiles([], CONFIG) == 0.0


# for real ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_built_is_used(tmp_path: Path, slides: list[Slide], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(auto_build, "LEAST_S", 0.0)
    for counted in ("expected_tiles", "most_tiles_by_area"):
        monkeypatch.setattr(auto_build, counted, lambda slides, config: 1e9)
    recipe = tiny_recipe()
    encoder = tiny_encoder(recipe)
    target = EngineTarget(recipe, "both", CPU, lambda: weights_digest(encoder))
    build_where_it_pays(encoder, target, "fp32", slides, CONFIG.updated(requested_tile_size_px=SIDE))
    record = only(EngineStore()).record
    assert (record.runtime, record.precision) == ("openvino", "fp32")
    if not record.is_slower:
        assert select_engine("auto", encoder, target, "fp32").engine.runtime == "openvino"
    monkeypatch.setattr(auto_build, "build_engine", None)
    build_where_it_pays(encoder, target, "fp32", slides, CONFIG.updated(requested_tile_size_px=SIDE))


# bf16 ----------------------------------------------------------------------------------------------


def test_bf16_is_offered_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(auto_build, "_offered", [])
    cpu, gpu = (EngineTarget(VIT_S, "default", torch.device(name), lambda: "w") for name in ("cpu", "cuda"))
    with caplog.at_level(logging.INFO, "slide2vec"):
        monkeypatch.setattr(auto_build, "cpu_instructions", lambda: ["avx2", "avx512_f"])
        offer_bf16(cpu, "fp32")
        monkeypatch.setattr(auto_build, "cpu_instructions", lambda: ["avx512_bf16"])
        offer_bf16(cpu, "bf16")
        offer_bf16(gpu, "fp32")
        assert not caplog.records
        for _ in range(2):
            offer_bf16(cpu, "fp32")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "--precision bf16" in said and "0.99997" in said and "1.7 times" in said


def test_figures_of_bf16_are_those_of_the_note() -> None:
    note = Path(__file__).parents[2] / "benchmarks/results/engines-2026-11-25.md"
    rows = {
        line.split("|")[1].strip(): line.split("|")[2]
        for line in note.read_text().splitlines()
        if "(383" in line
    }
    speed = {name: float(cell.split("(")[0].removesuffix("tiles/s ")) for name, cell in rows.items()}
    assert speed["openvino bf16"] / speed["openvino fp32"] == pytest.approx(1.7, abs=0.05)
    assert speed["torch bf16"] / speed["torch fp32"] == pytest.approx(2.1, abs=0.05)
