"""An ONNX file in fp8: quantised weights and activations of its matrix products.

Each MatMul or Gemm of an activation and a constant weight gets QuantizeLinear and DequantizeLinear around
the activation, one scale per tensor, and its weight stored as FLOAT8E4M3FN with a scale per output channel.
A compiler fuses them into an fp8 product; ONNX Runtime on a CPU computes what that would give. Scales are
amax / 448, 448 being the largest number of the format (Micikevicius et al., FP8 Formats for Deep Learning,
2022, arXiv:2209.05433), with amax seen on the user's own tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["quantise_fp8"]

#: The first opset whose QuantizeLinear knows fp8.
OPSET = 19


def quantise_fp8(source: Path, target: Path, calibration: NDArray[Any], *, batch_size: int = 8) -> None:
    """Write `source` in fp8. The first weighted node (the patch embedding), the last one, and products with
    sides that are no multiples of 16 stay as they are.

    Args:
        source: an ONNX file in fp32 or fp16, opset 19 or newer, with one input and one output; not bf16,
            which ONNX Runtime cannot run on a CPU.
        target: the ONNX file to write; its weights go into `<name>.data` beside it.
        calibration: (N, ...) tiles as the file's input takes them; of the tissue that will be embedded.
        batch_size: tiles per run while calibrating: memory grows with it, the result does not depend on it
            beyond rounding.

    Raises:
        ExtraMissingError: onnx or onnxruntime is not installed.
        ConfigError: no tiles, or tiles that the file does not take.
        EngineError: nothing in the file can be quantised, it cannot be run, or what it computes is not
            finite.
        OutputError: the target cannot be written.
    """
    if len(calibration) == 0 or batch_size < 1:
        raise ConfigError(f"calibration on {len(calibration)} tiles, batch_size={batch_size}: 1 or more each")
    model = _load(source)
    from slide2vec.compile.fp8_graph import measuring, products, quantise, save

    chosen = products(model.graph)
    if not chosen:
        raise EngineError(f"{source}: no matrix product with a constant weight can be quantised to fp8")
    names = list(dict.fromkeys(product.activation for product in chosen))
    largest = _largest(source, measuring(model, names), calibration, batch_size)
    _load_weights(model, source)
    quantise(model.graph, chosen, dict(zip(names, largest, strict=True)))
    save(model, target)


def _load(source: Path) -> ModelProto:
    """The graph; weights that are stored outside stay there."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # before the work begins
    except ImportError as error:
        raise ExtraMissingError(
            f"fp8 needs {error.name}: pip install onnx onnxruntime (calibration runs the encoder on the CPU)"
        ) from error
    model = onnx.load(str(source), load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OPSET:
        raise EngineError(f"{source} has opset {opset}; fp8 needs {OPSET} or newer: export it again")
    return model


def _load_weights(model: ModelProto, source: Path) -> None:
    from onnx.external_data_helper import load_external_data_for_model

    load_external_data_for_model(model, str(source.parent))


def _largest(source: Path, model: ModelProto, tiles: NDArray[Any], batch_size: int) -> list[float]:
    """The largest value of each scalar output over all tiles: a number each is all that is kept."""
    session = _session(source, model)
    largest: NDArray[np.float64] = np.zeros(1)
    for first in range(0, len(tiles), batch_size):
        features, *found = _run(source, session, np.ascontiguousarray(tiles[first : first + batch_size]))
        largest = np.maximum(largest, found)
        if not (np.isfinite(features).all() and np.isfinite(largest).all()):
            raise EngineError(f"{source} computes what is not finite on the calibration tiles")
    return [float(value) for value in largest]


def _run(source: Path, session: Any, batch: NDArray[Any]) -> list[Any]:
    feed = session.get_inputs()[0].name
    try:
        return session.run(None, {feed: batch})  # type: ignore[no-any-return]
    except _refusals() as error:
        raise ConfigError(
            f"{source} does not take calibration tiles {batch.shape} {batch.dtype}: {error}"
        ) from error


def _session(source: Path, model: ModelProto) -> Any:
    """ONNX Runtime on the CPU; the graph is in memory, weights stored outside are read from there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors, which come as exceptions
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(source.resolve().parent)
    )
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except _refusals() as error:
        raise EngineError(f"ONNX Runtime cannot run {source} to calibrate it: {error}") from error


def _refusals() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException
