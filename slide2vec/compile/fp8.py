"""An ONNX file in fp8: quantised weights and activations of its matrix products.

Each MatMul or Gemm of an activation and a constant weight gets QuantizeLinear and DequantizeLinear around
the activation, one scale per tensor, and its weight stored as FLOAT8E4M3FN with a scale per output channel.
A compiler fuses them into an fp8 product; ONNX Runtime on a CPU computes what that would give. Scales are
amax / 448, 448 being the largest number of the format (Micikevicius et al., FP8 Formats for Deep Learning,
2022, arXiv:2209.05433), with amax seen on the user's own tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError

if TYPE_CHECKING:
    from onnx import ModelProto

    from slide2vec.compile.fp8_graph import Product

__all__ = ["quantise_fp8"]

logger = logging.getLogger(__name__)

#: The first opset whose QuantizeLinear knows fp8.
OPSET = 19


def quantise_fp8(
    source: Path,
    target: Path,
    calibration: NDArray[Any],
    *,
    batch_size: int = 8,
    min_cosine: float | None = None,
) -> tuple[str, ...]:
    """Write `source` in fp8. The first weighted node (the patch embedding), the last one, and products with
    sides that are no multiples of 16 stay as they are.

    Where the features are then too far from those of `source`, the layers that fp8 disturbs most stay as
    they are, too: as few as are found by doubling their number and halving the last step. Disturbance is
    |y - y8|^2 / |y|^2 of a layer's product y, with y8 what fp8 makes of it, over all calibration tiles.

    Args:
        source: an ONNX file in fp32 or fp16, opset 19 or newer, with one input and one output; not bf16,
            which ONNX Runtime cannot run on a CPU.
        target: the ONNX file to write; its weights go into `<name>.data` beside it.
        calibration: (N, ...) tiles as the file's input takes them; of the tissue that will be embedded.
        batch_size: tiles per run while calibrating: memory grows with it, the result does not depend on it
            beyond rounding.
        min_cosine: between the features of both files, for every calibration tile; None = not checked.

    Returns:
        Names of the layers that were left as they are to keep `min_cosine`, the worst first.

    Raises:
        ExtraMissingError: ml_dtypes, onnx or onnxruntime is not installed.
        ConfigError: no tiles, or tiles that the file does not take.
        EngineError: nothing in the file can be quantised, it cannot be run, what it computes is not
            finite, or more than half of its layers would have to stay as they are.
        OutputError: the target cannot be written.
    """
    if len(calibration) == 0 or batch_size < 1:
        raise ConfigError(f"calibration on {len(calibration)} tiles, batch_size={batch_size}: 1 or more each")
    model = _load(source)
    from slide2vec.compile.fp8_graph import measuring, products

    chosen = products(model.graph)
    if not chosen:
        raise EngineError(f"{source}: no matrix product with a constant weight can be quantised to fp8")
    names = list(dict.fromkeys(product.activation for product in chosen))
    features, found = _outputs(source, measuring(model, names), calibration, batch_size)
    if not (np.isfinite(features).all() and np.isfinite(found).all()):
        raise EngineError(f"{source} computes what is not finite on the calibration tiles")
    amax = dict(zip(names, found.max(axis=0).tolist(), strict=True))
    trial = _Trial(source, target, calibration, batch_size, chosen, amax, features)
    trial.write([])
    if min_cosine is None or trial.min_cosine() >= min_cosine:
        return ()
    return tuple(product.layer for product in _left_out(trial, min_cosine))


@dataclass(frozen=True)
class _Trial:
    """Quantised files of one source: written with some products left as they are, and compared with it."""

    source: Path
    target: Path
    calibration: NDArray[Any]
    batch_size: int
    chosen: list[Product]
    amax: dict[str, float]
    features: NDArray[Any]

    def write(self, left_out: Sequence[Product]) -> None:
        """The target, with all products in fp8 but these."""
        from slide2vec.compile.fp8_graph import quantise, save

        model = self._whole()
        quantise(model.graph, [each for each in self.chosen if each not in left_out], self.amax)
        save(model, self.target)

    def min_cosine(self) -> float:
        """Of the target's features to the source's, over all tiles; -1 where they are not finite."""
        found, _ = _outputs(self.target, None, self.calibration, self.batch_size)
        a, b = (each.astype(np.float64) for each in (found, self.features))
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return float(np.nan_to_num(cosines, nan=-1.0).min())

    def worst_first(self) -> list[Product]:
        """The products, those first that fp8 disturbs most."""
        from slide2vec.compile.fp8_graph import comparing, save

        model = self._whole()
        comparing(model.graph, self.chosen, self.amax)
        path = self.target.with_name(f"{self.target.name}.compared")
        try:
            save(model, path)
            del model
            _, sums = _outputs(path, None, self.calibration, self.batch_size)
        finally:
            for each in (path, path.with_name(f"{path.name}.data")):
                each.unlink(missing_ok=True)
        lost, whole = sums.sum(axis=0).reshape(-1, 2).T
        share = np.nan_to_num(lost / np.maximum(whole, np.finfo(np.float64).tiny), nan=np.inf)
        return [self.chosen[index] for index in np.argsort(-share, kind="stable")]

    def _whole(self) -> ModelProto:
        model = _load(self.source)
        _load_weights(model, self.source)
        return model


def _left_out(trial: _Trial, min_cosine: float) -> list[Product]:
    """The fewest of the worst products that suffice, as far as doubling and halving finds them; the target
    is written with these left out.

    Raises:
        EngineError: half of all would not suffice.
    """
    worst = trial.worst_first()

    def suffices(count: int) -> bool:
        trial.write(worst[:count])
        found = trial.min_cosine()
        logger.info("fp8 without the %d worst of %d layers: least cosine %.6f", count, len(worst), found)
        return found >= min_cosine

    too_few, count, most = 0, 1, len(worst) // 2
    while count <= most and not suffices(count):
        too_few, count = count, 2 * count
    if count > most and (too_few == most or not suffices(most)):
        raise EngineError(
            f"fp8 is too coarse for {trial.source.name}: with {most} of {len(worst)} layers left out its "
            f"least cosine to the file in its own precision is below {min_cosine:g}"
        )
    enough = min(count, most)
    written = enough
    while enough - too_few > 1:
        written = (too_few + enough) // 2
        too_few, enough = (too_few, written) if suffices(written) else (written, enough)
    if written != enough:
        trial.write(worst[:enough])
    return worst[:enough]


def _load(source: Path) -> ModelProto:
    """The graph; weights that are stored outside stay there."""
    try:
        import ml_dtypes  # noqa: F401  # before the work begins
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ExtraMissingError(
            f"fp8 needs {error.name}: pip install ml-dtypes onnx onnxruntime (calibration runs the encoder "
            "on the CPU)"
        ) from error
    model = onnx.load(str(source), load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OPSET:
        raise EngineError(f"{source} has opset {opset}; fp8 needs {OPSET} or newer: export it again")
    return model


def _load_weights(model: ModelProto, source: Path) -> None:
    from onnx.external_data_helper import load_external_data_for_model

    load_external_data_for_model(model, str(source.parent))


def _outputs(
    source: Path, model: ModelProto | None, tiles: NDArray[Any], batch_size: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """(N, D) features of all tiles, and (batches, k) of the k further outputs, which are scalars.

    Args:
        source: the file, or the one whose weights `model` has.
    """
    session = _session(source, model)
    features, scalars = [], []
    for first in range(0, len(tiles), batch_size):
        found, *further = _run(source, session, np.ascontiguousarray(tiles[first : first + batch_size]))
        features.append(found)
        scalars.append(np.array(further, np.float64))
    return np.concatenate(features), np.stack(scalars)


def _run(source: Path, session: Any, batch: NDArray[Any]) -> list[Any]:
    feed = session.get_inputs()[0].name
    try:
        return session.run(None, {feed: batch})  # type: ignore[no-any-return]
    except _refusals() as error:
        raise ConfigError(
            f"{source} does not take calibration tiles {batch.shape} {batch.dtype}: {error}"
        ) from error


def _session(source: Path, model: ModelProto | None) -> Any:
    """ONNX Runtime on the CPU, of a file or of a graph in memory whose weights stay outside."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors, which come as exceptions
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(source.resolve().parent)
    )
    try:
        graph = str(source) if model is None else model.SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except _refusals() as error:
        raise EngineError(f"ONNX Runtime cannot run {source} to calibrate it: {error}") from error


def _refusals() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException
