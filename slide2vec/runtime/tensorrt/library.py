"""NVIDIA's two compilers, TensorRT and TensorRT-RTX, behind one interface: what differs by name in the two.

Everything else is called on the objects that these make and is the same in both; what only TensorRT-RTX has
is in `rtx`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import tensorrt as trt
else:  # which of the two a class belongs to is known when it is made: `Library.own`
    trt = SimpleNamespace(ILogger=object, IProgressMonitor=object)

__all__ = ["MODULES", "TITLES", "Library", "Log", "error_text"]

logger = logging.getLogger(__name__)

#: Runtime -> the module that it is imported as.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
#: What TensorRT-RTX 1.7 logs as an internal error whenever a builder is made, and means nothing by.
MEANINGLESS = "Thread context has not been set"

Class = TypeVar("Class", bound="trt.ILogger | trt.IProgressMonitor")


class Log(trt.ILogger):  # type: ignore[misc]  # untyped where TensorRT is not installed
    """A library's messages into `logging`; errors are kept for the exception that will be raised.

    Made by `Library.log`.
    """

    levels: Mapping[trt.ILogger.Severity, int]
    title: str

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by the library, from any of its threads."""
        level = logging.DEBUG if msg.startswith(MEANINGLESS) else self.levels[severity]
        logger.log(level, "%s: %s", self.title, msg)
        if level >= logging.ERROR:
            self.errors.append(msg)


def error_text(log: Log) -> str:
    """What went wrong so far, in one line."""
    return "; ".join(log.errors) or f"{log.title} gave no reason"


class Library:
    """One of the two, imported.

    Args:
        runtime: "tensorrt" or "tensorrt-rtx".

    Attributes:
        compiles_late: kernels are compiled when a plan first runs, for each batch size anew; a plan is for
            compute capabilities, not for one GPU. TensorRT-RTX.

    Raises:
        ImportError, OSError: it is not installed, or does not load.
    """

    def __init__(self, runtime: str) -> None:
        if TYPE_CHECKING or runtime == "tensorrt":
            import tensorrt as trt
        else:
            import tensorrt_rtx_bindings as trt
        self.runtime, self.title, self.installed = runtime, TITLES[runtime], trt.__version__
        self.compiles_late = runtime == "tensorrt-rtx"
        self.new_builder, self.new_parser, self.new_runtime = trt.Builder, trt.OnnxParser, trt.Runtime
        self.new_dims = trt.Dims
        self.is_input, self.is_output = trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT
        # TensorRT's own `nptype` has neither bf16 nor fp8. Names are those of PyTorch and NumPy.
        self.dtypes = {
            trt.DataType.FLOAT: "float32",
            trt.DataType.HALF: "float16",
            trt.DataType.BF16: "bfloat16",
            trt.DataType.FP8: "float8_e4m3fn",
            trt.DataType.UINT8: "uint8",
        }
        # Networks of TensorRT 11 are always strongly typed; the flag is there, and ignored.
        self.strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.tf32, self.workspace = trt.BuilderFlag.TF32, trt.MemoryPoolType.WORKSPACE
        self.compatibility = {
            "none": trt.HardwareCompatibilityLevel.NONE,
            "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
            "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        }
        self._levels = {
            trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
            trt.ILogger.Severity.ERROR: logging.ERROR,
            trt.ILogger.Severity.WARNING: logging.WARNING,
            trt.ILogger.Severity.INFO: logging.DEBUG,
            trt.ILogger.Severity.VERBOSE: logging.DEBUG,
        }
        self._bases = trt.ILogger, trt.IProgressMonitor

    def log(self) -> Log:
        """A new log, which this library accepts."""
        own = self.own(Log)
        own.levels, own.title = self._levels, self.title
        return own()

    def own(self, made: type[Class]) -> type[Class]:
        """A subclass that is this library's own kind of logger or progress monitor, too."""
        of_logs, of_progress = self._bases
        base = of_logs if issubclass(made, Log) else of_progress
        return type(made.__name__, (made, base), {})
