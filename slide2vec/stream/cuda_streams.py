"""Device streams (CUDA's, where the device is a GPU): work in order, beside other streams, with events
between."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DeviceStream", "Event", "HostStream", "device_stream"]


class Event(Protocol):
    """A point in a device stream's work."""

    def query(self) -> bool:
        """Whether the work before it is done; does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait, on the host, until it is."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this point to a later one; both are done."""
        ...


class DeviceStream(Protocol):
    """Work that a device does in order. Safe to use from several threads.

    Attributes:
        device: that works.
    """

    device: torch.device

    def current(self) -> contextlib.AbstractContextManager[None]:
        """What this thread enqueues in the block goes to this device stream."""
        ...

    def record(self) -> Event:
        """The point after all that was enqueued so far."""
        ...

    def wait(self, events: Iterable[Event]) -> None:
        """What is enqueued from now on begins after the events; the host does not wait."""
        ...

    def to_host(self, values: Tensor, memory: Tensor) -> Tensor:
        """Enqueue copying `values` into `memory` of the host; returns what will hold them."""
        ...


class _Done:
    """The event of work that was over when it returned."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end_event: _Done, /) -> float:
        return 1e3 * (end_event._at - self._at)


class HostStream:
    """A device stream of a device whose calls return when their work is done. See `DeviceStream`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to make current."""
        return contextlib.nullcontext()

    def record(self) -> Event:
        """Everything is done."""
        return _Done()

    def wait(self, events: Iterable[Event]) -> None:
        """For events of other device streams that are not over, if there are any."""
        for event in events:
            event.synchronize()

    def to_host(self, values: Tensor, memory: Tensor) -> Tensor:
        """The values themselves where they are on the host already."""
        return values.cpu()


#: Streams to be used again: PyTorch keeps memory for each that it has allocated on, and has only 32.
_IDLE: defaultdict[torch.device, deque[Any]] = defaultdict(deque)


class CudaStream:
    """A CUDA stream. See `DeviceStream`."""

    def __init__(self, device: torch.device) -> None:
        self.device, idle = device, _IDLE[device]
        try:
            self._stream = idle.popleft()
        except IndexError:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        weakref.finalize(self, idle.append, self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # weights may be on their way

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Of the calling thread."""
        with torch.cuda.stream(self._stream):  # that context keeps state: one for each use
            yield

    def record(self) -> Event:
        """An event on which the host sleeps rather than spins."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, events: Iterable[Event]) -> None:
        """On the device."""
        for event in events:
            if isinstance(event, torch.cuda.Event):
                self._stream.wait_event(event)
            else:
                event.synchronize()

    def to_host(self, values: Tensor, memory: Tensor) -> Tensor:
        """Into page-locked memory."""
        with self.current():
            return memory[: len(values)].copy_(values, non_blocking=True)


def device_stream(device: torch.device) -> DeviceStream:
    """A new device stream of a device."""
    return CudaStream(device) if device.type == "cuda" else HostStream(device)
