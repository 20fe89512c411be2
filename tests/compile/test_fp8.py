"""fp8 ONNX files: against an emulation of fp8 written in PyTorch, and against fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from compile_helpers import smooth_pixels, tiny_encoder, tiny_recipe
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from slide2vec.compile import fp8
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.fp8 import quantise_fp8
from slide2vec.compile.onnx import export_onnx
from slide2vec.compile.parity import for_layout
from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.base import Layout

#: To the fp32 encoder, the threshold that engines must meet in fp8.
FP8_COSINE = 0.99
#: To the emulation. The last bit of fp32 decides where a value at a rounding boundary of fp8 falls, and
#: layers hand it on: 0.9998 was seen, and 0.9996 of the emulation to itself on pixels times 1 + 2^-11.
EMULATED_COSINE = 0.999
#: The same in fp16, whose last bit is that much larger: 0.9990 of the emulation to itself, 0.9988 was seen.
EMULATED_COSINE_FP16 = 0.998
#: Three bits of mantissa round by at most 1/16; two factors do, at random.
FP8_ROUNDING = 1 / 16
LARGEST = 448.0

Pixels = NDArray[np.float32]


def an_encoder(arch: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(0)
    encoder: nn.Module = timm.create_model(arch, num_classes=0, depth=2, img_size=64)
    return encoder.eval().requires_grad_(False)


def tiles(count: int, seed: int = 0) -> Pixels:
    """Normalised pixels with large and small structures, as tissue has."""
    draw = np.random.default_rng(seed)
    coarse = draw.normal(size=(count, 3, 8, 8)).repeat(8, axis=2).repeat(8, axis=3)
    return (coarse + 0.3 * draw.normal(size=(count, 3, 64, 64))).astype(np.float32)


def export(module: nn.Module, path: Path, opset: int = 20) -> Path:
    torch.onnx.export(
        module,
        (torch.zeros(2, 3, 64, 64),),
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=True,
        input_names=["pixels"],
        output_names=["features"],
        verbose=False,
    )
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(an_encoder(), tmp_path_factory.mktemp("onnx") / "encoder.onnx")


def run(path: Path, pixels: Pixels) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": pixels})[0])


def to_fp8(values: Tensor) -> Tensor:
    return values.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


class Emulated(nn.Module):
    """A linear layer whose input and weight are rounded to fp8: the input with one scale, the weight with
    one per output channel, both amax / 448."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.amax = linear, 0.0
        dtype = linear.weight.dtype
        scale = (linear.weight.float().abs().amax(dim=1, keepdim=True) / LARGEST).to(dtype)
        self.weight = (to_fp8(linear.weight.float() / scale.float()) * scale.float()).to(dtype)
        self.calibrating = True

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.amax = max(self.amax, float(x.abs().max()))
            return self.linear(x)
        scale = torch.tensor(self.amax / LARGEST, dtype=x.dtype)
        rounded = (to_fp8(x.float() / scale.float()) * scale.float()).to(x.dtype)
        return nn.functional.linear(rounded, self.weight, self.linear.bias)


def emulate(encoder: nn.Module, calibration: Tensor) -> nn.Module:
    """The encoder with all linear layers but the last in fp8 (the patch embedding is a convolution)."""
    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)][:-1]
    for name in linears:
        parent, _, child = name.rpartition(".")
        owner = encoder.get_submodule(parent)
        setattr(owner, child, Emulated(getattr(owner, child)))
    encoder(calibration)
    for module in encoder.modules():
        if isinstance(module, Emulated):
            module.calibrating = False
    return encoder


def least_cosine(found: Tensor, reference: Tensor) -> float:
    return float(nn.functional.cosine_similarity(found.float(), reference.float()).min())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "opset"),
    [("vit_tiny_patch16_224", 20), ("vit_tiny_patch16_224", 23), ("vit_small_patch16_224", 20)],
)
def test_it_computes_what_fp8_computes(arch: str, opset: int, tmp_path: Path) -> None:
    source = export(an_encoder(arch), tmp_path / "encoder.onnx", opset)
    target = tmp_path / "encoder-fp8.onnx"
    quantise_fp8(source, target, tiles(10, 1), batch_size=4)
    pixels = tiles(4, 2)
    found = run(target, pixels)
    emulated = emulate(an_encoder(arch), torch.from_numpy(tiles(10, 1)))(torch.from_numpy(pixels))
    assert least_cosine(found, emulated) >= EMULATED_COSINE
    reference = an_encoder(arch)(torch.from_numpy(pixels))
    assert FP8_COSINE <= least_cosine(found, reference) < 0.99999  # it is quantised


