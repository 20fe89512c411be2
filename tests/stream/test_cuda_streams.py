"""A CUDA device stream over stand-ins for PyTorch's streams and events: what is called, and in which
order."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slide2vec.stream import cuda_streams
from slide2vec.stream.cuda_streams import CudaStream, HostStream, device_stream


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        assert enable_timing and blocking  # busy times, and a host that sleeps
        self.waited = False

    def record(self, stream: Stream) -> None:
        stream.calls.append("record")

    def synchronize(self) -> None:
        self.waited = True


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.calls: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.calls.append(("wait for", other))

    def wait_event(self, event: Event) -> None:
        self.calls.append(event)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that are current, the innermost last."""
    streams: list[Any] = ["default"]

    @contextlib.contextmanager
    def stream(inner: Any) -> Iterator[None]:
        streams.append(inner)
        yield
        streams.pop()

    monkeypatch.setattr(cuda_streams, "_IDLE", defaultdict(deque))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    return streams


def test_a_cuda_lane(current: list[Any]) -> None:
    tested: Any = device_stream(torch.device("cuda", 0))
    assert isinstance(tested, CudaStream)
    stream = tested._stream
    assert stream.calls == [("wait for", "default")]  # weights that are on their way
    with tested.current():
        assert current[-1] is stream
        with tested.current():
            pass
        assert current[-1] is stream
    assert current == ["default"]
    event = tested.record()
    tested.wait([event])
    assert stream.calls[1:] == ["record", event] and not event.waited  # the device waits, not the host
    tested.wait([HostStream(torch.device("cpu")).record()])
    assert stream.calls[1:] == ["record", event]


@pytest.mark.usefixtures("current")
def test_streams_are_used_again_in_their_order() -> None:
    """PyTorch keeps memory for each; those of a call are those of the one before."""
    first: list[Any] = [CudaStream(torch.device("cuda", 0)) for _ in range(3)]
    theirs = [each._stream for each in first]
    assert len(set(theirs)) == 3
    del first[0], first[0], first[0]
    for stream in theirs:
        stream.calls.clear()
    other: Any = CudaStream(torch.device("cuda", 1))
    again: list[Any] = [CudaStream(torch.device("cuda", 0)) for _ in range(4)]
    assert [each._stream for each in again[:3]] == theirs
    assert again[3]._stream not in theirs and other._stream not in theirs
    assert all(stream.calls == [("wait for", "default")] for stream in theirs)


def test_features_are_copied_into_the_ring_on_the_lane(
    current: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: Any = CudaStream(torch.device("cuda", 0))
    copies: list[Any] = []

    class Memory(torch.Tensor):
        def copy_(self, values: Any, non_blocking: bool = False) -> Any:
            copies.append((current[-1], non_blocking))
            return super().copy_(values)

    memory = torch.zeros(8, 3).as_subclass(Memory)
    found = tested.to_host(torch.ones(5, 3), memory)
    assert found.shape == (5, 3) and memory[:5].sum() == 15 and memory[5:].sum() == 0
    assert copies == [(tested._stream, True)]
