"""Compiled encoders on a CPU, by OpenVINO."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slide2vec.choices import RUNTIMES
from slide2vec.cpus import Budget
from slide2vec.errors import EngineError, ExtraMissingError
from slide2vec.lazy import without_collection
from slide2vec.runtime.base import Layout
from slide2vec.runtime.record import EngineRecord

__all__ = ["OpenVINOEngine", "capabilities", "load", "unavailable"]

# OpenVINO tells Google Analytics of every import; it has a stub for where this package is not found.
sys.modules.setdefault("openvino_telemetry", cast("Any", None))
#: OpenVINO's names of the precisions that it computes in; the weights of the file stay fp32.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def unavailable(
    runtime: str = "openvino", precision: str = "fp32", device: torch.device | None = None
) -> str | None:
    """Why OpenVINO cannot be used here in a precision, None when it can."""
    if find_spec("openvino") is None:
        return f"OpenVINO is not installed: {RUNTIMES['openvino'].install}"
    if precision not in HINTS:
        return f"OpenVINO does not compute in {precision}"
    try:
        able = capabilities()
    except (ImportError, OSError, RuntimeError) as error:
        return f"OpenVINO is installed, but does not load: {error}"
    if precision != "fp32" and precision.upper() not in able:
        return f"this CPU ({platform.machine()}) does not compute in {precision}"
    return None


@cache
def capabilities() -> tuple[str, ...]:
    """What OpenVINO says that this CPU computes in: "FP32", "BF16", …, sorted."""
    return tuple(sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))


@cache
def _core() -> Any:
    with without_collection():
        import openvino

    return openvino.Core()


def load(record: EngineRecord, file: Path, device: torch.device) -> OpenVINOEngine:
    """The engine of a record, see `OpenVINOEngine`."""
    return OpenVINOEngine(file, **record.engine_arguments)


class OpenVINOEngine:
    """See `slide2vec.runtime.base.Engine`.

    Args:
        model: an ONNX file or OpenVINO's own (.xml), the weights beside it.
        threads: None = as the CPU budget says.

    Raises:
        ExtraMissingError: OpenVINO is not installed.
        EngineError: the file cannot be read, or this CPU does not compute in the precision.
    """

    runtime = "openvino"
    device = torch.device("cpu")
    holds_gil = False

    def __init__(
        self, model: Path, *, precision: str, feature_dim: int, layout: Layout, threads: int | None = None
    ) -> None:
        if find_spec("openvino") is None:
            raise ExtraMissingError(unavailable() or "")
        if reason := unavailable(precision=precision):
            raise EngineError(reason)
        self.precision, self.feature_dim, self.layout = precision, feature_dim, layout
        threads = threads or Budget.of("cpu").encoder_threads
        self._request: Any | None = _compiled(model, precision, threads).create_infer_request()

    def run(self, pixels: Tensor) -> Tensor:
        """Pixels of `layout` -> (B, D) float32."""
        if self._request is None:
            raise EngineError("the engine is closed")
        found = self._request.infer({0: pixels.contiguous().numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0].copy())  # its own buffer is written again by the next run

    def close(self) -> None:
        """Release the compiled model."""
        self._request = None


def _compiled(model: Path, precision: str, threads: int) -> Any:
    """One stream over all threads: a batch at a time is what the stream of tiles gives."""
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        return _core().compile_model(str(model), "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EngineError(f"OpenVINO cannot load {model}: {reason}") from error
