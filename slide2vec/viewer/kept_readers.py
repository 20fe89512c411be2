"""Readers of the slides that were looked at last; not of all, for each takes files and memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from slide2vec.readers import SlideReader

__all__ = ["KeptReaders"]


@dataclass
class _Place:
    """Of one slide: its reader once it is opened, and how many use it now."""

    reader: SlideReader | None = None
    users: int = 0
    opening: threading.Lock = field(default_factory=threading.Lock)


class KeptReaders:
    """Opens slides by their number, and closes those that were not asked for lately.

    Args:
        open_one: opens a slide; its errors are raised by `reader`, at each try.
        most: slides that stay open, besides those that are in use.
    """

    def __init__(self, open_one: Callable[[int], SlideReader], most: int = 8) -> None:
        self._open_one, self._most = open_one, most
        self._places: OrderedDict[int, _Place] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def reader(self, number: int) -> Iterator[SlideReader]:
        """The slide's reader, which stays open within the block; from any thread."""
        with self._lock:
            place = self._places.setdefault(number, _Place())
            self._places.move_to_end(number)
            place.users += 1
        try:
            with place.opening:
                if place.reader is None:
                    place.reader = self._open_one(number)
                reader = place.reader
            yield reader
        finally:
            with self._lock:
                place.users -= 1
                closed = self._left_over(self._most)
            _close(closed)

    def close(self) -> None:
        """Close what is not in use."""
        with self._lock:
            closed = self._left_over(0)
        _close(closed)

    def _left_over(self, most: int) -> list[_Place]:
        """Those that are too many, the longest unused first, taken out."""
        idle = [number for number, place in self._places.items() if not place.users]
        return [self._places.pop(number) for number in idle[: max(0, len(self._places) - most)]]


def _close(places: list[_Place]) -> None:
    for place in places:
        if place.reader is not None:
            place.reader.close()
