"""PyTorch's engine: CUDA graphs on fakes that record and repeat what was captured, compiled blocks, and
parameters that are its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded_graphs
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[1] / "compile"))

from compile_helpers import tiny_encoder, tiny_recipe

from slide2vec.compile.export_module import torch_engine
from slide2vec.runtime import torch_engine as module
from slide2vec.runtime.cuda_graphs import MOST_FAILED, CudaGraphs
from slide2vec.runtime.torch_engine import TorchEngine

GPU = torch.device("cuda:1")
CPU = torch.device("cpu")
#: Fused operations round otherwise than one after the other.
COMPILED = 1e-5

RECIPE = tiny_recipe()


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    return recorded_graphs.install(monkeypatch)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return tiny_encoder(RECIPE)


@pytest.fixture
def graphs(journal: list[tuple[Any, ...]], encoder: nn.Module) -> CudaGraphs:
    return CudaGraphs(TorchEngine(encoder, feature_dim=128, precision="fp32", device=CPU)._encode, GPU)


def kinds(journal: list[tuple[Any, ...]], *wanted: str) -> list[str]:
    return [entry[0] for entry in journal if entry[0] in wanted]


@torch.inference_mode()
def test_a_size_is_captured_when_it_comes_again(
    graphs: CudaGraphs, journal: list[tuple[Any, ...]], encoder: nn.Module
) -> None:
    for seed, expected in enumerate(
        ([], ["capture", "replay"], ["capture", "replay", "replay"], ["capture"] + 3 * ["replay"])
    ):
        found = graphs(batch(4, seed))
        assert kinds(journal, "capture", "replay") == expected
        assert torch.equal(found, encoder(batch(4, seed)))


@torch.inference_mode()
def test_smaller_batches_are_padded(
    graphs: CudaGraphs, journal: list[tuple[Any, ...]], encoder: nn.Module
) -> None:
    whole = [graphs(batch(4)) for _ in range(2)][-1]
    last = graphs(batch(4)[1:3])
    assert kinds(journal, "capture", "replay") == ["capture", "replay", "replay"]
    assert torch.equal(last, whole[1:3]), "a tile is not the same in the last batch"
    larger = graphs(batch(6))
    assert kinds(journal, "replay") == 2 * ["replay"], "a larger batch has no graph yet"
    torch.testing.assert_close(larger, encoder(batch(6)))


@torch.inference_mode()
def test_every_size_that_comes_again_has_its_graph_in_common_memory(
    graphs: CudaGraphs, journal: list[tuple[Any, ...]], encoder: nn.Module
) -> None:
    for size in (4, 4, 2, 2, 2, 4, 2):
        torch.testing.assert_close(graphs(batch(size, size)), encoder(batch(size, size)))
    captures = [entry for entry in journal if entry[0] == "capture"]
    assert len(captures) == 2
    assert captures[0][2] is None and captures[1][2] is not None
    assert captures[0][1] == captures[1][1] == f"stream {GPU}", "captured elsewhere than on its own stream"


@torch.inference_mode()
def test_replays_are_ordered_and_features_are_the_callers(
    graphs: CudaGraphs, journal: list[tuple[Any, ...]]
) -> None:
    """Another stream may have queued the last batch, and its features may not be read yet."""
    graphs(batch(4))
    first = graphs(batch(4, 1))
    kept = first.clone()
    journal.clear()
    graphs(batch(4, 2))
    assert torch.equal(first, kept)
    assert kinds(journal, "wait", "replay", "record") == ["wait", "replay", "record"]
    assert journal[0] == ("device", "cuda:1")


class Asks(nn.Module):
    """Its way depends on its data, which the host has to wait for."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = pixels.mean((2, 3))
        return features * 2 if features.sum() > 0 else features * 3


