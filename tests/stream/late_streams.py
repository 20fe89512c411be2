"""Lanes of a stand-in device that works late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from slide2vec.stream.cuda_streams import Event, HostStream


class LateEvent:
    """Done only when it, or one made after it, is waited for or looked at for the third time."""

    made, done = 0, 0

    def __init__(self, work: list[Any]) -> None:
        LateEvent.made += 1
        self._work, self._looks, self._number = work, 0, LateEvent.made

    @property
    def is_done(self) -> bool:
        return self._number <= LateEvent.done

    def query(self) -> bool:
        self._looks += 1
        if self._looks > 2:
            self.synchronize()
        return self.is_done

    def synchronize(self) -> None:
        LateEvent.done = max(LateEvent.done, self._number)
        while self._work:
            self._work.pop(0)()

    def elapsed_time(self, end_event: Any, /) -> float:
        assert self.is_done and end_event.is_done
        return 1000.0


class LateStream(HostStream):
    """Copies to the host when an event after them is done, as an asynchronous device may."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._work: list[Any] = []

    def record(self) -> Event:
        return LateEvent(self._work)

    def wait(self, events: Iterable[Event]) -> None:
        for event in events:
            event.synchronize()

    def to_host(self, values: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(values, float("nan"))
        self._work.append(lambda: out.copy_(values))
        return out
