"""The part of pycuda.driver that we use, on a machine without CUDA.

Streams are asynchronous: what is queued on one is done when something waits for it, so that a buffer which
is reused too early shows. Signatures are those of src/wrapper/wrap_cudadrv.cpp of pycuda 2026.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fake_tensorrt
import numpy as np

JOURNAL: list[tuple[Any, ...]] = []
QUEUES: dict[int, list[Callable[[], None]]] = {}
DEVICES = [2]
PUSHED: list[Context] = []
ALLOCATED: list[DeviceAllocation] = []


class Error(Exception):
    pass


class LogicError(Error):
    pass


def reset() -> None:
    for kept in (JOURNAL, QUEUES, PUSHED, ALLOCATED):
        kept.clear()
    DEVICES[:] = [2]
    fake_tensorrt.STATE.submit = _submit


def _submit(handle: int, work: Callable[[], None]) -> None:
    assert PUSHED, "no CUDA context is current"
    QUEUES[handle].append(work)


def _drain(handle: int) -> None:
    assert PUSHED, "no CUDA context is current"
    while QUEUES[handle]:
        QUEUES[handle].pop(0)()


def init(flags: int = 0) -> None:
    if not DEVICES:
        raise LogicError("cuInit failed: no CUDA-capable device is detected")


class Context:
    def push(self) -> None:
        PUSHED.append(self)

    @staticmethod
    def pop() -> None:
        PUSHED.pop()

    def detach(self) -> None:
        """At the end of Python."""


class Device:
    def __init__(self, number: int) -> None:
        self._number = number

    @staticmethod
    def count() -> int:
        return DEVICES[0]

    def retain_primary_context(self) -> Context:
        return Context()


class Stream:
    def __init__(self, flags: int = 0) -> None:
        self.handle = len(QUEUES) + 1
        QUEUES[self.handle] = []

    def synchronize(self) -> None:
        JOURNAL.append(("synchronize", self.handle))
        _drain(self.handle)


class Event:
    def __init__(self, flags: int = 0) -> None:
        self._at: int | None = None

    def record(self, stream: Stream | None = None) -> Event:
        assert stream is not None, "recorded on the default stream"
        self._at = stream.handle
        return self

    def synchronize(self) -> Event:
        assert self._at is not None
        JOURNAL.append(("wait", self._at))
        _drain(self._at)
        return self


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self._memory = np.full(size, 255, np.uint8)
        ALLOCATED.append(self)

    def __int__(self) -> int:
        return self._memory.ctypes.data

    def free(self) -> None:
        ALLOCATED.remove(self)


def mem_alloc(bytes: int) -> DeviceAllocation:
    assert PUSHED, "no CUDA context is current"
    return DeviceAllocation(bytes)


def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray[Any, Any]:
    assert PUSHED, "no CUDA context is current"
    return np.full(shape, 77, dtype, order="C")


def memcpy_htod_async(
    dest: DeviceAllocation, src: np.ndarray[Any, Any], stream: Stream | None = None
) -> None:
    assert stream is not None and src.flags.c_contiguous
    JOURNAL.append(("in", stream.handle))

    def copy() -> None:
        dest._memory[: src.nbytes] = src.reshape(-1).view(np.uint8)

    _submit(stream.handle, copy)


def memcpy_dtoh_async(
    dest: np.ndarray[Any, Any], src: DeviceAllocation, stream: Stream | None = None
) -> None:
    assert stream is not None and dest.flags.c_contiguous

    def copy() -> None:
        dest.reshape(-1).view(np.uint8)[:] = src._memory[: dest.nbytes]

    _submit(stream.handle, copy)
