"""CUDA graphs of PyTorch on a machine without CUDA: operations on the CPU are recorded while a graph is
captured, and done again, into the same memory, when it is replayed. `install` puts them in place of
torch.cuda's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What the host would wait for: CUDA refuses it while a stream is captured.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero"}


class Event:
    def synchronize(self) -> None:
        Stream.journal.append(("synchronize",))


class Stream:
    journal: list[tuple[Any, ...]]

    def __init__(self, device: Any = None) -> None:
        self.name = f"stream {device}"

    def record_event(self) -> Event:
        self.journal.append(("record", self.name))
        return Event()

    def wait_event(self, event: Event) -> None:
        self.journal.append(("wait", event))

    def wait_stream(self, other: Stream) -> None:
        self.journal.append(("wait", other.name))


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.graph.work.append((func, args, kwargs or {}, made))
        return made


class Graph:
    def __init__(self) -> None:
        self.work: list[tuple[Any, Any, Any, Any]] = []
        self.memory = object()

    def pool(self) -> object:
        return self.memory

    def replay(self) -> None:
        Stream.journal.append(("replay", id(self)))
        for func, args, kwargs, made in self.work:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def install(patch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The journal: devices made current, captures, replays, events and waits, in their order."""
    journal = Stream.journal = []
    current = [Stream("of the caller")]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before = list(current)
        current.append(chosen)
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def graph(captured: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # readers allocate memory meanwhile
        captured.memory = pool or captured.memory
        journal.append(("capture", stream.name, pool))
        current.append(stream)
        with Recorder(captured):
            yield
        current.pop()  # PyTorch 2.11 does not, where a capture fails

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        journal.append(("device", str(chosen)))
        yield

    for name, fake in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
        "device": device,
        "current_stream": lambda device=None: current[-1],
    }.items():
        patch.setattr(torch.cuda, name, fake)
    return journal
