"""Where batches run, in PyTorch: TensorRT's execution contexts, each with a CUDA stream and buffers of its
own.

A context for one batch size holds a CUDA graph of it. A graph bakes in what its context keeps for the shape,
so the context of a graph never sees another shape.
"""

from __future__ import annotations

import itertools
import logging
import threading

import torch
from torch import Tensor

from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt.plans import Context, Plan, Port

__all__ = ["ContextPool", "ExecutionContext"]

logger = logging.getLogger(__name__)


class ExecutionContext:
    """One batch at a time, on a stream that is not the default one.

    Args:
        plan: it loads a context of its own from it.
        size: tiles in its buffers.
        device: a CUDA device.
    """

    def __init__(self, plan: Plan, size: int, device: torch.device) -> None:
        self._context: Context = plan.context()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):  # whose memory they are: it outlives what is queued
            # Zeros: rows that a small batch leaves unused are computed, too.
            self._input = _zeros(size, plan.input, device)
            self._output = _zeros(size, plan.output, device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, pixels: Tensor, features: Tensor, size: int) -> None:
        """Queue (b, ...) pixels -> (b, D) features at a batch of `size`, b or more, after what the
        caller's stream has queued and before what it will queue. The host does not wait."""
        caller = torch.cuda.current_stream(pixels.device)
        self._stream.wait_event(caller.record_event())
        with torch.cuda.stream(self._stream):
            self._input[: len(pixels)].copy_(pixels)
            self._compute(size)
            features.copy_(self._output[: len(pixels)])
        caller.wait_event(self._stream.record_event())

    def capture(self, size: int) -> None:
        """Record a batch of `size` as a CUDA graph; from now on this context runs no other.

        Raises:
            RuntimeError: the network does something that cannot be captured.
        """
        with torch.cuda.stream(self._stream):
            self._enqueue(size)  # what TensorRT does only at the first run of a shape cannot be captured
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (readers, decoders) may allocate memory meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue(size)
        self._graph = graph

    def _compute(self, size: int) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._enqueue(size)

    def _enqueue(self, size: int) -> None:
        self._context.enqueue(size, self._input.data_ptr(), self._output.data_ptr(), self._stream.cuda_stream)

    def wait(self) -> None:
        """Until all that is queued has run."""
        self._stream.synchronize()


def _zeros(size: int, port: Port, device: torch.device) -> Tensor:
    return torch.zeros((size, *port.shape), dtype=getattr(torch, port.dtype), device=device)


class ContextPool:
    """The contexts of an engine, each used in turn; safe to use from several threads.

    Args:
        plan: what they run.
        profile: batch sizes that the plan was built for.
        device: a CUDA device.
        count: contexts per kind: one can be filled while another computes.
        graphs: whether batches of the profile's opt and max have contexts with CUDA graphs; all other
            sizes share one context then.
    """

    def __init__(
        self, plan: Plan, profile: BatchProfile, device: torch.device, *, count: int, graphs: bool
    ) -> None:
        self._plan, self._profile, self._lock = plan, profile, threading.Lock()
        fixed = {size: _captured(plan, size, device, count) for size in {profile.opt, profile.max} if graphs}
        spare = [
            ExecutionContext(plan, profile.max, device) for _ in range(1 if any(fixed.values()) else count)
        ]
        self._all = [*spare, *itertools.chain.from_iterable(fixed.values())]
        self._any = itertools.cycle(spare)
        self._fixed = {size: itertools.cycle(contexts) for size, contexts in fixed.items() if contexts}

    def run(self, pixels: Tensor, features: Tensor) -> None:
        """Queue at most `profile.max` tiles; see `Plan.batch` for how few are padded."""
        size = self._plan.batch(len(pixels), self._profile)
        with self._lock:  # a context is for one thread at a time; queueing takes microseconds
            next(self._fixed.get(size, self._any)).run(pixels, features, size)

    def wait(self) -> None:
        """Until all that is queued has run."""
        with self._lock:
            for context in self._all:
                context.wait()


def _captured(plan: Plan, size: int, device: torch.device, count: int) -> list[ExecutionContext]:
    """Contexts with a CUDA graph for batches of `size`; none when it cannot be captured."""
    contexts = [ExecutionContext(plan, size, device) for _ in range(count)]
    try:
        for context in contexts:
            context.capture(size)
    except RuntimeError as error:
        logger.warning("%s runs without CUDA graphs at a batch of %d: %s", plan.path, size, error)
        return []
    return contexts
