"""One process at a time, or several that share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slide2vec.files import open_locked
from slide2vec.files.locks import try_lock, wait_for_lock


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Each opening of a file has its own lock, as if by another process."""
    descriptor = open_locked(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_who_may_hold_a_lock_together(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with opened(path) as first, opened(path) as second, opened(path) as third:
        assert try_lock(first, shared=True) and try_lock(second, shared=True)
        assert not try_lock(third)
    with opened(path) as first, opened(path) as second:
        assert try_lock(first)
        assert not try_lock(second) and not try_lock(second, shared=True)


def test_waiting_ends_when_the_file_is_closed(tmp_path: Path) -> None:
    first, entered = open_locked(tmp_path / "lock"), threading.Event()
    assert try_lock(first)

    def wait() -> None:
        with opened(tmp_path / "lock") as second:
            wait_for_lock(second)
            entered.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not entered.wait(0.1)
    os.close(first)
    waiting.join(30)
    assert entered.is_set()


def test_what_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "lock") as descriptor:
        pass
    with pytest.raises(OSError):
        try_lock(descriptor)
