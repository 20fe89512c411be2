"""What of an ONNX graph becomes fp8, and how it is written: the graph alone, nothing is run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from slide2vec.files import atomic_path

__all__ = ["Product", "comparing", "measuring", "products", "quantise", "save"]

#: The largest finite FLOAT8E4M3FN.
LARGEST = 448.0
#: Rows and columns of a weight come in these: what fp8 units multiply at once.
GRANULE = 16
#: Smaller tensors stay inside the ONNX file, bytes.
INSIDE = 1024


@dataclass(frozen=True)
class Product:
    """A matrix product to quantise: names of its node's output, its activation and its constant weight, the
    weight's axis of output channels, and the name of its layer."""

    output: str
    activation: str
    weight: str
    axis: int
    layer: str = ""


def products(graph: GraphProto) -> list[Product]:
    """Products with constant weights, in order, without the graph's first and last weighted node."""
    shapes = {constant.name: tuple(constant.dims) for constant in graph.initializer}
    weighted = [node for node in graph.node if _is_weighted(node, shapes)]
    return [
        Product(
            node.output[0],
            node.input[0],
            node.input[1],
            0 if _attribute(node, "transB") else 1,
            _layer(node),
        )
        for node in weighted[1:-1]
        if node.op_type != "Conv" and not _attribute(node, "transA") and _fits(shapes[node.input[1]])
    ]


