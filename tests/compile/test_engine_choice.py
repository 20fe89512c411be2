"""Which engine is chosen, with records of plain values and an engine that is none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from compile_helpers import tiny_recipe
from torch import nn

from slide2vec.compile import engine_choice
from slide2vec.compile.engine_choice import find_engine, select_engine
from slide2vec.compile.engine_key import EngineTarget
from slide2vec.compile.store import EngineStore, StoredEngine
from slide2vec.encoders.known_digests import WeightsFiles
from slide2vec.encoders.late import LateEncoder
from slide2vec.errors import EngineError, ExtraMissingError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import EngineRecord
from slide2vec.runtime.torch_engine import TorchEngine

RUNTIMES = ("openvino", "inductor")
ENCODER = nn.Identity()
SUBJECT = EngineTarget(tiny_recipe(), "both", torch.device("cpu"), lambda: "w")


def an_engine(name: str, *, speed: float | None = 200.0, **changes: Any) -> StoredEngine:
    fields = {
        **{"key": "", "identity": {}, "preset": "tiny", "variant": "both", "runtime": "openvino"},
        **{"precision": "bf16", "asked_precision": "bf16", "layout": "float32_nchw", "input_size_px": 64},
        **{"feature_dim": 128, "profile": BatchProfile(1, 4, 8), "file": "a", "opset": None, "parity": {}},
        **{"licence": "", "versions": {}, "built_at": "", "build_seconds": 1.0},
        "speed": {} if speed is None else {"engine": speed, "torch": 100.0},
    }
    return StoredEngine(Path(name), EngineRecord(**{**fields, **changes}))


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every engine fits; which were loaded. An engine named "broken…" does not load."""
    names: list[str] = []

    def load(directory: Path, device: torch.device) -> Any:
        names.append(directory.name)
        if directory.name.startswith("broken"):
            raise EngineError("it is broken")
        if directory.name.startswith("foreign"):
            raise ExtraMissingError("it is not installed")
        return SimpleNamespace(runtime=directory.name, holds_gil=False)

    monkeypatch.setattr(engine_choice, "load_engine", load)
    monkeypatch.setattr(engine_choice, "not_here", lambda *args: None)
    monkeypatch.setattr(engine_choice, "differences", lambda subject, record: [])
    return names


class Store(list[StoredEngine]):
    """Engines that are not on disk."""

    def takes_note(self, what: str) -> bool:
        return False


def chosen(engines: Sequence[StoredEngine], choice: str = "auto", precision: str = "bf16") -> str:
    store: Any = Store(engines)
    return select_engine(choice, ENCODER, SUBJECT, precision, store=store).engine.runtime


def ranked(engines: Sequence[StoredEngine], precision: str = "bf16") -> list[str]:
    store: Any = engines
    return [engine.name for engine in find_engine(store, SUBJECT, precision, RUNTIMES).matching]


BEST_FIRST = [
    an_engine("fast"),
    an_engine("slow", speed=150.0),
    an_engine("not measured", speed=None),
    an_engine("fast, less exact", speed=900.0, precision="fp32"),
    an_engine("other runtime, exact", speed=900.0, runtime="inductor"),
    an_engine("other runtime", speed=950.0, runtime="inductor", precision="fp32"),
]


def test_by_runtime_then_precision_then_speed(loaded: list[str]) -> None:
    expected = [engine.name for engine in BEST_FIRST]
    for order in itertools.islice(itertools.permutations(BEST_FIRST), 0, None, 37):
        assert ranked(order) == expected
    assert chosen(BEST_FIRST[::-1]) == "fast" and loaded == ["fast"]
    for before, after in itertools.pairwise(BEST_FIRST):
        assert chosen([after, before]) == before.name


class Waiting(LateEncoder):
    """One that is known, and not built."""

    def __init__(self) -> None:
        super().__init__(lambda: ENCODER)
        self._module, self._files = None, WeightsFiles({})


def test_an_encoder_is_built_when_pytorch_runs_it() -> None:
    encoder, store = Waiting(), cast(Any, [an_engine("a")])
    assert select_engine("auto", encoder, SUBJECT, "bf16", store=store).engine.runtime == "a"
    engine = select_engine("torch", encoder, SUBJECT, "fp32").engine
    assert (engine.runtime, engine.precision, engine.feature_dim) == ("torch", "fp32", 128)
    assert (engine.layout, engine.holds_gil, engine.device.type) == ("float32_nchw", False, "cpu")
    engine.close()
    assert not encoder.is_built
    pixels = torch.rand(2, 3)
    assert torch.equal(engine.run(pixels), pixels) and encoder.is_built
    assert isinstance(select_engine("torch", encoder, SUBJECT, "fp32").engine, TorchEngine)
    engine.close()


