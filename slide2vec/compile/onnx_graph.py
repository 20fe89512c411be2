"""An ONNX graph as a person would write it: what is constant is computed, nothing is sliced to be squeezed.

TensorRT turns every Slice and Squeeze of a graph with a dynamic batch into a dozen layers of shape
arithmetic; a Gather of one index is a single layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from slide2vec.files import atomic_path

__all__ = ["node_counts", "tidy"]

#: What may be computed ahead: cheap, exact, and the same in every implementation. Resize is not.
FOLDABLE = frozenset(
    {"Add", "Cast", "Concat", "ConstantOfShape", "Div", "Expand", "Gather", "Identity", "Mul", "Range"}
    | {"Reshape", "Shape", "Slice", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)


def tidy(path: Path) -> None:
    """Rewrite an ONNX file in place; weights that lie beside it are left where they are.

    Raises:
        OutputError: it cannot be written.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    _pick_instead_of_slicing(graph)
    _fold(model)
    _drop_unused(graph)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def node_counts(path: Path) -> Counter[str]:
    """How many nodes of each operator a file has."""
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def _constants(graph: GraphProto) -> dict[str, NDArray[np.generic]]:
    """The constants that are inside the file (small ones) by name."""
    inside = (each for each in graph.initializer if each.data_location != TensorProto.EXTERNAL)
    return {each.name: numpy_helper.to_array(each) for each in inside}


def _readers(graph: GraphProto) -> Counter[str]:
    """How often each tensor is read."""
    read = Counter(name for node in graph.node for name in node.input)
    read.update(output.name for output in graph.output)
    return read


def _pick_instead_of_slicing(graph: GraphProto) -> None:
    """x[i : i + 1] along one axis, then squeezed, is a Gather of index i."""
    constants, read = _constants(graph), _readers(graph)
    slices = {node.output[0]: node for node in graph.node if node.op_type == "Slice"}
    gone: set[str] = set()
    for node in graph.node:
        sliced = slices.get(node.input[0]) if node.op_type == "Squeeze" and len(node.input) == 2 else None
        picked = None if sliced is None or read[node.input[0]] > 1 else _picked(sliced, node, constants)
        if sliced is None or picked is None:
            continue
        axis, index = picked
        name = f"{node.output[0]}_index"
        graph.initializer.append(numpy_helper.from_array(np.array(index, np.int64), name))
        node.op_type, node.input[0], node.input[1] = "Gather", sliced.input[0], name
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", axis))
        gone.add(sliced.output[0])
    _remove(graph, gone)


def _picked(
    sliced: NodeProto, squeezed: NodeProto, constants: dict[str, NDArray[np.generic]]
) -> tuple[int, int] | None:
    """(axis, index) that a Slice and the Squeeze after it pick, if that is what they do."""
    names = list(sliced.input)[1:]
    if len(names) < 3 or not all(name in constants for name in names if name):
        return None
    (start, end, axes), steps = (constants[name].ravel() for name in names[:3]), names[3:]
    if len(axes) != 1 or int(end[0]) != int(start[0]) + 1 or int(start[0]) < 0:
        return None
    if steps and int(constants[steps[0]].ravel()[0]) != 1:
        return None
    squeeze = constants.get(squeezed.input[1])
    if squeeze is None or squeeze.ravel().tolist() != axes.tolist():
        return None
    return int(axes[0]), int(start[0])


def _fold(model: ModelProto) -> None:
    """Compute what depends on small constants alone."""
    graph = model.graph
    constants = _constants(graph)
    sizes = _known_sizes(graph)
    for node in list(graph.node):
        if node.op_type in ("Slice", "Gather") and node.input[0] in sizes:
            _fold_size(graph, node, sizes[node.input[0]], constants)
            continue
        inputs = [name for name in node.input if name]
        if node.op_type not in FOLDABLE or not inputs or not all(name in constants for name in inputs):
            continue
        (value,) = _computed(model, node, {name: constants[name] for name in inputs})
        constants[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        _remove(graph, {node.output[0]})


def _known_sizes(graph: GraphProto) -> dict[str, list[int | None]]:
    """What Shape nodes give, as far as it is known: None for the batch."""
    shapes = {
        each.name: [
            dim.dim_value if dim.HasField("dim_value") else None for dim in each.type.tensor_type.shape.dim
        ]
        for each in (*graph.input, *graph.value_info)
    }
    found = {}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            start, end = (_attribute(node, name) for name in ("start", "end"))
            found[node.output[0]] = shapes[node.input[0]][slice(start, end)]
    return found


def _attribute(node: NodeProto, name: str) -> int | None:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), None)


def _fold_size(
    graph: GraphProto, node: NodeProto, size: list[int | None], constants: dict[str, NDArray[np.generic]]
) -> None:
    """A Slice or Gather of known sizes is a constant."""
    if not all(name in constants for name in node.input[1:]):
        return
    given = [constants[name].ravel().tolist() for name in node.input[1:]]
    if node.op_type == "Gather":
        picked = [size[index] for index in given[0]]
        shape = constants[node.input[1]].shape
    else:
        picked = size[slice(given[0][0], given[1][0], given[3][0] if len(given) > 3 else None)]
        shape = (len(picked),)
    if None in picked:
        return
    constants[node.output[0]] = np.array(picked, np.int64).reshape(shape)
    graph.initializer.append(numpy_helper.from_array(constants[node.output[0]], node.output[0]))
    _remove(graph, {node.output[0]})


def _computed(
    model: ModelProto, node: NodeProto, inputs: dict[str, NDArray[np.generic]]
) -> Iterator[NDArray[np.generic]]:
    known = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    single = helper.make_model(
        helper.make_graph([node], "constant", known, outputs), opset_imports=model.opset_import
    )
    yield from (np.asarray(value) for value in ReferenceEvaluator(single).run(None, inputs))


def _remove(graph: GraphProto, outputs: set[str]) -> None:
    kept = [node for node in graph.node if node.output[0] not in outputs]
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unused(graph: GraphProto) -> None:
    """Nodes whose outputs nobody reads, then constants likewise."""
    while True:
        read = _readers(graph)
        unread = {node.output[0] for node in graph.node if not any(read[name] for name in node.output)}
        if not unread:
            break
        _remove(graph, unread)
    kept = [constant for constant in graph.initializer if read[constant.name]]
    del graph.initializer[:]
    graph.initializer.extend(kept)
