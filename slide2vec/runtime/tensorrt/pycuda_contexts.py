"""Page-locked buffers, streams and events on pycuda. All that calls pycuda is here.

Import it only when pycuda can be imported (see `deploy`).
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pycuda.driver as cuda
from numpy.typing import NDArray

from slide2vec.errors import EngineError
from slide2vec.runtime.record import EngineRecord
from slide2vec.runtime.tensorrt.plans import Context, Plan

__all__ = ["Device", "PinnedContext"]

#: CU_STREAM_NON_BLOCKING of cuda.h: not ordered with the default stream.
NON_BLOCKING = 1
INPUTS: dict[str, np.dtype[Any]] = {"uint8_nhwc": np.dtype(np.uint8), "float32_nchw": np.dtype(np.float32)}


class PinnedContext:
    """A context, its stream, and its buffers on both sides, for batches of up to `size`."""

    def __init__(
        self, context: Context, size: int, row: tuple[int, ...], dtype: np.dtype[Any], dim: int
    ) -> None:
        self.context = context
        self.stream = cuda.Stream(NON_BLOCKING)
        self.done = cuda.Event()
        self.pixels: NDArray[Any] = cuda.pagelocked_empty((size, *row), dtype)
        self.features: NDArray[np.float32] = cuda.pagelocked_empty((size, dim), np.float32)
        self.pixels.fill(0)  # rows that a small batch leaves unused are computed, too
        self.source = cuda.mem_alloc(self.pixels.nbytes)
        self.target = cuda.mem_alloc(self.features.nbytes)

    def free(self) -> None:
        """Release what it holds on the device."""
        self.stream.synchronize()
        self.source.free()
        self.target.free()


class Device:
    """A plan and its contexts on one device, in the device's primary context.

    Raises:
        EngineError: there is no such device, or the plan does not fit the record, or CUDA fails.
    """

    def __init__(self, path: Path, record: EngineRecord, number: int, buffers: int) -> None:
        self._path, self._record, self._context = path, record, _primary_context(number)
        with self._current():
            self._plan: Plan | None = Plan(path)
            self.row = _row(self._plan, record)
            self.contexts = [self._new_context(self._plan) for _ in range(buffers)]

    def _new_context(self, plan: Plan) -> PinnedContext:
        record = self._record
        return PinnedContext(
            plan.context(), record.profile.max, self.row, INPUTS[record.layout], record.feature_dim
        )

    def check(self, batch: NDArray[Any]) -> None:
        """Raises EngineError when the plan cannot take a batch."""
        most, dtype = self._record.profile.max, INPUTS[self._record.layout]
        if batch.shape[1:] != self.row or batch.dtype != dtype or not 1 <= len(batch) <= most:
            raise EngineError(
                f"the engine takes 1 to {most} tiles of shape {self.row} and type {dtype}, "
                f"not {batch.shape} {batch.dtype}"
            )

    def start(self, pinned: PinnedContext, batch: NDArray[Any]) -> None:
        """Copy a batch in and queue it; the context must be idle."""
        count, size = len(batch), max(len(batch), self._record.profile.min)
        pinned.pixels[:count] = batch
        with self._current():
            cuda.memcpy_htod_async(pinned.source, pinned.pixels[:size], pinned.stream)
            pinned.context.enqueue(size, int(pinned.source), int(pinned.target), pinned.stream.handle)
            cuda.memcpy_dtoh_async(pinned.features[:count], pinned.target, pinned.stream)
            pinned.done.record(pinned.stream)

    def finish(self, pinned: PinnedContext, count: int) -> NDArray[np.float32]:
        """Wait for the batch of a context; its features (count, D)."""
        with self._current():
            pinned.done.synchronize()
        return pinned.features[:count].copy()

    def wait(self, pinned: PinnedContext) -> None:
        """Until all that is queued on a context has run."""
        with self._current():
            pinned.stream.synchronize()

    def close(self) -> None:
        """Release all of it; the plan's own memory, too."""
        with self._current():
            while self.contexts:
                self.contexts.pop().free()
            self._plan = None

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The primary context is the thread's during the block; CUDA's errors become ours."""
        try:
            self._context.push()
            try:
                yield
            finally:
                cuda.Context.pop()
        except cuda.Error as error:
            raise EngineError(f"{self._path}: CUDA failed: {error}") from error


@functools.cache
def _primary_context(number: int) -> cuda.Context:
    """The primary context of a device, until Python ends: pycuda leaves a context that it gives back on
    CUDA's stack, where nothing can pop it any more."""
    try:
        cuda.init()
        count: int = cuda.Device.count()
        if not 0 <= number < count:
            raise EngineError(f"device={number}: this machine has {count} CUDA devices")
        context = cuda.Device(number).retain_primary_context()
    except cuda.Error as error:
        raise EngineError(f"there is no usable NVIDIA GPU: {error}") from error
    atexit.register(context.detach)  # its own destructor would release it as if it were no primary one
    return context


def _row(plan: Plan, record: EngineRecord) -> tuple[int, ...]:
    """Shape of one tile, once the plan is what the record says."""
    dtype = INPUTS.get(record.layout)
    expected = (str(dtype), "float32", (record.feature_dim,))
    found = (plan.input.dtype, plan.output.dtype, plan.output.shape)
    if found != expected:
        raise EngineError(
            f"{plan.path} takes and gives {found}; its engine.json says {record.layout}, {expected}"
        )
    return plan.input.shape
