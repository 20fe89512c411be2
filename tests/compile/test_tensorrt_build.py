"""Our own part of building a plan, on a fake TensorRT: settings, progress, cancelling, errors, caches.

That the fake is like TensorRT: tests/runtime/test_tensorrt_contract.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
import torch
from compile_helpers import smooth_pixels, tiny_encoder, tiny_recipe
from fake_tensorrt import ParserError

import slide2vec.compile.tensorrt as compiling
from slide2vec.compile.builders import BuildJob, builder_of
from slide2vec.compile.tensorrt import build_plan
from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt.library import Library

PROFILE = BatchProfile(1, 32, 64)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_tensorrt._State]:
    monkeypatch.setattr(compiling, "require", lambda: None)
    with fake_tensorrt.installed() as state:
        yield state


@pytest.fixture
def build(state: fake_tensorrt._State, tmp_path: Path) -> Callable[..., Path]:
    """Builds; the path of the plan."""

    def built(**options: Any) -> Path:
        plan = tmp_path / "out" / "encoder.plan"
        build_plan(tmp_path / "encoder.onnx", plan, **{"profile": PROFILE, "precision": "fp16", **options})
        return plan

    return built


def test_a_plan_is_written(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    plan = build()
    assert b'"row": [3, 4, 4]' in plan.read_bytes()
    assert [path.name for path in plan.parent.iterdir()] == ["encoder.plan"]
    assert ("create_network", 1 << fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in state.calls


def test_the_profile_is_of_the_networks_own_input(
    build: Callable[..., Path], state: fake_tensorrt._State
) -> None:
    state.inputs = [(-1, 224, 224, 3)]
    build()
    shapes = ((1, 224, 224, 3), (32, 224, 224, 3), (64, 224, 224, 3))
    assert ("set_shape", "pixels", *shapes) in state.calls


def test_a_fixed_batch(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    state.inputs = [(8, 3, 4, 4)]
    build(profile=BatchProfile(8, 8, 8))
    with pytest.raises(EngineError, match=r"\(8, 3, 4, 4\), which BatchProfile\(min=1"):
        build()


@pytest.mark.parametrize("shape", [(-1, 3, -1, -1), (-1,), ()])
def test_other_dimensions_must_be_fixed(
    shape: tuple[int, ...], build: Callable[..., Path], state: fake_tensorrt._State
) -> None:
    state.inputs = [shape]
    with pytest.raises(EngineError, match="does not fit"):
        build()


def test_one_input_is_needed(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    state.inputs *= 2
    with pytest.raises(EngineError, match="2 inputs"):
        build()


@pytest.mark.parametrize(
    ("precision", "tf32"), [("fp32", False), ("fp16", True), ("bf16", True), ("fp8", True)]
)
def test_fp32_is_true_fp32(
    precision: str, tf32: bool, build: Callable[..., Path], state: fake_tensorrt._State
) -> None:
    build(precision=precision)
    assert state.built is not None
    assert (fake_tensorrt.BuilderFlag.TF32 in state.built._flags) == tf32


def test_settings_reach_the_builder(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    build(optimization_level=5, workspace_bytes=1 << 30, hardware_compatibility="ampere_plus")
    assert state.built is not None
    assert state.built.builder_optimization_level == 5
    assert state.built._limits == {fake_tensorrt.MemoryPoolType.WORKSPACE: 1 << 30}
    assert state.built.hardware_compatibility_level == fake_tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
    build()
    assert state.built._limits == {}


def test_every_compatibility_has_its_level(state: fake_tensorrt._State) -> None:
    assert set(Library("tensorrt").compatibility) == set(compiling.COMPATIBILITY)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8"}, "precision='int8'"),
        ({"optimization_level": 6}, "optimization_level=6 is not one of 0 to 5"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
        ({"hardware_compatibility": "hopper"}, "hardware_compatibility='hopper'"),
    ],
)
def test_wrong_settings(options: dict[str, Any], said: str, build: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**options)


def test_parser_errors_in_words(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    state.parser_errors = [
        ParserError(17, "node_Attention_17", "Attention", "Assertion failed: no such thing"),
        ParserError(3, "/norm", "LayerNormalization", "unsupported type"),
    ]
    with pytest.raises(EngineError) as raised:
        build()
    assert "encoder.onnx" in str(raised.value)
    assert "no such thing (node 17, Attention 'node_Attention_17')" in str(raised.value)
    assert "unsupported type (node 3, LayerNormalization '/norm')" in str(raised.value)
    state.parser_errors = [ParserError(-1, "", "", "Failed to parse the file")]
    with pytest.raises(EngineError, match=r"encoder\.onnx: Failed to parse the file$"):
        build()


def test_a_build_that_fails_says_what_tensorrt_logged(
    build: Callable[..., Path], state: fake_tensorrt._State, tmp_path: Path
) -> None:
    state.build_error = "Could not find any implementation for node MatMul_3"
    with pytest.raises(EngineError, match=r"cannot build .*any implementation for node MatMul_3"):
        build()
    assert not (tmp_path / "out").exists()


def test_progress(build: Callable[..., Path], state: fake_tensorrt._State) -> None:
    state.phases = [("Tactics", 2), ("Writing", 1)]
    told: list[tuple[str, int, int]] = []
    build(on_progress=lambda *step: told.append(step))
    assert told == [
        ("Tactics", 0, 2),
        ("Tactics", 1, 2),
        ("Tactics", 2, 2),
        ("Tactics", 2, 2),
        ("Writing", 0, 1),
        ("Writing", 1, 1),
        ("Writing", 1, 1),
    ]


@pytest.mark.parametrize("cause", [KeyboardInterrupt, ValueError])
def test_what_progress_raises_cancels_the_build(
    cause: type[BaseException], build: Callable[..., Path], tmp_path: Path
) -> None:
    told: list[int] = []

    def progress(phase: str, done: int, steps: int) -> None:
        told.append(done)
        if done == 1:
            raise cause("enough")

    with pytest.raises(cause, match="enough"):
        build(on_progress=progress)
    assert told == [0, 1]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_cancels_the_build_and_is_raised_afterwards(
    build: Callable[..., Path], state: fake_tensorrt._State
) -> None:
    state.phases = [("Tactics", 1000)]
    told: list[int] = []

    def progress(phase: str, done: int, steps: int) -> None:
        told.append(done)
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(on_progress=progress)
    assert len(told) < 20
    assert signal.getsignal(signal.SIGINT) is before


def test_building_in_a_thread(build: Callable[..., Path]) -> None:
    plans: list[Path] = []
    thread = threading.Thread(target=lambda: plans.append(build()))
    thread.start()
    thread.join()
    assert plans[0].is_file()


def test_the_timing_cache_is_kept(build: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "timing.bin"
    build(timing_cache=cache)
    assert cache.read_bytes() == b"+"
    build(timing_cache=cache)
    assert cache.read_bytes() == b"++"


def test_a_timing_cache_of_another_gpu_is_replaced(
    build: Callable[..., Path], state: fake_tensorrt._State, tmp_path: Path
) -> None:
    cache = tmp_path / "timing.bin"
    cache.write_bytes(b"of another GPU")
    state.cache_fits = False
    assert build(timing_cache=cache).is_file()
    assert cache.read_bytes() == b"+"


def test_a_timing_cache_that_cannot_be_written_does_not_cost_the_plan(
    build: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert build(timing_cache=tmp_path / "file" / "timing.bin").is_file()
    assert "timing cache is not kept" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_the_builder_of_build_engine(
    precision: str, state: fake_tensorrt._State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of `build-engine`: export, fp8 where asked for, plan on the right device; the ONNX files go."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    recipe = tiny_recipe()
    state.inputs = [(-1, 64, 64, 3)]
    told: list[str] = []
    job = BuildJob(
        encoder=tiny_encoder(recipe),
        recipe=recipe,
        folder=tmp_path,
        device=torch.device("cuda"),
        runtime="tensorrt",
        precision=precision,
        layout="uint8_nhwc",
        profile=PROFILE,
        opset=None,
        calibration=smooth_pixels(4),
        progress=lambda what, step, of: told.append(what),
    )
    built = builder_of("tensorrt").build(job)
    assert [path.name for path in tmp_path.iterdir()] == [built.file]
    assert current == [torch.device("cuda")]
    assert ("calibrating fp8" in told) == (precision == "fp8")
    assert ("set_shape", "pixels", *((size, 64, 64, 3) for size in (1, 32, 64))) in state.calls


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.runtime.tensorrt.available.find_spec", lambda name: None)
    assert "not installed" in (compiling.unavailable() or "")
    with pytest.raises(ExtraMissingError, match=r"\[tensorrt\]"):
        build_plan(tmp_path / "a.onnx", tmp_path / "a.plan", profile=PROFILE, precision="fp32")
