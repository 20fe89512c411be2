"""Work in threads, in the order of its items, so far ahead of whoever takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

__all__ = ["WRITERS", "ahead", "stopping"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")
#: Threads that write: each waits for the disk twice per image.
WRITERS = 8


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterable[_In], room: int
) -> Iterator[tuple[_In, Future[_Out]]]:
    """Items in their order, each with the future of its result; at most `room` are under way or waiting."""
    items = iter(items)
    waiting = deque((item, pool.submit(function, item)) for item in islice(items, room))
    try:
        while waiting:
            item, future = waiting.popleft()
            future.exception()  # waits
            yield item, future
            waiting.extend((item, pool.submit(function, item)) for item in islice(items, 1))
    finally:
        for _, future in waiting:
            future.cancel()


@contextmanager
def stopping(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A pool that leaves what it has not begun, where the block ends early."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