def test_on_cuda_an_encoder_is_built_before_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of memory, and graphs that others capture, must not meet weights that are being loaded."""
    monkeypatch.setattr(engine_choice, "torch_engine", lambda *args, **more: SimpleNamespace(runtime="torch"))
    encoder = Waiting()
    gpu = EngineTarget(tiny_recipe(), "both", torch.device("cuda"), lambda: "w")
    assert select_engine("torch", encoder, gpu, "fp32").engine.runtime == "torch" and encoder.is_built


@pytest.mark.parametrize(
    "changes",
    [
        *({"preset": "other"}, {"variant": "cls"}, {"runtime": "tensorrt"}),
        {"precision": "fp16", "asked_precision": "fp16"},
    ],
)
def test_engines_of_something_else(changes: dict[str, Any]) -> None:
    engines: Any = [an_engine("other", **changes)]
    found = find_engine(engines, SUBJECT, "bf16", RUNTIMES)
    assert (found.matching, found.stale) == ([], {})
    assert chosen(engines) == "torch"


@pytest.mark.parametrize("fields", [{"precision": "fp32"}, {"asked_precision": "fp8"}])
def test_what_was_built_for_a_precision_or_computes_in_it(fields: dict[str, Any]) -> None:
    assert chosen([an_engine("a", **fields)]) == "a"


def test_the_batch_size_is_that_it_was_built_for() -> None:
    store: Any = [an_engine("a")]
    assert select_engine("auto", ENCODER, SUBJECT, "bf16", store=store).batch_size == 4
    assert select_engine("torch", ENCODER, SUBJECT, "bf16", store=store).batch_size is None


@pytest.mark.parametrize(("speed", "choice", "expected"), [
    (89.0, "auto", "torch"), (91.0, "auto", "a"), (89.0, "openvino", "a"), (None, "auto", "a"),
])  # fmt: skip
def test_an_engine_that_was_slower_than_pytorch(speed: float | None, choice: str, expected: str) -> None:
    assert chosen([an_engine("a", speed=speed)], choice) == expected


def test_the_next_one_is_taken_where_one_does_not_load(loaded: list[str]) -> None:
    engines = [an_engine("broken"), an_engine("foreign", speed=150.0), an_engine("good", speed=120.0)]
    assert chosen(engines) == "good" and loaded == ["broken", "foreign", "good"]


def test_what_is_not_used_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [an_engine(name) for name in ("broken", "stale", "elsewhere")]
    why: dict[str, Callable[..., Any]] = {
        "differences": lambda subject, record: ["graph", "device"] if record is engines[1].record else [],
        "not_here": lambda *args: "no such library" if next(turns) == 2 else None,
    }
    for name, function in why.items():
        monkeypatch.setattr(engine_choice, name, function)
    turns = itertools.count()
    with caplog.at_level(logging.WARNING):
        assert chosen(engines) == "torch"
    assert sorted(record.getMessage() for record in caplog.records) == [
        "engine broken is not used: it is broken",
        "engine elsewhere is not used: no such library",
        "engine stale is not used: built with another graph, device",
    ]
    turns = itertools.count()
    with pytest.raises(EngineError, match=r"no openvino engine of tiny \(both\) in bf16 .*stale: built with"):
        chosen(engines, "openvino")


def test_a_runtime_by_name_is_that_runtime() -> None:
    assert chosen(BEST_FIRST, "inductor") == "other runtime, exact"
    with pytest.raises(EngineError, match="no inductor engine"):
        chosen(BEST_FIRST[:4], "inductor")


def test_pytorch_looks_at_no_store(tmp_path: Path) -> None:
    class Store(EngineStore):
        def __iter__(self) -> Any:
            raise AssertionError("it was looked at")

    store = Store(tmp_path)
    assert select_engine("torch", ENCODER, SUBJECT, "bf16", store=store).engine.precision == "bf16"
    with pytest.raises(AssertionError, match="looked at"):
        select_engine("auto", ENCODER, SUBJECT, "bf16", store=store)


@pytest.mark.parametrize(("holds_gil", "device"), [(True, "cpu"), (False, "cpu"), (True, "cuda")])
def test_what_a_hold_on_pythons_lock_costs_is_told(
    caplog: pytest.LogCaptureFixture, holds_gil: bool, device: str
) -> None:
    record = SimpleNamespace(speed={"engine": 40.0, "torch": 30.0}, profile=BatchProfile(1, 8, 8))
    engine: Any = SimpleNamespace(name="tiny-inductor", record=record)
    loaded: Any = SimpleNamespace(holds_gil=holds_gil, device=torch.device(device))
    with caplog.at_level("INFO"):
        engine_choice._tell_lock(engine, loaded)
    assert ("tiny-inductor holds Python's lock while it encodes, 200 ms a batch" in caplog.text) == (
        holds_gil and device == "cpu"
    )
