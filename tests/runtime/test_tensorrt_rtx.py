"""What only TensorRT-RTX has, on a fake one and fake CUDA: kept kernels, sizes that are run, validity.

That the fake is like TensorRT-RTX: test_tensorrt_contract.py. What it says of real plans without a GPU:
tests/compile/test_rtx_build.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_rtx
import pytest
import torch
from fake_tensorrt import a_plan, expected

from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt import TensorRTEngine, available, engine

PROFILE = BatchProfile(min=1, opt=12, max=12)
Journal = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr(engine, "require", lambda runtime, device: None)
    with fake_rtx.installed():
        yield fake_cuda.install(monkeypatch)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TensorRTEngine]:
    def made(**options: Any) -> TensorRTEngine:
        (tmp_path / "encoder.plan").write_bytes(a_plan())
        given = {"profile": PROFILE, "layout": "float32_nchw", "feature_dim": 5, "precision": "fp16"}
        kernels = tmp_path / "kernels-GPU.cache"
        common = {"device": torch.device("cpu"), "runtime": "tensorrt-rtx", "kernels": kernels}
        return TensorRTEngine(tmp_path / "encoder.plan", **{**common, **given, **options})

    return made


def tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def test_few_sizes_are_run(make: Callable[..., TensorRTEngine], fakes: Journal) -> None:
    """Each is compiled for anew: powers of two and the largest, whatever comes."""
    made = make(cuda_graphs=False)
    for count in (1, 2, 3, 5, 9, 11, 12, 27):
        torch.testing.assert_close(
            made.run(tiles(count)), torch.from_numpy(expected(tiles(count).numpy(), 5))
        )
    assert [each[2] for each in fakes if each[0] == "execute"] == [1, 2, 4, 8, 12, 12, 12, 12, 12, 4]


def test_kernels_are_compiled_before_a_size_first_runs(make: Callable[..., TensorRTEngine]) -> None:
    make(contexts=2)
    strategy = fake_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert fake_rtx.RTX.strategies == [strategy] * 3  # two contexts with graphs, one for other sizes


def test_kernels_are_kept_and_found(
    make: Callable[..., TensorRTEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kernels-GPU.cache"
    with caplog.at_level(logging.INFO):
        first = make()
    assert "kernels were compiled for this GPU, and are kept" in caplog.text
    assert json.loads(kept.read_bytes()) == [12]  # of what runs as a CUDA graph
    first.run(tiles(3))
    first.close()
    first.close()
    assert json.loads(kept.read_bytes()) == [4, 12]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make()
    assert "its kernels were there" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.plan", kept.name}


def test_kernels_of_another_gpu_are_replaced(
    make: Callable[..., TensorRTEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kernels-GPU.cache"
    kept.write_bytes(b"of another driver")
    fake_rtx.RTX.caches_fit = False
    with caplog.at_level(logging.INFO):
        make().close()
    assert "is of another GPU, driver or TensorRT-RTX" in caplog.text
    assert json.loads(kept.read_bytes()) == [12]


def test_a_store_that_cannot_be_written_to_costs_nothing_else(
    make: Callable[..., TensorRTEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO):
        made = make(kernels=tmp_path / "file" / "kernels.cache")
    assert "compiled kernels are not kept" in caplog.text
    assert made.run(tiles(2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (1, "it was built by another version of TensorRT-RTX"),
        (2, "it was not built for this kind of GPU"),
        (4 + 16, "the NVIDIA driver is too old; the GPU has too little memory"),
    ],
)
def test_a_plan_that_does_not_fit(faults: int, said: str, make: Callable[..., TensorRTEngine]) -> None:
    fake_rtx.RTX.validity = (2, faults)
    with pytest.raises(EngineError, match=f"does not load: {said}.*build-engine"):
        make()


def test_a_plan_that_runs_more_slowly(
    make: Callable[..., TensorRTEngine], caplog: pytest.LogCaptureFixture
) -> None:
    fake_rtx.RTX.validity = (1, 0)
    with caplog.at_level(logging.INFO):
        assert make().run(tiles(2)).shape == (2, 5)
    assert "more slowly" in caplog.text


def test_gpus_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, precision, said in (
        ((8, 9), "fp8", None),
        ((8, 6), "fp8", "fp8 for sm89 and newer, not for sm86"),
        ((7, 5), "bf16", "bf16 for sm80 and newer"),
        ((9, 0), "bf16", "not for sm90: TensorRT does"),
        ((10, 0), "bf16", "not for sm100"),
        ((12, 0), "bf16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = available.unavailable("tensorrt-rtx", precision)
        assert reason is None if said is None else said in (reason or "")
