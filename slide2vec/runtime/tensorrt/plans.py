"""A plan (a compiled network) and its execution contexts. All that runs a plan calls TensorRT here.

No PyTorch: streams and buffers are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt.library import Library, Log, error_text

if TYPE_CHECKING:
    import tensorrt as trt

    from slide2vec.runtime.tensorrt.rtx import Kernels

__all__ = ["Context", "Plan", "Port"]


@dataclass(frozen=True)
class Port:
    """The input or the output of a plan: its dtype, and its shape without the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Plan:
    """A plan on the current CUDA device: one input, one output, the batch first.

    Args:
        runtime: "tensorrt" or "tensorrt-rtx".
        kernels: file for kernels that TensorRT-RTX compiles on this GPU; None = they are not kept.

    Raises:
        EngineError: the file cannot be read, or was built by another TensorRT or for another GPU, or is
            not one of ours.
    """

    def __init__(self, path: Path, runtime: str = "tensorrt", kernels: Path | None = None) -> None:
        self.path, self.library = path, Library(runtime)
        self._log = self.library.log()
        self._runtime = self.library.new_runtime(self._log)
        content = _content(path)
        if self.library.compiles_late:
            self._check(content)
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(self._refused(error_text(self._log)))
        self._engine = engine
        self.kernels = self._late(kernels) if self.library.compiles_late else None
        self.input = self._port(self.library.is_input)
        self.output = self._port(self.library.is_output)

    def _check(self, content: bytes) -> None:
        """Raises EngineError when the header of a plan of TensorRT-RTX says that it does not run here."""
        from slide2vec.runtime.tensorrt.rtx import invalidity

        reasons = invalidity(self._runtime, content)
        if reasons is not None:
            raise EngineError(self._refused("; ".join(reasons) or error_text(self._log)))

    def _late(self, path: Path | None) -> Kernels:
        from slide2vec.runtime.tensorrt.rtx import Kernels

        return Kernels(self._engine, path)

    def _refused(self, reason: str) -> str:
        return (
            f"{self.path} does not load: {reason}. Plans load only on the {self.library.title} and the kind "
            "of GPU that they were built for: build it again with `slide2vec build-engine`"
        )

    def batch(self, count: int, profile: BatchProfile) -> int:
        """The batch that `count` tiles run as; rows beyond them are computed in vain.

        TensorRT-RTX compiles kernels for each size that it meets: it meets powers of two and the largest.
        """
        if not self.library.compiles_late:
            return max(count, profile.min)
        return min(max(1 << (count - 1).bit_length(), profile.min), profile.max)

    def context(self) -> Context:
        """A new execution context: buffers of its own on the device, one batch at a time.

        Raises:
            EngineError: the device's memory is used up, most often.
        """
        context: trt.IExecutionContext | None
        context = self.kernels.context() if self.kernels else self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self.path}: no execution context ({error_text(self._log)})")
        return Context(context, self, self._log)

    def _port(self, mode: trt.TensorIOMode) -> Port:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        mine = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        if len(mine) != 1:
            raise EngineError(f"{self.path} has {len(mine)} tensors of mode {mode}, 1 is needed: {mine}")
        dtype = self._engine.get_tensor_dtype(mine[0])
        if dtype not in self.library.dtypes:
            raise EngineError(f"{self.path}: tensor {mine[0]} is of type {dtype}, which no encoder has")
        return Port(mine[0], self.library.dtypes[dtype], tuple(self._engine.get_tensor_shape(mine[0]))[1:])


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
            raise EngineError(f"{self._plan.path} failed on a batch of {batch}: {error_text(self._log)}")
