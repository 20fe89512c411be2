"""A plan (a compiled network) and its execution contexts. All that runs a plan calls TensorRT here.

Import it only when TensorRT can be used (see `available`). No PyTorch: streams and buffers are numbers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt

from slide2vec.errors import EngineError

__all__ = ["Context", "Log", "Plan", "Port", "told"]

logger = logging.getLogger(__name__)

#: TensorRT's own `nptype` has neither bf16 nor fp8. Names are those of PyTorch and NumPy.
DTYPES = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.BF16: "bfloat16",
    trt.DataType.FP8: "float8_e4m3fn",
    trt.DataType.UINT8: "uint8",
}

LEVELS = {
    trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
    trt.ILogger.Severity.ERROR: logging.ERROR,
    trt.ILogger.Severity.WARNING: logging.WARNING,
    trt.ILogger.Severity.INFO: logging.DEBUG,
    trt.ILogger.Severity.VERBOSE: logging.DEBUG,
}


class Log(trt.ILogger):  # type: ignore[misc]  # untyped where TensorRT is not installed
    """TensorRT's messages into `logging`; errors are kept for the exception that will tell them."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        level = LEVELS[severity]
        logger.log(level, "TensorRT: %s", msg)
        if level >= logging.ERROR:
            self.errors.append(msg)


def told(log: Log) -> str:
    """What went wrong so far, in one line."""
    return "; ".join(log.errors) or "TensorRT gave no reason"


@dataclass(frozen=True)
class Port:
    """The input or the output of a plan: its dtype, and its shape without the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Plan:
    """A plan on the current CUDA device: one input, one output, the batch first.

    Raises:
        EngineError: the file cannot be read, or was built by another TensorRT or for another GPU, or is
            not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = Log()
        self._runtime = trt.Runtime(self._log)
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(_content(path))
        if engine is None:
            raise EngineError(
                f"{path} does not load: {told(self._log)}. Plans load only on the TensorRT and the kind "
                "of GPU that they were built for: build it again with `slide2vec build-engine`"
            )
        self._engine = engine
        self.input = self._port(trt.TensorIOMode.INPUT)
        self.output = self._port(trt.TensorIOMode.OUTPUT)

    def context(self) -> Context:
        """A new execution context: buffers of its own on the device, one batch at a time.

        Raises:
            EngineError: the device's memory is used up, most often.
        """
        context: trt.IExecutionContext | None = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self.path}: no execution context ({told(self._log)})")
        return Context(context, self, self._log)

    def _port(self, mode: trt.TensorIOMode) -> Port:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        mine = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        if len(mine) != 1:
            raise EngineError(f"{self.path} has {len(mine)} tensors of mode {mode}, 1 is needed: {mine}")
        dtype = self._engine.get_tensor_dtype(mine[0])
        if dtype not in DTYPES:
            raise EngineError(f"{self.path}: tensor {mine[0]} is of type {dtype}, which no encoder has")
        return Port(mine[0], DTYPES[dtype], tuple(self._engine.get_tensor_shape(mine[0]))[1:])


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error


class Context:
    """An execution context of `plan`; for one thread and one stream at a time."""

    def __init__(self, context: trt.IExecutionContext, plan: Plan, log: Log) -> None:
        self._context, self._plan, self._log = context, plan, log

    def enqueue(self, batch: int, source: int, target: int, stream: int) -> None:
        """Queue one batch on a CUDA stream; returns before it has run.

        Args:
            batch: its size; within the plan's profile.
            source, target: addresses on the device of input and output.
            stream: handle of the stream; not the default one, which TensorRT would synchronise.

        Raises:
            EngineError: TensorRT refuses.
        """
        done = (
            self._context.set_input_shape(self._plan.input.name, (batch, *self._plan.input.shape))
            and self._context.set_tensor_address(self._plan.input.name, source)
            and self._context.set_tensor_address(self._plan.output.name, target)
            and self._context.execute_async_v3(stream)
        )
        if not done:
            raise EngineError(f"{self._plan.path} failed on a batch of {batch}: {told(self._log)}")
