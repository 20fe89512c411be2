"""Engines of TensorRT-RTX: built by NVIDIA's own library without a GPU, and proven at first use on one.

The GPU is a stand-in: what it is called and can do. An engine that runs there is PyTorch's under its name.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_helpers import CPU, build, copied, only, tiny_encoder, tiny_recipe
from rtx_compiler import WHY_NOT
from torch import Tensor, nn

from slide2vec.compile import (
    BuildOptions,
    EngineStore,
    EngineTarget,
    StoredEngine,
    find_engine,
    inductor_builder,
    plan_builder,
    select_engine,
)
from slide2vec.compile import build as build_module
from slide2vec.compile import engine_choice as select_module
from slide2vec.compile.builders import default_runtime
from slide2vec.compile.proof import proofs, prove_anew, state
from slide2vec.compile.tensorrt import build_plan, check_targets, default_targets
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import ConfigError, EngineError
from slide2vec.recipes import EnginePolicy, Recipe
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.loading import runtimes_for
from slide2vec.runtime.record import RECORD_NAME
from slide2vec.runtime.tensorrt.available import TARGETS, unsuited
from slide2vec.runtime.torch_engine import TorchEngine

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

GPU = torch.device("cuda")
BF16 = BuildOptions(runtime="tensorrt-rtx", precision="bf16", targets=("sm120", "sm89"), keep_onnx=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> StoredEngine:
    recipe = tiny_recipe()
    return build(recipe, tiny_encoder(recipe), EngineStore(tmp_path_factory.mktemp("built")), BF16)


@pytest.fixture
def store(built: StoredEngine, tmp_path: Path) -> EngineStore:
    return copied(built, tmp_path)


# building, for real ---------------------------------------------------------------------------


def test_what_was_built_without_a_gpu(built: StoredEngine) -> None:
    record = built.record
    assert (record.runtime, record.precision, record.opset) == ("tensorrt-rtx", "bf16", 23)
    assert record.identity["device"] == {"type": "cuda", "targets": ["sm89", "sm120"]}
    assert record.identity["runtime_version"] == record.versions["tensorrt-rtx"] != ""
    assert record.parity == {} and record.speed == {} and state(built).startswith("not yet proven")
    assert record.profile == BatchProfile(1, 256, 256)  # a GPU's, not this machine's
    assert {path.name for path in built.directory.iterdir()} == {
        *("encoder.plan", "encoder.onnx", "encoder.onnx.data", "reference.npz", "LICENCE.txt", RECORD_NAME)
    }
    assert built.damage() is None and "encoder.plan" in record.checksums


def test_attention_that_stays_in_fp32(encoder: nn.Module, tmp_path: Path) -> None:
    """No kernel has it as one operator, in an engine of fp16 neither: opset 20 spells it out."""
    policy = EnginePolicy(islands=("norm", "patch_embed", "attention"))
    options = BuildOptions(runtime="tensorrt-rtx", precision="fp16", targets=("sm89",))
    made = build(tiny_recipe(engine=policy), encoder, EngineStore(tmp_path), options)
    assert (made.record.precision, made.record.opset) == ("fp16", 20)


def test_the_plan_is_of_its_own_library(built: StoredEngine) -> None:
    """As far as it can tell without a GPU: a header of its own format and version, and nothing else is."""
    from slide2vec.runtime.tensorrt.library import Library
    from slide2vec.runtime.tensorrt.rtx import invalidity

    library = Library("tensorrt-rtx")
    runtime = library.new_runtime(library.log())
    plan = (built.directory / "encoder.plan").read_bytes()
    if not torch.cuda.is_available():
        assert invalidity(runtime, plan) == []  # no fault of the plan; there is no GPU
    for broken in (b"", plan[:32], b"x" * 1000):
        assert invalidity(runtime, broken) == ["it is no plan of this version of TensorRT-RTX"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_running_it_without_a_gpu_fails_in_words(built: StoredEngine, tmp_path: Path) -> None:
    from slide2vec.runtime.tensorrt.plans import Plan

    with pytest.raises(EngineError, match=r"does not load: .*GPU driver is installed"):
        Plan(built.directory / "encoder.plan", "tensorrt-rtx")
    (tmp_path / "encoder.plan").write_bytes(b"x" * 1000)
    with pytest.raises(EngineError, match="does not load: it is no plan of this version of TensorRT-RTX"):
        Plan(tmp_path / "encoder.plan", "tensorrt-rtx")


def test_what_is_there_is_not_built_again(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_Build", None)
    assert build(recipe, encoder, store, BF16) == only(store)
    assert build(recipe, encoder, store, replace(BF16, targets=("sm89", "sm120"))) == only(store)
    with pytest.raises(TypeError):  # it is built
        build(recipe, encoder, store, replace(BF16, targets=("sm89",)))


@pytest.fixture
def plan_of(built: StoredEngine, tmp_path: Path) -> Callable[..., Path]:
    """Builds the ONNX of that engine."""

    def made(**options: Any) -> Path:
        plan = tmp_path / "encoder.plan"
        given = {"profile": BatchProfile(1, 4, 4), "precision": "bf16", "targets": ("sm89",)}
        build_plan(built.directory / "encoder.onnx", plan, runtime="tensorrt-rtx", **{**given, **options})
        return plan

    return made


@pytest.mark.parametrize("targets", [("sm80",), ("sm80", "sm86", "sm89", "sm120", "sm121")])
def test_targets(targets: tuple[str, ...], plan_of: Callable[..., Path]) -> None:
    assert plan_of(targets=targets).stat().st_size > 100_000


def test_what_it_refuses_is_refused_in_words_first(
    plan_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By us at once, in a sentence; by the library itself, should it be asked."""
    with pytest.raises(ConfigError, match="bf16 for sm80 and newer, not for sm75"):
        plan_of(targets=("sm75", "sm89"))
    monkeypatch.setattr("slide2vec.compile.tensorrt.check_targets", lambda targets, precision: None)
    with pytest.raises(EngineError, match=r"TensorRT-RTX cannot build .*sm75"):
        plan_of(targets=("sm75", "sm89"))


