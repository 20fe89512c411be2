"""What an engine would bring, from records of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec.compile.engine_key import EngineTarget, device_here
from slide2vec.compile.gain import MEASURED, Gain, expected_gain
from slide2vec.compile.store import StoredEngine
from slide2vec.recipes import load_recipe
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import EngineRecord

CPU = torch.device("cpu")
UNI = EngineTarget(load_recipe("uni"), "default", CPU, lambda: "w")  # 123.11 GFLOP


def built(preset: str, times: float, seconds: float, **changes: Any) -> StoredEngine:
    fields = {
        **{"key": "", "identity": {"device": device_here(CPU, "inductor")}, "preset": preset, "variant": "x"},
        **{"runtime": "inductor", "precision": "fp32", "asked_precision": "fp32", "layout": "float32_nchw"},
        **{"input_size_px": 224, "feature_dim": 1, "profile": BatchProfile(1, 1, 1), "file": "a"},
        **{"opset": None, "parity": {}, "licence": "", "versions": {}, "built_at": ""},
        **{"build_seconds": seconds, "speed": {"engine": 10.0 * times, "torch": 10.0}},
    }
    return StoredEngine(Path(preset), EngineRecord(**{**fields, **changes}))


@pytest.mark.parametrize(
    ("tiles", "pays"),
    # PyTorch 10 tiles/s, the engine 20: a tile saves 0.05 s; the build of 20 s has to save more than 30 s.
    [(0, False), (400, False), (599, False), (601, True), (100_000, True)],
)
def test_pays_where_it_saves_half_as_much_again_as_the_build_takes(tiles: int, pays: bool) -> None:
    assert Gain("openvino", 2.0, 20.0).pays(tiles, 10.0) is pays


def test_an_engine_that_is_no_faster_never_pays() -> None:
    assert not Gain("openvino", 1.0, 0.0).pays(1e9, 10.0)
    assert not Gain("openvino", 0.5, 1.0).pays(1e9, 10.0)


def test_seconds() -> None:
    assert Gain("openvino", 2.0).seconds(4000, 10.0) == 200.0
    assert Gain("openvino", 2.0, 33.0).build_seconds(10.0) == 33.0
    # not recorded: 12 s, and 110 tiles in PyTorch
    assert Gain("openvino", 2.0).build_seconds(10.0) == 23.0
    assert Gain("openvino", 2.0).build_seconds(0.5) == 232.0


def test_the_most_similar_encoder_that_was_built_here_tells() -> None:
    small, like, large = built("h0-mini", 3.0, 30.0), built("gpfm", 2.5, 60.0), built("virchow2", 1.5, 200.0)
    gflops = UNI.recipe.gflops / load_recipe("gpfm").gflops
    found = expected_gain([small, like, large], UNI, "fp32", "inductor")
    assert found is not None and (found.runtime, found.times) == ("inductor", 2.5)
    assert found.build_s == pytest.approx(12.0 + 48.0 * gflops)
    own = built("uni", 2.2, 70.0)
    assert expected_gain([small, like, own, large], UNI, "fp32", "inductor") == Gain("inductor", 2.2, 70.0)
    only = expected_gain([large], UNI, "fp32", "inductor")  # 2.76 times the work
    assert only is not None and only.times == 1.5
    assert only.build_s == pytest.approx(12.0 + 188.0 * 123.11 / 340.13, rel=1e-3)


@pytest.mark.parametrize(
    "engine",
    [
        built("prost40m", 3.0, 30.0),  # a tenth of the work
        built("gpfm", 3.0, 30.0, precision="bf16"),
        built("gpfm", 3.0, 30.0, runtime="openvino"),
        built("gpfm", 3.0, 30.0, speed={}),
        built("gpfm", 3.0, 30.0, identity={"device": {"type": "cpu", "machine": "vax"}}),
        built("timm:vit_large", 3.0, 30.0),
        built("of another version", 3.0, 30.0),
    ],
    ids=lambda engine: f"{engine.name} {engine.record.precision} {engine.record.runtime}",
)
def test_engines_that_tell_nothing(engine: StoredEngine) -> None:
    assert expected_gain([engine], UNI, "fp32", "inductor") is None


def test_without_engines_it_is_as_measured() -> None:
    assert expected_gain([], UNI, "fp32", "openvino") == Gain("openvino", MEASURED["openvino", "fp32"])
    assert expected_gain([], UNI, "bf16", "openvino") == Gain("openvino", MEASURED["openvino", "bf16"])
    assert expected_gain([], UNI, "bf16", "tensorrt") is None
    assert MEASURED["openvino", "fp32"] == pytest.approx(33.3 / 15.6, abs=0.05)
    assert MEASURED["openvino", "bf16"] == pytest.approx(55.8 / 33.2, abs=0.05)
