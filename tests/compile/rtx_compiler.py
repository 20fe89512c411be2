"""NVIDIA's own parser and builder, as TensorRT-RTX brings them: they need no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["WHY_NOT", "build", "refusals"]

WHY_NOT = None if find_spec("tensorrt_rtx_bindings") else "TensorRT-RTX is not installed (Linux on x86-64)"


def _parsed(path: Path) -> tuple[Any, Any, Any, Any]:
    import tensorrt_rtx_bindings as trt

    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parser.parse_from_file(str(path))
    return trt, builder, network, parser


def refusals(path: Path) -> list[str]:
    """What TensorRT's parser refuses of an ONNX file; nothing where it is not installed."""
    if WHY_NOT:
        return []
    parser = _parsed(path)[3]
    return [parser.get_error(index).desc() for index in range(parser.num_errors)]


def build(path: Path, *, batch: int = 2, target: str | None = None) -> bytes | None:
    """The plan of an ONNX file, for GPUs of a compute capability ("SM89"); None where the builder fails."""
    trt, builder, network, parser = _parsed(path)
    assert parser.num_errors == 0, parser.get_error(0).desc()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    pixels = network.get_input(0)
    row = list(pixels.shape)[1:]
    profile.set_shape(pixels.name, (1, *row), (batch, *row), (batch, *row))
    config.add_optimization_profile(profile)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)
