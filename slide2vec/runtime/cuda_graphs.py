"""Batches of one size as CUDA graphs: one launch instead of hundreds, each of which needs Python's lock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CudaGraphs"]

logger = logging.getLogger(__name__)

#: PyTorch allows one capture at a time in a process.
_CAPTURING = threading.Lock()
#: Captures that may fail: what waits for the device in another thread, as it starts a decoder, spoils one.
MOST_FAILED = 3


class _Captured(NamedTuple):
    """A graph, the memory that it reads, and the memory that it writes."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    features: Tensor


class CudaGraphs:
    """A function of a batch, replayed as a CUDA graph. Safe to use from several threads.

    A size is captured when it comes a second time in a row, which that of a run does; smaller batches, such
    as the last one, are padded to it. All graphs share their memory: replays are queued one after another.

    Args:
        function: (B, …) on the device -> (B, D) on the device; each row depends on its own row only.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        with torch.cuda.device(device):
            self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: dict[torch.Size, _Captured] = {}
        self._lock = threading.Lock()
        self._last: torch.Size | None = None
        self._done: Any | None = None
        self._failed = 0

    def __call__(self, batch: Tensor) -> Tensor:
        """Queue a batch on the caller's stream; the host does not wait. What it gives is the caller's."""
        with torch.cuda.device(self._device):
            with self._lock:
                found = self._for(batch)
                if found is not None:
                    return self._replay(found, batch)
            return self._function(batch)

    def close(self) -> None:
        """Release the memory. What comes later runs without graphs, until a size is captured again."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._captured, self._last, self._done = {}, None, None

    def _for(self, batch: Tensor) -> _Captured | None:
        """The graph that takes a batch: of its size, else of the next larger one."""
        again, self._last = self._last == batch.shape, batch.shape
        if again and batch.shape not in self._captured and self._failed < MOST_FAILED:
            self._capture(batch)
        fitting = [size for size in self._captured if size[0] >= len(batch) and size[1:] == batch.shape[1:]]
        return self._captured[min(fitting)] if fitting else None

    def _replay(self, found: _Captured, batch: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(self._device)
        if self._done is not None:  # of the last batch, which may be another stream's
            stream.wait_event(self._done)
        found.given[: len(batch)].copy_(batch)
        found.graph.replay()
        features = found.features[: len(batch)].clone()
        self._done = stream.record_event()
        return features

    def _capture(self, batch: Tensor) -> None:
        """Keep a graph for the batch's size; where that has failed too often, say so, and run without."""
        # PyTorch (2.11) leaves a capture that fails with the graph's stream current.
        with _CAPTURING, torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                self._captured[batch.shape] = self._graph_of(batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, too
                self._failed += 1
                level = logging.INFO if self._failed < MOST_FAILED else logging.WARNING
                reason = str(error).strip().partition("\n")[0]
                logger.log(level, "no CUDA graph of %d tiles on %s: %s", len(batch), self._device, reason)

    def _graph_of(self, batch: Tensor) -> _Captured:
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):
                given = batch.contiguous().clone()
                self._function(given)  # what libraries set up at their first call cannot be captured
        finally:
            callers.wait_stream(self._stream)  # which reads the caller's batch
        graph = torch.cuda.CUDAGraph()
        pool = next((each.graph.pool() for each in self._captured.values()), None)
        # Other threads (readers, decoders) may allocate memory meanwhile. Entering waits for the device.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            features = self._function(given)
        return _Captured(graph, given, features)