def test_progress_of_the_real_builder(plan_of: Callable[..., Path]) -> None:
    told: list[tuple[str, int, int]] = []
    plan_of(on_progress=lambda *step: told.append(step))
    assert told[0] == ("Building engine", 0, told[0][2]) and told[-1][1] == told[-1][2]
    assert {phase for phase, _, _ in told} >= {"Building engine", "Optimizing graph"}


def test_ctrl_c_stops_the_real_builder(plan_of: Callable[..., Path], tmp_path: Path) -> None:
    told: list[str] = []

    def progress(phase: str, done: int, steps: int) -> None:
        told.append(phase)
        if phase == "Optimizing graph" and done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        plan_of(on_progress=progress)
    assert "Timing tactics" not in told and not (tmp_path / "encoder.plan").exists()


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"none")
    with pytest.raises(EngineError, match=r"TensorRT-RTX cannot parse .*encoder\.onnx"):
        build_plan(
            tmp_path / "encoder.onnx",
            tmp_path / "encoder.plan",
            profile=BatchProfile(1, 4, 4),
            precision="bf16",
            runtime="tensorrt-rtx",
            targets=("sm89",),
        )


def test_too_little_workspace(plan_of: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=r"cannot build .*[wW]orkspace"):
        plan_of(workspace_bytes=1 << 16)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            replace(BF16, precision="fp8", targets=("sm86",)),
            ConfigError,
            "fp8 for sm89 and newer, not for sm86",
        ),
        (replace(BF16, targets=("sm90",)), ConfigError, "not for sm90: TensorRT does"),
        (replace(BF16, hardware_compatibility="ampere_plus"), ConfigError, "TensorRT-RTX has targets"),
        (replace(BF16, runtime="openvino"), ConfigError, "targets are TensorRT-RTX's"),
    ],
)
def test_options_that_make_no_sense(
    options: BuildOptions,
    error: type[Exception],
    said: str,
    recipe: Recipe,
    encoder: nn.Module,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said):
        build(recipe, encoder, EngineStore(tmp_path), options)