class Half(nn.Module):
    """The encoder in fp16, pixels and features in fp32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.half()
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels.half()).float()  # type: ignore[no-any-return]


def test_fp16_files(tmp_path: Path) -> None:
    source = export(Half(an_encoder()), tmp_path / "encoder.onnx")
    quantise_fp8(source, tmp_path / "fp8.onnx", tiles(8, 1))
    graph = onnx.load(str(tmp_path / "fp8.onnx")).graph
    scales = {c.data_type for c in graph.initializer if c.name.endswith("_scale")}
    assert scales == {TensorProto.FLOAT16}
    found = run(tmp_path / "fp8.onnx", tiles(4, 2))
    emulated = emulate(Half(an_encoder()), torch.from_numpy(tiles(8, 1)))(torch.from_numpy(tiles(4, 2)))
    assert least_cosine(found, emulated) >= EMULATED_COSINE_FP16
    assert least_cosine(found, an_encoder()(torch.from_numpy(tiles(4, 2)))) >= FP8_COSINE


@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
def test_our_own_fp16_export(layout: Layout, tmp_path: Path) -> None:
    """As `build-engine --precision fp8` does it: normalisation and fp32 islands are in the graph."""
    recipe = tiny_recipe()
    encoder = tiny_encoder(recipe)
    module = ExportedEncoder(encoder, recipe.transform, layout, "fp16", recipe.engine).eval()
    export_onnx(module, tmp_path / "encoder.onnx", input_size_px=64)
    norm = (recipe.transform.mean, recipe.transform.std)
    calibration, pixels = (for_layout(smooth_pixels(8, seed=seed), norm, layout) for seed in (1, 2))
    quantise_fp8(tmp_path / "encoder.onnx", tmp_path / "fp8.onnx", calibration.numpy())
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "fp8.onnx")).graph.node]
    assert kinds.count("QuantizeLinear") == 7  # two blocks of four linear layers, all but the last
    session = onnxruntime.InferenceSession(str(tmp_path / "fp8.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    with torch.inference_mode():
        reference = encoder(for_layout(smooth_pixels(8, seed=2), norm, "float32_nchw"))
    assert FP8_COSINE <= least_cosine(torch.from_numpy(found), reference) < 0.99999


def test_what_is_quantised(exported: Path, tmp_path: Path) -> None:
    """Of two blocks of four linear layers, all but the last; neither attention nor the patch embedding."""
    quantise_fp8(exported, tmp_path / "fp8.onnx", tiles(2))
    onnx.checker.check_model(str(tmp_path / "fp8.onnx"), full_check=True)
    graph = onnx.load(str(tmp_path / "fp8.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 7 and kinds.count("DequantizeLinear") == 14
    weights = [c for c in graph.initializer if c.data_type == TensorProto.FLOAT8E4M3FN and len(c.dims) == 2]
    assert [tuple(w.dims) for w in weights[:4]] == [(192, 576), (192, 192), (192, 768), (768, 192)]
    assert len(weights) == 7
    matrices = [c.dims for c in graph.initializer if c.data_type == TensorProto.FLOAT and len(c.dims) == 2]
    assert [tuple(dims) for dims in matrices] == [(768, 192)]  # the last; no fp32 copy of the others
    scales = {c.name: c for c in graph.initializer if c.name.endswith("_scale")}
    assert {tuple(scales[f"{w.name}_scale"].dims) for w in weights} == {(576,), (192,), (768,)}


def test_files_are_a_third_and_complete(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantise_fp8(exported, tmp_path / "out" / "fp8.onnx", tiles(2))
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"fp8.onnx", "fp8.onnx.data"}
    before = sum(path.stat().st_size for path in exported.parent.iterdir())
    assert sum(files.values()) < before / 2


def test_files_with_their_weights_inside(exported: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(str(exported)), str(tmp_path / "inside.onnx"))
    quantise_fp8(tmp_path / "inside.onnx", tmp_path / "a.onnx", tiles(2))
    quantise_fp8(exported, tmp_path / "b.onnx", tiles(2))
    assert torch.equal(run(tmp_path / "a.onnx", tiles(3)), run(tmp_path / "b.onnx", tiles(3)))


def test_it_is_deterministic(exported: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantise_fp8(exported, tmp_path / name / "fp8.onnx", tiles(6))
    for file in ("fp8.onnx", "fp8.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def a_product(path: Path, weight: NDArray[np.float32], operator: str = "MatMul", **attributes: Any) -> Path:
    """Three products after one another; the middle one is `operator` with this weight."""
    side = weight.shape[1] if attributes.get("transB") else weight.shape[0]
    out = weight.shape[0] if attributes.get("transB") else weight.shape[1]
    named = {"first": np.eye(side), "middle": weight, "last": np.eye(out)}
    constants = [onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in named.items()]
    nodes = [
        helper.make_node("MatMul", ["pixels", "first"], ["a"]),
        helper.make_node(operator, ["a", "middle"], ["b"], **attributes),
        helper.make_node("MatMul", ["b", "last"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", side])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", out])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(path))
    return path


def test_products_with_transposed_weights(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    weight *= np.logspace(-3, 3, 48, dtype=np.float32)[:, None]  # one scale for all would lose most channels
    pixels = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
    quantise_fp8(a_product(tmp_path / "a.onnx", weight, "Gemm", transB=1), tmp_path / "b.onnx", pixels)
    found, exact = run(tmp_path / "b.onnx", pixels).numpy(), pixels @ weight.T
    lost = np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert lost.max() < FP8_ROUNDING


def test_channels_and_activations_that_are_zero(tmp_path: Path) -> None:
    weight = np.ones((16, 16), np.float32)
    weight[:, 3] = 0
    nothing = np.zeros((2, 16), np.float32)
    quantise_fp8(a_product(tmp_path / "a.onnx", weight), tmp_path / "b.onnx", nothing)
    assert torch.equal(run(tmp_path / "b.onnx", nothing), torch.zeros(2, 16))


def test_activations_beyond_calibration_are_clipped_not_nan(tmp_path: Path) -> None:
    ones = np.ones((1, 16), np.float32)
    quantise_fp8(a_product(tmp_path / "a.onnx", np.eye(16, dtype=np.float32)), tmp_path / "b.onnx", ones)
    assert torch.allclose(run(tmp_path / "b.onnx", 100 * ones), torch.ones(1, 16), rtol=1e-3)


def test_nothing_to_quantise(tmp_path: Path) -> None:
    odd = a_product(tmp_path / "a.onnx", np.ones((16, 17), np.float32))
    with pytest.raises(EngineError, match=r"a\.onnx: no matrix product"):
        quantise_fp8(odd, tmp_path / "b.onnx", np.ones((1, 16), np.float32))
    assert not (tmp_path / "b.onnx").exists()


def test_tiles_that_do_not_fit(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 tiles"):
        quantise_fp8(exported, tmp_path / "a.onnx", tiles(0))
    with pytest.raises(ConfigError, match=r"does not take calibration tiles \(2, 64, 64, 3\)"):
        quantise_fp8(exported, tmp_path / "a.onnx", tiles(2).transpose(0, 2, 3, 1))
    with pytest.raises(ConfigError, match="float64"):
        quantise_fp8(exported, tmp_path / "a.onnx", tiles(2).astype(np.float64))


def test_tiles_that_give_nan(exported: Path, tmp_path: Path) -> None:
    broken = tiles(3)
    broken[1, 0, 5, 5] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        quantise_fp8(exported, tmp_path / "a.onnx", broken)


def test_bf16_files_are_refused(tmp_path: Path) -> None:
    constants = [helper.make_tensor(n, TensorProto.BFLOAT16, (16, 16), b"\0" * 512, raw=True) for n in "abc"]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("MatMul", ["y", "b"], ["z"]),
        helper.make_node("MatMul", ["z", "c"], ["features"]),
    ]
    ports = [
        helper.make_tensor_value_info(name, kind, ["batch", 16])
        for name, kind in (("pixels", TensorProto.FLOAT), ("features", TensorProto.BFLOAT16))
    ]
    graph = helper.make_graph(nodes, "bf16", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot run .*a\.onnx"):
        quantise_fp8(tmp_path / "a.onnx", tmp_path / "b.onnx", np.ones((1, 16), np.float32))


def test_old_opsets_are_refused(tmp_path: Path) -> None:
    model = onnx.load(str(a_product(tmp_path / "a.onnx", np.ones((16, 16), np.float32))))
    model.opset_import[0].version = 18
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match="opset 18; fp8 needs 19"):
        quantise_fp8(tmp_path / "a.onnx", tmp_path / "b.onnx", np.ones((1, 16), np.float32))


@pytest.mark.parametrize("module", ["onnxruntime", "ml_dtypes"])
def test_without_libraries(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExtraMissingError, match=f"fp8 needs {module}: pip install"):
        quantise_fp8(exported, tmp_path / "a.onnx", tiles(1))


# layers that stay as they are ---------------------------------------------------------------------------


def spoilt(block: int) -> nn.Module:
    """One channel before one product is 100,000 times as large as the others, which fp8 then rounds to 0."""
    encoder = an_encoder()
    norm = encoder.blocks[block].norm2  # type: ignore[union-attr, index]
    fc1 = encoder.blocks[block].mlp.fc1  # type: ignore[union-attr, index]
    norm.weight.data[0] *= 1e5
    fc1.weight.data[:, 0] *= 1e-5
    return encoder


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1])
def test_a_layer_that_fp8_spoils_is_left_out(block: int, tmp_path: Path) -> None:
    encoder = spoilt(block)
    source = export(encoder, tmp_path / "encoder.onnx")
    assert quantise_fp8(source, tmp_path / "all.onnx", tiles(6)) == ()  # nobody asked
    bad = least_cosine(run(tmp_path / "all.onnx", tiles(6)), run(source, tiles(6)))
    good = 1 - 0.5 * (1 - bad)
    left_out = quantise_fp8(source, tmp_path / "most.onnx", tiles(6), batch_size=4, min_cosine=good)
    assert left_out == (f"blocks.{block}.mlp.fc1",)
    assert least_cosine(run(tmp_path / "most.onnx", tiles(6)), run(source, tiles(6))) >= good > bad
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "most.onnx")).graph.node]
    assert kinds.count("QuantizeLinear") == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        *("encoder.onnx", "encoder.onnx.data", "all.onnx", "all.onnx.data", "most.onnx", "most.onnx.data")
    }


def test_nothing_is_left_out_where_fp8_is_close_enough(exported: Path, tmp_path: Path) -> None:
    assert quantise_fp8(exported, tmp_path / "a.onnx", tiles(4), min_cosine=FP8_COSINE) == ()
    assert [node.op_type for node in onnx.load(str(tmp_path / "a.onnx")).graph.node].count(
        "QuantizeLinear"
    ) == 7


def test_more_than_half_is_too_much(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"fp8 is too coarse.*with 3 of 7 layers left out.*0\.999999"):
        quantise_fp8(exported, tmp_path / "a.onnx", tiles(4), min_cosine=0.999999)


class CountedTrial:
    """Stands for files: fp8 is close enough once `needed` of the worst are left out."""

    source = Path("encoder.onnx")

    def __init__(self, needed: int, of: int) -> None:
        self.needed, self.products, self.written = needed, list(range(of)), []

    def worst_first(self) -> list[int]:
        return self.products[::-1]

    def write(self, left_out: list[int]) -> None:
        self.written.append(left_out)

    def min_cosine(self) -> float:
        return 0.995 if len(self.written[-1]) >= self.needed else 0.9


@pytest.mark.parametrize("needed", range(1, 17))
def test_as_few_as_possible_in_few_trials(needed: int) -> None:
    trial = CountedTrial(needed, of=33)
    left_out = fp8._left_out(trial, 0.99)  # type: ignore[arg-type]
    assert left_out == trial.products[::-1][:needed] == trial.written[-1]  # the worst, and the file has them
    assert len(trial.written) <= 10


def test_half_is_the_most() -> None:
    with pytest.raises(EngineError, match="with 16 of 33 layers"):
        fp8._left_out(CountedTrial(17, of=33), 0.99)  # type: ignore[arg-type]
