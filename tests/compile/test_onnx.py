"""What is exported, run by ONNX Runtime and OpenVINO, against the encoder in PyTorch: for every preset that
can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compile_helpers import smooth_pixels, tiny_encoder
from rtx_compiler import refusals
from torch import nn

from benchmarks.engine_matrix import COMPILABLE, with_depth
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.onnx import OPSETS, export_onnx
from slide2vec.compile.onnx_graph import node_counts
from slide2vec.encoders import build_encoder
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.runtime import openvino_engine

#: fp32 in another order of the same sums; GenBio-PathFM rounds to bf16 inside, where they tip over.
ABSOLUTE = {"genbio-pathfm": 1e-3}
ABSOLUTE_DEFAULT = 5e-5
#: In OpenVINO more of GenBio-PathFM's values tip over; two tiles differ by 3.
ABSOLUTE_OPENVINO = {"genbio-pathfm": 5e-2}
#: ONNX Runtime computes fp16 products with other roundings.
FP16_COSINE = 0.9999

#: Architectures that are quickly exported; the others, and presets that differ by numbers only, are slow.
QUICK = {"conch", "dinov2-vitb14", "dinov3-vitb16", "hibou-b", "isight", "lunit", "lunit-bt", "plip"}


def run(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])


def in_openvino(path: Path, pixels: torch.Tensor, dim: int, precision: str) -> torch.Tensor:
    engine = openvino_engine.OpenVINOEngine(
        path, precision=precision, feature_dim=dim, layout="uint8_nhwc", threads=2
    )
    found = engine.run(pixels)
    engine.close()
    return found


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILABLE],
)
def test_every_preset_exports(name: str, tmp_path: Path) -> None:
    recipe, encoder = with_depth(name, 1)
    side = recipe.transform.crop
    module = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "fp32", recipe.engine).eval()
    path = tmp_path / "encoder.onnx"
    assert export_onnx(module, path, input_size_px=side) == OPSETS[0]
    pixels = smooth_pixels(3, side)
    with torch.inference_mode():
        expected = module(pixels)
    found = run(path, pixels)
    assert found.shape == expected.shape == (3, recipe.variants[recipe.default_variant].dim)
    torch.testing.assert_close(found, expected, atol=ABSOLUTE.get(name, ABSOLUTE_DEFAULT), rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-4  # it looks at the tiles
    dim = expected.shape[1]
    found = in_openvino(path, pixels, dim, "fp32")
    tolerance = ABSOLUTE_OPENVINO.get(name, ABSOLUTE_DEFAULT)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
    if name in QUICK and openvino_engine.unavailable(precision="bf16") is None:
        cosine = nn.functional.cosine_similarity(in_openvino(path, pixels, dim, "bf16"), expected)
        assert recipe.engine.threshold("bf16") < cosine.min() < 0.9999999  # it is in bf16
    counts = node_counts(path)
    assert counts["Resize"] == (name == "musk")  # which sees its tile at two scales
    assert counts["Range"] == 0 and max(counts["Shape"], counts["Squeeze"]) <= 1  # of the batch
    assert refusals(path) == []


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("layout", ["uint8_nhwc", "float32_nchw"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_opsets_layouts_and_precisions(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, opset: int, layout: str, precision: str
) -> None:
    module = ExportedEncoder(encoder, recipe.transform, layout, precision, recipe.engine).eval()  # type: ignore[arg-type]
    path = tmp_path / "encoder.onnx"
    assert export_onnx(module, path, input_size_px=recipe.transform.crop, opset=opset) == opset
    model = onnx.load(str(path), load_external_data=False)
    assert [each.version for each in model.opset_import if each.domain == ""] == [opset]
    assert ("Attention" in {node.op_type for node in model.graph.node}) == (opset >= 23)
    pixels = smooth_pixels(5)
    if layout == "float32_nchw":
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = module(pixels)
    for part in (pixels, pixels[:1]):  # any batch size
        found = run(path, part)
        assert found.dtype == torch.float32
        if precision == "fp32":
            torch.testing.assert_close(found, expected[: len(part)], atol=ABSOLUTE_DEFAULT, rtol=0)
        assert nn.functional.cosine_similarity(found, expected[: len(part)]).min() > FP16_COSINE


def test_types_in_the_graph_are_the_precision(recipe: Recipe, encoder: nn.Module, tmp_path: Path) -> None:
    """Strongly typed runtimes compute in them."""
    found = {}
    for precision in ("fp32", "fp16", "bf16"):
        path = tmp_path / f"{precision}.onnx"
        module = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", precision, recipe.engine).eval()
        export_onnx(module, path, input_size_px=recipe.transform.crop)
        weights = onnx.load(str(path)).graph.initializer
        matrices = [each.data_type for each in weights if len(each.dims) == 2]
        found[precision] = set(matrices)
    types = onnx.TensorProto
    assert found == {"fp32": {types.FLOAT}, "fp16": {types.FLOAT16}, "bf16": {types.BFLOAT16}}


def test_what_cannot_be_exported_is_one_error(recipe: Recipe, tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean(1) if pixels.sum() > 0 else pixels.amax(1)  # depends on values

    module = ExportedEncoder(Stubborn(), recipe.transform, "uint8_nhwc", "fp32", recipe.engine).eval()
    with pytest.raises(EngineError, match=r"cannot be exported to ONNX \(opset 23: .*opset 20: ") as caught:
        export_onnx(module, tmp_path / "encoder.onnx", input_size_px=recipe.transform.crop)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("name", ["virchow2", "midnight"])
def test_full_depth(name: str, tmp_path: Path) -> None:
    """Above 2 GB, where the weights have to be in a file of their own."""
    recipe = load_recipe(name)
    encoder = build_encoder(recipe, recipe.variants[recipe.default_variant], "random")
    module = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "fp32", recipe.engine).eval()
    path = tmp_path / "encoder.onnx"
    export_onnx(module, path, input_size_px=recipe.transform.crop)
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) > 2**31
    pixels = smooth_pixels(1, recipe.transform.crop)
    with torch.inference_mode():
        expected = module(pixels)
    cosine = nn.functional.cosine_similarity(run(path, pixels), expected)
    assert cosine.min() > 0.99999 and np.isfinite(expected.numpy()).all()


def test_tiny_encoder_is_not_degenerate(recipe: Recipe) -> None:
    """The comparisons above would pass with blocks that do nothing."""
    whole = tiny_encoder(recipe)
    cut = tiny_encoder(recipe)
    cut.trunk.blocks = nn.Sequential()  # type: ignore[union-attr]
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert nn.functional.cosine_similarity(whole(pixels), cut(pixels)).item() < 0.95