def _is_weighted(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    takes_weight = node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in shapes
    return takes_weight and node.input[0] not in shapes


def _fits(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(side % GRANULE == 0 for side in shape)


def _attribute(node: NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _layer(node: NodeProto) -> str:
    """Name of the PyTorch module that a node was exported from, else the node's own."""
    scopes = (each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes")
    try:
        names = [name for name in ast.literal_eval(next(scopes, "[]"))[:-1] if name]
    except (ValueError, SyntaxError, TypeError):  # the exporter writes it for people, in no promised form
        names = []
    return str(names[-1]).removeprefix("encoder.") if names else node.name or node.output[0]


def measuring(model: ModelProto, names: list[str]) -> ModelProto:
    """The model with max |x| of the named tensors as further outputs, float32 scalars after its own."""
    measured = ModelProto()
    measured.CopyFrom(model)
    graph = measured.graph
    for index, name in enumerate(names):
        magnitude, largest, output = (f"fp8_{what}_{index}" for what in ("abs", "max", "amax"))
        graph.node.append(helper.make_node("Abs", [name], [magnitude]))
        graph.node.append(helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0))
        graph.node.append(helper.make_node("Cast", [largest], [output], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    return measured


def quantise(graph: GraphProto, chosen: list[Product], amax: dict[str, float]) -> None:
    """Put the Q/DQ pairs into the graph, each before its first use; weights are in memory.

    Args:
        amax: largest magnitude of each activation.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    by_output = {product.output: product for product in chosen}
    written: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        if product := by_output.get(node.output[0]):
            nodes += _pairs(graph, product, constants[product.weight], amax, written)
            node.input[0], node.input[1] = written[product.activation], written[product.weight]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)


def comparing(graph: GraphProto, chosen: list[Product], amax: dict[str, float]) -> None:
    """Have the graph compute each product in fp8 besides, from the same activation. Further outputs, two
    float32 scalars per product after its own: sum of squares of the difference, and of the product."""
    constants = {constant.name: constant for constant in graph.initializer}
    by_output = {product.output: index for index, product in enumerate(chosen)}
    written: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        nodes.append(node)
        if (index := by_output.get(node.output[0])) is None:
            continue
        product = chosen[index]
        nodes += _pairs(graph, product, constants[product.weight], amax, written)
        rounded = NodeProto()
        rounded.CopyFrom(node)
        rounded.name, rounded.output[0] = f"fp8_again_{index}", f"fp8_again_{index}"
        rounded.input[0], rounded.input[1] = written[product.activation], written[product.weight]
        nodes += [rounded, *_squares(node.output[0], rounded.output[0], index)]
    del graph.node[:]
    graph.node.extend(nodes)
    names = [f"fp8_{what}_{index}" for index in range(len(chosen)) for what in ("lost", "whole")]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names)


def _squares(exact: str, rounded: str, index: int) -> list[NodeProto]:
    """Sums of squares in float32: those of fp16 overflow."""
    a, b, difference = (f"fp8_{what}_{index}" for what in ("exact", "rounded", "difference"))
    return [
        helper.make_node("Cast", [exact], [a], to=TensorProto.FLOAT),
        helper.make_node("Cast", [rounded], [b], to=TensorProto.FLOAT),
        helper.make_node("Sub", [a, b], [difference]),
        helper.make_node("ReduceSumSquare", [difference], [f"fp8_lost_{index}"], keepdims=0),
        helper.make_node("ReduceSumSquare", [a], [f"fp8_whole_{index}"], keepdims=0),
    ]


def _pairs(
    graph: GraphProto,
    product: Product,
    weight: TensorProto,
    amax: dict[str, float],
    written: dict[str, str],
) -> list[NodeProto]:
    """The nodes that a product's inputs need, once for all products that share them; `written` is
    tensor -> what it is once quantised and back."""
    nodes: list[NodeProto] = []
    if product.activation not in written:
        dtype = helper.tensor_dtype_to_np_dtype(weight.data_type)
        nodes += _activation(graph, product.activation, amax[product.activation], dtype)
        written[product.activation] = nodes[-1].output[0]
    if product.weight not in written:
        nodes.append(_weight(graph, weight, product.axis))
        written[product.weight] = nodes[-1].output[0]
    return nodes


def _activation(graph: GraphProto, name: str, amax: float, dtype: np.dtype[Any]) -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear with one scale for the tensor."""
    scale, zero = f"{name}_fp8_scale", f"{name}_fp8_zero"
    graph.initializer.append(numpy_helper.from_array(_scale(np.array(amax), dtype), scale))
    graph.initializer.append(_fp8(np.zeros((), dtype), zero))
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_fp8"], f"{name}_fp8_q"),
        helper.make_node(
            "DequantizeLinear", [f"{name}_fp8", scale, zero], [f"{name}_fp8_back"], f"{name}_fp8_dq"
        ),
    ]


def _weight(graph: GraphProto, weight: TensorProto, axis: int) -> NodeProto:
    """The weight in fp8, and DequantizeLinear with a scale per output channel."""
    values = numpy_helper.to_array(weight)
    name, scale, zero = (f"{weight.name}_fp8{suffix}" for suffix in ("", "_scale", "_zero"))
    scales = _scale(np.abs(values).max(axis=1 - axis), values.dtype)
    scaled = values.astype(np.float32) / np.expand_dims(scales, 1 - axis).astype(np.float32)
    graph.initializer.append(_fp8(scaled, name))
    graph.initializer.append(numpy_helper.from_array(scales, scale))
    graph.initializer.append(_fp8(np.zeros_like(scales), zero))
    return helper.make_node(
        "DequantizeLinear", [name, scale, zero], [f"{name}_back"], f"{name}_dq", axis=axis
    )


def _scale(amax: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """amax / 448, never 0: what is all zeros stays so under any scale."""
    scale = (amax.astype(np.float64) / LARGEST).astype(dtype)
    return np.where(scale > 0, scale, np.ones_like(scale))


def _fp8(values: NDArray[Any], name: str) -> TensorProto:
    """Nearest FLOAT8E4M3FN, ties to even; beyond the largest, the largest."""
    cast = np.clip(values.astype(np.float32), -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, cast.shape, cast.tobytes(), raw=True)


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def save(model: ModelProto, target: Path) -> None:
    """Write the file, and its weights beside it as `<name>.data`; both are checked by onnx before.

    Raises:
        OutputError: they cannot be written.
        onnx.checker.ValidationError: the graph is not ONNX.
    """
    data = f"{target.name}.data"
    with atomic_path(target) as temporary:
        onnx.save_model(
            model, str(temporary), save_as_external_data=True, location=data, size_threshold=INSIDE
        )
        weights = temporary.with_name(data)
        try:
            onnx.checker.check_model(str(temporary))
            weights.replace(target.with_name(data))
        finally:
            weights.unlink(missing_ok=True)
