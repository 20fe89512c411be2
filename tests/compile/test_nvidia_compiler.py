"""NVIDIA's own compiler (TensorRT-RTX) parses and builds what is exported now, and refuses what was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_helpers import smooth_pixels, tiny_encoder, tiny_recipe
from rtx_compiler import WHY_NOT, build, refusals
from torch import Tensor, nn

from slide2vec.compile.export_module import ExportedEncoder, _of_one_size
from slide2vec.compile.fp8 import quantise_fp8
from slide2vec.compile.onnx import export_onnx
from slide2vec.compile.onnx_graph import node_counts
from slide2vec.encoders import build_encoder
from slide2vec.recipes import Recipe, load_recipe

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def exported(
    recipe: Recipe, encoder: nn.Module, path: Path, precision: str, opset: int | None = None
) -> Path:
    module = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", precision, recipe.engine).eval()
    export_onnx(module, path, input_size_px=recipe.transform.crop, opset=opset)
    return path


@pytest.mark.parametrize(("precision", "opset"), [("fp32", 20), ("fp16", 23), ("fp16", 20), ("bf16", 23)])
def test_precisions_are_built(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, precision: str, opset: int
) -> None:
    plan = build(exported(recipe, encoder, tmp_path / "encoder.onnx", precision, opset))
    assert plan is not None and len(plan) > 10_000


@pytest.mark.parametrize("target", ["SM89", "SM120"])
def test_fp8_is_built(recipe: Recipe, encoder: nn.Module, tmp_path: Path, target: str) -> None:
    onnx = exported(recipe, encoder, tmp_path / "encoder.onnx", "fp16")
    quantise_fp8(onnx, tmp_path / "fp8.onnx", smooth_pixels(4).numpy())
    assert build(tmp_path / "fp8.onnx", target=target) is not None
    assert build(tmp_path / "fp8.onnx", target="SM86") is None  # Ampere has no fp8


def test_a_preset_is_built(tmp_path: Path) -> None:
    """One block of virchow2: class and register tokens, SwiGLU, layer scale, heads of 80."""
    recipe = load_recipe("virchow2")
    spec = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, "depth": 1}})
    recipe = recipe.model_copy(update={"encoder": spec})
    encoder = build_encoder(recipe, recipe.variants[recipe.default_variant], "random")
    plan = build(exported(recipe, encoder, tmp_path / "encoder.onnx", "bf16"), target="SM89")
    assert plan is not None and len(plan) > 30_000_000


# what was refused -------------------------------------------------------------------------------------


class TransposedFirst(nn.Module):
    """Moves bytes before they are numbers: uint8 may only be cast."""

    layout = "uint8_nhwc"

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float().mean((2, 3))


def test_bytes_may_only_be_cast(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    export_onnx(TransposedFirst(), path, input_size_px=32)  # type: ignore[arg-type]
    assert "UInt8" in refusals(path)[0]


@pytest.fixture
def of_another_size() -> tuple[Recipe, nn.Module]:
    """Trained at 448 px and run at 64, as dinov2-vitb14 is trained at 518 and run at 224."""
    recipe = tiny_recipe()
    kwargs = {**recipe.encoder.kwargs, "img_size": 448, "dynamic_img_size": True}
    recipe = tiny_recipe(encoder=recipe.encoder.model_copy(update={"kwargs": kwargs}))
    return recipe, tiny_encoder(recipe)


def test_position_embeddings_are_constants(of_another_size: tuple[Recipe, nn.Module], tmp_path: Path) -> None:
    recipe, encoder = of_another_size
    path = exported(recipe, encoder, tmp_path / "encoder.onnx", "fp32", 20)
    assert node_counts(path)["Resize"] == 0 and refusals(path) == []
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(_of_one_size(encoder, 64)(pixels), encoder(pixels), atol=1e-5, rtol=1e-5)
    assert encoder.trunk.pos_embed.shape[1] == 28 * 28 + 5  # type: ignore[union-attr, index]  # as it was


def test_resampled_embeddings_are_refused(
    of_another_size: tuple[Recipe, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slide2vec.compile.export_module._of_one_size", lambda encoder, size_px: encoder)
    monkeypatch.setattr("slide2vec.compile.onnx.at_one_size", nullcontext)
    recipe, encoder = of_another_size
    path = exported(recipe, encoder, tmp_path / "encoder.onnx", "fp32", 20)
    assert node_counts(path)["Resize"] == 1 and "Antialiasing" in refusals(path)[0]


def test_attention_in_fp32_has_no_kernel(recipe: Recipe, encoder: nn.Module, tmp_path: Path) -> None:
    assert build(exported(recipe, encoder, tmp_path / "encoder.onnx", "fp32", 23)) is None


def test_a_block_has_no_shape_arithmetic(tmp_path: Path) -> None:
    """One block more adds what a person would write: 30 nodes, and no Shape, Slice, Squeeze or Resize."""
    found = []
    for depth in (1, 2):
        recipe = tiny_recipe()
        kwargs = {**recipe.encoder.kwargs, "depth": depth}
        recipe = tiny_recipe(encoder=recipe.encoder.model_copy(update={"kwargs": kwargs}))
        path = exported(recipe, tiny_encoder(recipe), tmp_path / f"{depth}.onnx", "bf16")
        found.append(node_counts(path))
    block = found[1] - found[0]
    assert not {"Shape", "Slice", "Squeeze", "Resize", "Expand", "Range"} & block.keys()
    assert block["Gather"] == 3 and block["Attention"] == 1 and block["MatMul"] == 4
    assert sum(block.values()) <= 30, block


def test_picked_queries_keys_and_values_are_the_right_ones(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path
) -> None:
    """Gather instead of Slice and Squeeze gives the same features: they would differ if any were swapped."""
    import onnxruntime

    path = exported(recipe, encoder, tmp_path / "encoder.onnx", "fp32")
    pixels = smooth_pixels(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"pixels": pixels.numpy()})
    module = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "fp32", recipe.engine).eval()
    with torch.inference_mode():
        expected = module(pixels)
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-5)