@torch.inference_mode()
def test_what_cannot_be_captured_runs_without_and_says_so_once(
    journal: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Asks()
    graphs = CudaGraphs(encoder, GPU)
    for size in (4, 4, 4, 2, 2, 2, 2):
        assert torch.equal(graphs(batch(size, size)), encoder(batch(size, size)))
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "no CUDA graph of 2 tiles on cuda:1: operation not permitted" in said.message
    assert kinds(journal, "capture", "replay") == MOST_FAILED * ["capture"]


@torch.inference_mode()
def test_a_capture_that_is_spoilt_leaves_the_callers_stream_current_and_is_tried_again(
    journal: list[tuple[Any, ...]], encoder: nn.Module
) -> None:
    """As by another thread that waits for the device."""
    streams: list[str] = []

    def spoilt_once(pixels: Tensor) -> Tensor:
        streams.append(torch.cuda.current_stream().name)  # type: ignore[attr-defined]
        if kinds(journal, "capture") == ["capture"] and len(streams) == 3:
            raise RuntimeError("operation failed due to a previous error during capture")
        return encoder(pixels)

    graphs = CudaGraphs(spoilt_once, GPU)
    for _ in range(3):
        torch.testing.assert_close(graphs(batch(4)), encoder(batch(4)))
    callers, own = "stream of the caller", "stream cuda:1"
    # kernel by kernel; warming up, capturing, and kernel by kernel again; warming up and capturing
    assert streams == [callers, own, own, callers, own, own]
    assert kinds(journal, "capture", "replay") == ["capture", "capture", "replay"]
    warmed_up = journal.index(("wait", own))
    assert journal.index(("capture", own, None)) > warmed_up, "who reads the batch is waited for"


@pytest.fixture
def on_cuda(journal: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines for CUDA whose memory is the host's."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *args: self)
    real = torch.autocast
    monkeypatch.setattr(
        module.torch,
        "autocast",
        lambda kind, **kwargs: real("cpu", **kwargs),  # type: ignore[attr-defined]
    )


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_engine_on_cuda_has_parameters_of_its_own_and_graphs(
    encoder: nn.Module, journal: list[tuple[Any, ...]], precision: str
) -> None:
    engine = torch_engine(encoder, RECIPE, precision, GPU, feature_dim=128)
    found = [engine.run(batch(4)) for _ in range(3)]
    assert kinds(journal, "capture", "replay") == ["capture", "replay", "replay"]
    assert torch.equal(found[0], found[2]) and found[0].dtype == torch.float32
    own = {parameter.dtype for parameter in engine._encoder.parameters()}
    assert own == ({torch.float32} if precision == "fp32" else {torch.float32, module.DTYPES[precision]})
    cosine = nn.functional.cosine_similarity(found[0], encoder(batch(4)))
    assert cosine.min() > 0.999
    engine.close()
    assert torch.equal(engine.run(batch(4)), found[0])


def test_only_the_patch_embedding_stays_in_fp32_of_what_is_converted(
    encoder: nn.Module, on_cuda: None
) -> None:
    """PyTorch's norms compute in fp32 whatever their parameters are."""
    engine = torch_engine(encoder, RECIPE, "bf16", GPU, feature_dim=128)
    for name, parameter in engine._encoder.named_parameters():
        expected = torch.float32 if ".patch_embed." in name else torch.bfloat16
        assert parameter.dtype == expected, name


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    "changes", [{"compile": False, "compile_note": "remote code"}, {"name": "timm:vit_tiny_patch16_224"}]
)
def test_encoders_that_nobody_has_tried_stay_under_autocast(
    encoder: nn.Module, changes: dict[str, Any]
) -> None:
    engine = torch_engine(encoder, tiny_recipe(**changes), "bf16", GPU, feature_dim=128)
    assert {parameter.dtype for parameter in engine._encoder.parameters()} == {torch.float32}


def test_bf16_on_a_cpu_is_what_it_was(encoder: nn.Module) -> None:
    engine = torch_engine(encoder, RECIPE, "bf16", CPU, feature_dim=128)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert torch.equal(engine.run(batch(4)), encoder(batch(4)).float())


def test_a_moved_encoder_leaves_the_engine_alone() -> None:
    given = tiny_encoder(RECIPE)
    twin = module._own(given)
    before = [parameter.data_ptr() for parameter in given.parameters()]
    given.double()
    assert [parameter.data_ptr() for parameter in twin.parameters()] == before
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}


def test_blocks_are_compiled_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the compiler of kernels, which takes long; the contract of engines has it."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_(self, backend="eager", **how))
    recipe = tiny_recipe()
    spec = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, "depth": 4}})
    given = tiny_encoder(recipe.model_copy(update={"encoder": spec}))
    plain = TorchEngine(given, feature_dim=128, precision="fp32", device=CPU)
    engine = TorchEngine(given, feature_dim=128, precision="fp32", device=CPU, compiled=True)
    torch.compiler.reset()
    counters.clear()
    for count in (5, 5, 2):
        difference = engine.run(batch(count)) - plain.run(batch(count))
        assert difference.abs().max() < COMPILED
    assert counters["stats"]["unique_graphs"] == 1, "four blocks, and a smaller batch: one compilation"
    assert all(block._compiled_call_impl is None for block in given.trunk.blocks)  # type: ignore[union-attr]


def test_what_has_no_blocks_is_compiled_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(module._blocks(nn.ModuleList([net]))) == []
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
    assert list(module._blocks(nn.ModuleDict({"stem": net, "blocks": blocks}))) == list(blocks)
