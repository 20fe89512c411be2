"""CUDA streams, events and graphs of PyTorch on a machine without CUDA: what is queued is done at once and
noted down. `install` puts them in place of torch.cuda's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fake_tensorrt
import pytest
import torch


class Stream:
    journal: list[tuple[Any, ...]]
    handles = itertools.count(1)

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda_stream = next(Stream.handles)

    def record_event(self) -> tuple[str, int, int]:
        event = ("event", self.cuda_stream, len(self.journal))
        self.journal.append(("record", self.cuda_stream, event))
        return event

    def wait_event(self, event: tuple[str, int, int]) -> None:
        self.journal.append(("wait", self.cuda_stream, event))

    def synchronize(self) -> None:
        self.journal.append(("synchronize", self.cuda_stream))


class Graph:
    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        Stream.journal.append(("replay",))
        for work in self.work:
            work()


def install(patch: pytest.MonkeyPatch, *, capture_fails: bool = False) -> list[tuple[Any, ...]]:
    """The journal: records, waits, executions and replays in the order in which they were queued."""
    Stream.journal = fake_tensorrt.STATE.calls
    current = [Stream()]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    @contextmanager
    def graph(captured: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        if capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert capture_error_mode == "thread_local"
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(fake_tensorrt.STATE, "submit", lambda handle, work: captured.work.append(work))
            yield

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
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
    return Stream.journal