def test_way_down_of_what_the_library_cannot_build(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp8 of a graph without fp8 answers in fp16; nothing is tried that the targets do not compute in."""
    tried: list[str] = []

    def failing(job: Any) -> Any:
        tried.append(job.precision)
        raise EngineError("out of luck")

    monkeypatch.setattr(plan_builder, "build", failing)
    for options, expected in (
        (BuildOptions(runtime="tensorrt-rtx", precision="fp8"), ["fp8", "fp16", "bf16", "fp32"]),
        (BuildOptions(precision="fp16", targets=("sm75",)), ["fp16"]),
    ):
        tried.clear()
        with pytest.raises(EngineError, match="out of luck"):
            build(recipe, encoder, EngineStore(tmp_path), options)
        assert tried == expected


# using, on a stand-in for a GPU ---------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An L40S; what it is may be changed."""
    here = SimpleNamespace(name="NVIDIA L40S", capability=(8, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: here.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: here.name)
    return here


class Plain:
    """PyTorch on that GPU, in name."""

    runtime = "torch"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class Engine(TorchEngine):
    """The encoder as an engine, which may be wrong; in fp32, on the CPU."""

    runtime = "tensorrt-rtx"
    loaded: list[Engine]

    def __init__(self, encoder: nn.Module, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__(encoder, feature_dim=128, precision="fp32", device=CPU)
        self.spoil, self.closed = spoil, False
        Engine.loaded.append(self)

    def run(self, pixels: Tensor) -> Tensor:
        return self.spoil(super().run(pixels))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def runs(
    encoder: nn.Module, recipe: Recipe, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """What a loaded engine computes (`spoil`), how fast it is, and `select(choice)`."""
    Engine.loaded = []
    how = SimpleNamespace(spoil=lambda features: features, speed={"engine": 200.0, "torch": 100.0}, timed=0)

    def timed(*args: Any) -> dict[str, float]:
        how.timed += 1
        return how.speed

    subject = EngineTarget(recipe, "both", GPU, lambda: weights_digest(encoder))
    for module in (select_module, "slide2vec.compile.proof"):
        where = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{where}.load_engine", lambda folder, device: Engine(encoder, how.spoil))
    monkeypatch.setattr("slide2vec.compile.proof.beside_torch", timed)
    monkeypatch.setattr(select_module, "torch_engine", Plain)
    how.subject = subject
    how.select = lambda store, choice="auto": (
        select_engine(choice, encoder, subject, "bf16", store=store).engine
    )
    return how


def test_hit_on_the_gpus_it_was_built_for(
    store: EngineStore, runs: SimpleNamespace, gpu: SimpleNamespace
) -> None:
    for capability, is_hit in (((8, 9), True), ((12, 0), True), ((8, 6), False)):
        gpu.capability = capability
        found = find_engine(store, runs.subject, "bf16", ("tensorrt-rtx",))
        assert ([engine.name for engine in found.matching] == [only(store).name]) == is_hit
    assert found.stale == {only(store).name: "built with another device"}
    gpu.capability = (9, 0)
    found = find_engine(store, runs.subject, "bf16", ("tensorrt-rtx",))
    assert "not for sm90" in found.stale[only(store).name]


def test_proven_at_first_use_and_only_then(
    store: EngineStore, runs: SimpleNamespace, gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert runs.select(store).runtime == "tensorrt-rtx"
    assert "used for the first time on NVIDIA L40S" in caplog.text
    (proof,) = proofs(only(store))
    assert proof.gpu == "NVIDIA L40S" and proof.problem == "" and proof.speed == runs.speed
    assert proof.parity["min_cosine"] > 0.99999 and proof.parity["tiles"] == 16
    assert proof.parity["least"] == 0.999  # of bf16
    assert state(only(store)) == "proven on NVIDIA L40S" and only(store).damage() is None
    caplog.clear()
    with caplog.at_level("INFO"):
        assert runs.select(store).runtime == "tensorrt-rtx"
    assert "first time" not in caplog.text and runs.timed == 1
    gpu.name = "NVIDIA GeForce RTX 4090"  # built for, and not proven on
    assert runs.select(store, "tensorrt-rtx").runtime == "tensorrt-rtx"
    assert [each.gpu for each in proofs(only(store))] == ["NVIDIA GeForce RTX 4090", "NVIDIA L40S"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda features: features + 3 * features.std(), "least cosine"),
        (lambda features: features / 0, "not finite"),
        (lambda features: features.roll(1, 0) if len(features) == 8 else features, "least cosine"),
    ],
    ids=["far off", "not finite", "wrong in one batch size"],
)
def test_failed_proof_runs_pytorch_and_says_why(
    store: EngineStore, runs: SimpleNamespace, spoil: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs.spoil = spoil
    assert runs.select(store).runtime == "torch"
    assert said in caplog.text and "is not used: on NVIDIA L40S" in caplog.text
    assert Engine.loaded[0].closed and runs.timed == 0
    caplog.clear()
    assert runs.select(store).runtime == "torch"  # it is remembered
    assert len(Engine.loaded) == 1 and said in caplog.text and "engines verify" in caplog.text
    assert state(only(store)).startswith("failed on NVIDIA L40S:")
    with pytest.raises(EngineError, match=said):
        runs.select(store, "tensorrt-rtx")
    runs.spoil = lambda features: features
    assert prove_anew(only(store), GPU).min_cosine > 0.99999
    assert runs.select(store).runtime == "tensorrt-rtx"


def test_engine_that_fails_to_run_is_not_remembered(
    store: EngineStore, runs: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(features: Tensor) -> Tensor:
        raise EngineError("no memory is left")

    runs.spoil = failing
    assert runs.select(store).runtime == "torch"
    assert "no memory is left" in caplog.text and list(proofs(only(store))) == []
    assert Engine.loaded[0].closed


def test_damaged_plan_is_not_loaded(store: EngineStore, runs: SimpleNamespace) -> None:
    plan = only(store).directory / "encoder.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"encoder\.plan has changed since it was built"):
        runs.select(store, "tensorrt-rtx")
    assert Engine.loaded == []


def test_slower_than_pytorch(store: EngineStore, runs: SimpleNamespace) -> None:
    runs.speed = {"engine": 50.0, "torch": 100.0}
    for _ in range(2):  # as it is proven, and later
        assert runs.select(store).runtime == "torch"
    assert [engine.closed for engine in Engine.loaded] == [True]
    assert runs.select(store, "tensorrt-rtx").runtime == "tensorrt-rtx"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"parity": {}}', None],
    ids=["cut off", "list", "empty", "incomplete", "of another plan"],
)
def test_a_proof_that_is_none(store: EngineStore, runs: SimpleNamespace, content: str | None) -> None:
    runs.select(store)
    (path,) = only(store).directory.glob("proof-*.json")
    if content is None:
        content = json.dumps({**json.loads(path.read_text()), "plan": "0" * 64})
    path.write_text(content)
    assert list(proofs(only(store))) == []
    assert runs.select(store).runtime == "tensorrt-rtx"
    assert len(list(proofs(only(store)))) == 1 and runs.timed == 2


def test_store_that_cannot_be_written_to(
    store: EngineStore, runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slide2vec.errors import OutputError

    def full(path: Path) -> Any:
        raise OutputError(f"{path}: no space left on device")

    monkeypatch.setattr("slide2vec.compile.proof.atomic_path", full)
    assert runs.select(store).runtime == "tensorrt-rtx"
    assert list(proofs(only(store))) == []


# which of the two -----------------------------------------------------------------------------


def test_which_is_built_and_which_is_used(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX is built by default where it knows the GPU; an engine of TensorRT is used where one is."""
    no_plans, no_tensorrt = plan_builder.unavailable, list[str | None]([None])

    def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
        return no_plans(runtime, precision, device) if runtime == "tensorrt-rtx" else no_tensorrt[-1]

    monkeypatch.setattr(plan_builder, "unavailable", unavailable)
    monkeypatch.setattr(inductor_builder, "unavailable", lambda *args: None)
    assert runtimes_for(GPU) == ("tensorrt", "tensorrt-rtx", "inductor")
    for capability, precision, expected in (
        ((8, 9), "bf16", "tensorrt-rtx"),
        ((12, 0), "fp8", "tensorrt-rtx"),
        ((8, 0), "bf16", "tensorrt-rtx"),
        ((8, 0), "fp8", "tensorrt"),
        ((9, 0), "bf16", "tensorrt"),
        ((10, 0), "bf16", "tensorrt"),
        ((7, 5), "bf16", "tensorrt"),
        ((7, 5), "fp16", "tensorrt-rtx"),
    ):
        gpu.capability = capability
        assert default_runtime(precision, GPU) == expected
    no_tensorrt.append("it is not installed")
    gpu.capability = (9, 0)
    assert default_runtime("bf16", GPU) == "inductor"


def test_targets_by_precision() -> None:
    assert default_targets("bf16") == ("sm80", "sm86", "sm89", "sm120")
    assert default_targets("fp8") == ("sm89", "sm120")
    assert [name for name in TARGETS if unsuited(name, "fp16") is None] == list(TARGETS)
    with pytest.raises(ConfigError, match="not for sm90"):
        check_targets(("sm89", "sm90"), "bf16")
    with pytest.raises(ConfigError, match="needs a target"):
        check_targets((), "bf16")
