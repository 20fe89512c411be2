"""The runner without PyTorch, on a fake TensorRT and a fake pycuda whose streams are asynchronous."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_pycuda
import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import a_plan, expected
from runtime_helpers import write_record

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.tensorrt import DeployedEngine, available


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = ModuleType("pycuda")
    package.driver = fake_pycuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake_pycuda)
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    with fake_tensorrt.installed():
        fake_pycuda.reset()
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Callable[..., Path]:
    def written(plan: bytes | None = None, **record: Any) -> Path:
        (tmp_path / "encoder.plan").write_bytes(a_plan() if plan is None else plan)
        write_record(tmp_path, **record)
        return tmp_path

    return written


def tiles(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 5, 18])
def test_any_batch_gives_its_features(count: int, buffers: int, directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory(), buffers=buffers) as engine:
        for seed in range(2):
            features = engine.run(tiles(count, seed))
            assert features.dtype == np.float32
            np.testing.assert_allclose(features, expected(tiles(count, seed), 5), rtol=1e-6)


def test_a_plan_stands_for_its_directory(directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory() / "encoder.plan") as engine:
        assert engine.run(tiles(2)).shape == (2, 5)
        assert engine.record.precision == "fp16"


def test_uint8_tiles(directory: Callable[..., Path]) -> None:
    pixels = np.arange(2 * 48, dtype=np.uint8).reshape(2, 4, 4, 3)
    with DeployedEngine(directory(a_plan(row=(4, 4, 3), dtype="UINT8"), layout="uint8_nhwc")) as engine:
        np.testing.assert_allclose(engine.run(pixels), expected(pixels, 5), rtol=1e-6)


def test_tiles_in_strides(directory: Callable[..., Path]) -> None:
    pixels = tiles(8)[::2, :, ::-1]
    with DeployedEngine(directory()) as engine:
        np.testing.assert_allclose(engine.run(pixels), expected(pixels, 5), rtol=1e-6)


def test_a_batch_below_the_profile_is_padded(directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory(profile={"min": 3, "opt": 4, "max": 4})) as engine:
        np.testing.assert_allclose(engine.run(tiles(5)), expected(tiles(5), 5), rtol=1e-6)
    assert [call[2] for call in fake_tensorrt.STATE.calls if call[0] == "execute"] == [4, 3]


def test_the_next_batch_is_copied_while_one_computes(directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory(), buffers=2) as engine:
        fake_pycuda.JOURNAL.clear()
        found = list(engine.stream(tiles(2, seed) for seed in range(4)))
        journal = [kind for kind, _ in fake_pycuda.JOURNAL]
    assert journal == ["in", "in", "wait", "in", "wait", "in", "wait", "wait"]
    for seed, features in enumerate(found):
        np.testing.assert_allclose(features, expected(tiles(2, seed), 5), rtol=1e-6)


def test_features_nobody_takes_do_not_reach_the_next_batch(directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory()) as engine:
        left = engine.stream([tiles(1, 0), tiles(1, 1), tiles(1, 2)])
        next(left)
        left.close()
        np.testing.assert_allclose(engine.run(tiles(3, 3)), expected(tiles(3, 3), 5), rtol=1e-6)
    assert not any(fake_pycuda.QUEUES.values())


def test_a_stream_gives_features_as_soon_as_they_are_there(directory: Callable[..., Path]) -> None:
    given: list[int] = []

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        for seed in range(9):
            given.append(seed)
            yield tiles(1, seed)

    with DeployedEngine(directory()) as engine:
        next(iter(engine.stream(batches())))
    assert len(given) == 3


def test_no_context_is_left_current_and_no_memory_taken(directory: Callable[..., Path]) -> None:
    engine = DeployedEngine(directory())
    engine.run(tiles(2))
    assert len(fake_pycuda.ALLOCATED) == 4
    engine.close()
    engine.close()
    assert fake_pycuda.PUSHED == [] and fake_pycuda.ALLOCATED == []
    with pytest.raises(EngineError, match="closed"):
        engine.run(tiles(1))


@pytest.mark.parametrize(
    "pixels", [tiles(0), tiles(1).astype(np.float64), np.zeros((1, 4, 4, 3), np.float32)]
)
def test_other_pixels_are_refused(pixels: np.ndarray[Any, Any], directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory()) as engine, pytest.raises(EngineError, match="takes 1 to 4 tiles"):
        engine.run(pixels)


def test_a_batch_of_a_stream_above_the_profile_is_refused(directory: Callable[..., Path]) -> None:
    with DeployedEngine(directory()) as engine, pytest.raises(EngineError, match="1 to 4 tiles"):
        list(engine.stream([tiles(5)]))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"layout": "nhwc"}, "its engine.json says nhwc"),
        ({"feature_dim": "many"}, "feature_dim is 'many'"),
        ({"profile": {"min": 1, "opt": 4}}, "not an engine's record"),
        ({"profile": {"min": 5, "opt": 4, "max": 4}}, "min <= opt"),
        ({"runtime": "openvino"}, "an engine of openvino, not of tensorrt"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"feature_dim": 7}, "its engine.json says"),
        ({"layout": "uint8_nhwc"}, "its engine.json says"),
    ],
)
def test_wrong_records(record: dict[str, Any], said: str, directory: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=said):
        DeployedEngine(directory(**record))


def test_missing_and_broken_records(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(EngineError, match=r"engine\.json cannot be read"):
            DeployedEngine(tmp_path)
        (tmp_path / "engine.json").write_text("{")


def test_a_plan_that_is_not_there(directory: Callable[..., Path]) -> None:
    folder = directory()
    (folder / "encoder.plan").unlink()
    with pytest.raises(EngineError, match=r"encoder\.plan cannot be read"):
        DeployedEngine(folder)


def test_devices(directory: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match="device=2: this machine has 2"):
        DeployedEngine(directory(), device=2)
    fake_pycuda.DEVICES.clear()
    with pytest.raises(EngineError, match="no usable NVIDIA GPU: cuInit failed"):
        DeployedEngine(directory())
    with pytest.raises(ConfigError, match="buffers=0"):
        DeployedEngine(directory(), buffers=0)


def test_cuda_failing_in_the_middle(directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise fake_pycuda.Error("an illegal memory access was encountered")

    with DeployedEngine(directory()) as engine:
        monkeypatch.setattr(fake_pycuda, "memcpy_htod_async", failing)
        with pytest.raises(EngineError, match="illegal memory access"):
            engine.run(tiles(1))
        assert fake_pycuda.PUSHED == []


def test_without_pycuda_or_tensorrt(directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(ExtraMissingError, match=r"pycuda.*\[deploy\]"):
        DeployedEngine(directory())
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match="TensorRT is not installed"):
        DeployedEngine(directory())


WITHOUT_TORCH = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
sys.modules["torch"] = None
import numpy as np, fake_pycuda, fake_tensorrt
from types import ModuleType
sys.modules["pycuda"] = ModuleType("pycuda")
sys.modules["pycuda.driver"] = sys.modules["pycuda"].driver = fake_pycuda
from slide2vec.runtime.tensorrt import DeployedEngine, available
available.find_spec = lambda name: object()
with fake_tensorrt.installed():
    fake_pycuda.reset()
    with DeployedEngine({directory!r}) as engine:
        print(engine.run(np.ones((3, 3, 4, 4), np.float32)).shape)
"""


def test_it_runs_where_pytorch_is_not_installed(directory: Callable[..., Path]) -> None:
    code = WITHOUT_TORCH.format(here=str(Path(__file__).parent), directory=str(directory()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["(3,", "5)"], done.stderr
