"""Our own part of the TensorRT engine on a fake TensorRT and fake CUDA: contexts, splitting, padding, graphs.

That the fake is like TensorRT: test_tensorrt_contract.py. The real thing: test_tensorrt_gpu.py.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import pytest
import torch
from fake_tensorrt import a_plan, expected

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt import TensorRTEngine, available, engine, unavailable

Journal = list[tuple[Any, ...]]
PROFILE = BatchProfile(min=1, opt=4, max=8)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr(engine, "require", lambda runtime, device: None)
    with fake_tensorrt.installed():
        yield fake_cuda.install(monkeypatch)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TensorRTEngine]:
    def made(plan: bytes | None = None, **options: Any) -> TensorRTEngine:
        path = tmp_path / "encoder.plan"
        path.write_bytes(a_plan() if plan is None else plan)
        given = {"profile": PROFILE, "layout": "float32_nchw", "feature_dim": 5, "precision": "fp16"}
        return TensorRTEngine(path, device=torch.device("cpu"), **{**given, **options})

    return made


def tiles(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def executed(journal: Journal) -> list[tuple[Any, ...]]:
    return [entry for entry in journal if entry[0] in ("execute", "replay")]


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 21])
def test_any_batch_gives_its_features(
    count: int, cuda_graphs: bool, make: Callable[..., TensorRTEngine]
) -> None:
    made = make(cuda_graphs=cuda_graphs)
    for seed in range(3):  # buffers are used again
        pixels = tiles(count, seed)
        features = made.run(pixels)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, torch.from_numpy(expected(pixels.numpy(), 5)))


def test_features_are_the_callers(make: Callable[..., TensorRTEngine]) -> None:
    made = make(contexts=1)
    first = made.run(tiles(4, 0))
    kept = first.clone()
    made.run(tiles(4, 1))
    assert torch.equal(first, kept)


def test_uint8_tiles(make: Callable[..., TensorRTEngine]) -> None:
    made = make(a_plan(row=(4, 4, 3), dtype="UINT8"), layout="uint8_nhwc")
    pixels = torch.arange(3 * 48, dtype=torch.uint8).reshape(3, 4, 4, 3)
    torch.testing.assert_close(made.run(pixels), torch.from_numpy(expected(pixels.numpy(), 5)))


def test_fixed_batches_run_as_graphs_and_others_do_not(
    make: Callable[..., TensorRTEngine], fakes: Journal
) -> None:
    made = make()
    fakes.clear()
    for count in (4, 8, 4, 3):
        made.run(tiles(count))
    assert [entry[0] for entry in executed(fakes)] == ["replay", "replay", "replay", "execute"]
    assert executed(fakes)[-1][2] == 3


def test_a_graph_is_captured_after_one_run_of_its_shape(
    make: Callable[..., TensorRTEngine], fakes: Journal
) -> None:
    make(profile=BatchProfile(1, 8, 8), contexts=1)
    kinds = [entry[0] for entry in fakes if entry[0] in ("execute", "synchronize")]
    assert kinds == ["execute", "synchronize", "execute"]


def test_without_graphs_nothing_is_captured(make: Callable[..., TensorRTEngine], fakes: Journal) -> None:
    made = make(cuda_graphs=False)
    assert executed(fakes) == []
    made.run(tiles(8))
    assert [entry[0] for entry in executed(fakes)] == ["execute"]


def test_what_cannot_be_captured_runs_without(
    make: Callable[..., TensorRTEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_cuda.install(monkeypatch, capture_fails=True)
    with caplog.at_level(logging.WARNING):
        made = make()
    assert "runs without CUDA graphs" in caplog.text
    torch.testing.assert_close(made.run(tiles(4)), torch.from_numpy(expected(tiles(4).numpy(), 5)))


def test_streams_are_ordered_by_events_and_the_host_waits_for_nothing(
    make: Callable[..., TensorRTEngine], fakes: Journal
) -> None:
    made = make(cuda_graphs=False)
    caller = torch.cuda.current_stream().cuda_stream
    fakes.clear()
    made.run(tiles(2))
    ready, begin, run, done, end = fakes
    stream = run[1]
    assert stream != caller
    assert ready[:2] == ("record", caller) and begin == ("wait", stream, ready[2])
    assert run == ("execute", stream, 2)
    assert done[:2] == ("record", stream) and end == ("wait", caller, done[2])


def test_lanes_are_used_in_turn(make: Callable[..., TensorRTEngine], fakes: Journal) -> None:
    made = make(cuda_graphs=False, contexts=2)
    fakes.clear()
    made.run(tiles(32))
    streams = [entry[1] for entry in executed(fakes)]
    assert len(set(streams)) == 2 and streams[:2] == streams[2:]


def test_a_batch_below_the_profile_is_padded(make: Callable[..., TensorRTEngine], fakes: Journal) -> None:
    made = make(profile=BatchProfile(4, 6, 8), cuda_graphs=False)
    features = made.run(tiles(10))  # 8 and 2
    assert [entry[2] for entry in executed(fakes)] == [8, 4]
    torch.testing.assert_close(features, torch.from_numpy(expected(tiles(10).numpy(), 5)))


def test_threads_share_an_engine(make: Callable[..., TensorRTEngine]) -> None:
    made = make(cuda_graphs=False, contexts=2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for count in (1, 5, 9):
            pixels = tiles(count, seed)
            if not torch.allclose(made.run(pixels), torch.from_numpy(expected(pixels.numpy(), 5))):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing(make: Callable[..., TensorRTEngine], fakes: Journal) -> None:
    made = make(contexts=2)
    fakes.clear()
    made.close()
    made.close()
    assert [entry[0] for entry in fakes] == [
        "synchronize"
    ] * 5  # two contexts each of 4 and 8 tiles, one spare
    with pytest.raises(EngineError, match="closed"):
        made.run(tiles(1))


@pytest.mark.parametrize(
    "pixels",
    [tiles(2).half(), torch.zeros(2, 4, 4, 3), torch.zeros(3, 4, 4), tiles(2).to("meta")],
    ids=["dtype", "layout", "no batch", "device"],
)
def test_other_pixels_are_refused(pixels: torch.Tensor, make: Callable[..., TensorRTEngine]) -> None:
    with pytest.raises(EngineError, match=r"takes \(B, 3, 4, 4\) float32 on cpu, not"):
        make().run(pixels)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (b"of another version", "Magic tag does not match.*build-engine"),
        (a_plan(dtype="UINT8"), "takes uint8"),
        (a_plan(dim=6), r"gives \(6,\); expected float32 and \(5,\)"),
        (a_plan(dtype="INT32"), "which no encoder has"),
    ],
)
def test_other_plans_are_refused(plan: bytes, said: str, make: Callable[..., TensorRTEngine]) -> None:
    with pytest.raises(EngineError, match=said):
        make(plan)


def test_a_batch_that_tensorrt_refuses(make: Callable[..., TensorRTEngine]) -> None:
    made = make(cuda_graphs=False)
    fake_tensorrt.STATE.enqueue_fails = True
    with pytest.raises(EngineError, match="failed on a batch of 2"):
        made.run(tiles(2))


def test_no_memory_for_contexts(make: Callable[..., TensorRTEngine]) -> None:
    fake_tensorrt.STATE.contexts_left = 1
    with pytest.raises(EngineError, match="no execution context"):
        make()


def test_a_context_is_needed(make: Callable[..., TensorRTEngine]) -> None:
    with pytest.raises(ConfigError, match="contexts=0"):
        make(contexts=0)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_batch_profiles_are_ordered(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="min <= opt <= max"):
        BatchProfile(*sizes)


def test_why_tensorrt_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert "not installed" in (unavailable() or "")
    with pytest.raises(ExtraMissingError, match=r"\[tensorrt\]"):
        available.require()
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in (unavailable() or "")
    with pytest.raises(EngineError, match="GPU"):
        available.require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unavailable() is None
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.9.0.34")
    assert "10.9.0.34 is too old: 10.14" in (unavailable() or "")
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as when a library of it is missing
    assert "does not load" in (unavailable() or "")
