"""The real TensorRT on a real GPU: plans of a small ViT, both runners, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_helpers import write_record
from torch import Tensor, nn

from slide2vec.compile.tensorrt import build_plan, unavailable
from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt import DeployedEngine, TensorRTEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

PROFILE = BatchProfile(min=1, opt=4, max=8)
#: Least cosine to fp32 PyTorch that engines must reach, per precision (the defaults of recipes).
COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}
DIM = 192


class Encoder(nn.Module):
    """A small ViT at one precision: pixels (B, 3, 64, 64) float32, or (B, 64, 64, 3) uint8 that it
    normalises; features (B, 192) float32."""

    def __init__(self, precision: str, layout: str = "float32_nchw") -> None:
        import timm

        super().__init__()
        torch.manual_seed(0)
        self.trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=64)
        self.layout, self.dtype = layout, DTYPES[precision]
        self.eval().requires_grad_(False).to(self.dtype)
        self.trunk.patch_embed.float()  # opset 20 has no Conv in bf16
        self.trunk.patch_embed.register_forward_hook(lambda module, taken, given: given.to(self.dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        if self.layout == "uint8_nhwc":
            pixels = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1  # bytes may only be cast
        return self.trunk(pixels).float()  # type: ignore[no-any-return]


def tiles(count: int, layout: str = "float32_nchw") -> Tensor:
    draw = torch.Generator().manual_seed(count)
    if layout == "uint8_nhwc":
        return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=draw)
    return torch.randn(count, 3, 64, 64, generator=draw)


def export(path: Path, precision: str, layout: str) -> None:
    torch.onnx.export(
        Encoder(precision, layout),
        (tiles(2, layout),),
        path,
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=True,
        verbose=False,
    )


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a plan, once for each precision and layout, with the engine.json that stands beside it."""
    built: dict[tuple[str, str], Path] = {}

    def build(precision: str, layout: str = "float32_nchw") -> Path:
        if (precision, layout) not in built:
            folder = tmp_path_factory.mktemp(f"{precision}_{layout}")
            onnx = folder / "encoder.onnx"
            export(onnx, precision, layout)
            if precision == "fp8":
                from slide2vec.compile.fp8 import quantise_fp8

                onnx = folder / "quantised.onnx"
                quantise_fp8(folder / "encoder.onnx", onnx, tiles(16, layout).numpy())
            cache = folder.parent / "timing.bin"
            build_plan(
                onnx, folder / "encoder.plan", profile=PROFILE, precision=precision, timing_cache=cache
            )
            write_record(
                folder,
                layout=layout,
                precision=precision,
                feature_dim=DIM,
                profile={"min": PROFILE.min, "opt": PROFILE.opt, "max": PROFILE.max},
            )
            built[precision, layout] = folder
        return built[precision, layout]

    return build


def load(folder: Path, precision: str, layout: Any = "float32_nchw", **options: Any) -> TensorRTEngine:
    return TensorRTEngine(
        folder / "encoder.plan",
        device=torch.device("cuda", 0),
        precision=precision,
        feature_dim=DIM,
        layout=layout,
        profile=PROFILE,
        **options,
    )


def least_cosine(found: Tensor, pixels: Tensor, layout: str = "float32_nchw") -> float:
    reference = Encoder("fp32", layout)(pixels)
    assert torch.isfinite(found).all()
    return float(nn.functional.cosine_similarity(found.cpu(), reference).min())


@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_both_runners_give_the_encoders_features(
    precision: str, layout: str, engine_dir: Callable[..., Path]
) -> None:
    folder = engine_dir(precision, layout)
    engine = load(folder, precision, layout)
    for count in (1, 4, 7, 8, 21):
        pixels = tiles(count, layout)
        found = engine.run(pixels.cuda())
        assert found.is_cuda and found.dtype == torch.float32
        assert least_cosine(found, pixels, layout) >= COSINE[precision]
    engine.close()
    pytest.importorskip("pycuda.driver")
    with DeployedEngine(folder) as deployed:
        for count in (1, 4, 21):
            pixels = tiles(count, layout)
            found = torch.from_numpy(deployed.run(pixels.numpy()))
            assert least_cosine(found, pixels, layout) >= COSINE[precision]


def test_graphs_give_the_same_bits(engine_dir: Callable[..., Path]) -> None:
    folder = engine_dir("fp16")
    with_graphs, without = load(folder, "fp16"), load(folder, "fp16", cuda_graphs=False)
    for count in (4, 8, 4, 3, 8):
        pixels = tiles(count).cuda()
        assert torch.equal(with_graphs.run(pixels), without.run(pixels))


def test_work_is_ordered_on_the_callers_stream(engine_dir: Callable[..., Path]) -> None:
    """Pixels that are still being written when `run` is called, features that are read at once."""
    engine = load(engine_dir("fp32"), "fp32")
    expected = [engine.run(tiles(8).cuda() * factor).clone() for factor in range(20)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    base = tiles(8).cuda()
    with torch.cuda.stream(stream):
        found = []
        for factor in range(20):
            torch.cuda._sleep(1_000_000)
            pixels = base * factor
            found.append(engine.run(pixels) + 0)
            pixels.zero_()
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_streaming_gives_batches_in_order(engine_dir: Callable[..., Path]) -> None:
    pytest.importorskip("pycuda.driver")
    with DeployedEngine(engine_dir("fp32")) as deployed:
        batches = [tiles(count).numpy() for count in (1, 8, 3, 8, 8, 2)]
        for batch, found in zip(batches, deployed.stream(batches), strict=True):
            assert least_cosine(torch.from_numpy(found), torch.from_numpy(batch)) >= COSINE["fp32"]


def test_progress_and_cancelling(engine_dir: Callable[..., Path], tmp_path: Path) -> None:
    onnx = engine_dir("fp32") / "encoder.onnx"
    error_text: list[tuple[str, int, int]] = []
    build = partial(build_plan, onnx, tmp_path / "a.plan", profile=PROFILE, precision="fp32")
    build(on_progress=lambda *step: error_text.append(step))
    assert error_text and all(0 <= done <= steps for _, done, steps in error_text)

    def stop(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.plan").unlink()
    with pytest.raises(KeyboardInterrupt):
        build(on_progress=stop)
    assert not (tmp_path / "a.plan").exists()


def test_files_that_are_no_onnx_and_plans_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot parse .*encoder\.onnx"):
        build_plan(tmp_path / "encoder.onnx", tmp_path / "a.plan", profile=PROFILE, precision="fp32")
    (tmp_path / "encoder.plan").write_bytes(np.zeros(4096, np.uint8).tobytes())
    with pytest.raises(EngineError, match="does not load"):
        load(tmp_path, "fp32")


def test_a_timing_cache_of_nonsense_is_replaced(engine_dir: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmp_path / "timing.bin"
    cache.write_bytes(b"nonsense")
    onnx = engine_dir("fp32") / "encoder.onnx"
    build_plan(onnx, tmp_path / "a.plan", profile=PROFILE, precision="fp32", timing_cache=cache)
    assert len(cache.read_bytes()) > 100
