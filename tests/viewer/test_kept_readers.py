"""Slides stay open while they are used, and not all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slide2vec.errors import SlideOpenError
from slide2vec.viewer.kept_readers import KeptReaders


class _Reader:
    def __init__(self, number: int) -> None:
        self.number, self.closed = number, 0

    def close(self) -> None:
        self.closed += 1


def test_the_longest_unused_is_closed_and_none_in_use() -> None:
    opened: list[Any] = []

    def open_one(number: int) -> Any:
        opened.append(_Reader(number))
        return opened[-1]

    kept = KeptReaders(open_one, most=2)
    with kept.reader(0) as first:
        for number in (1, 2, 3, 1):
            with kept.reader(number):
                assert not first.closed  # type: ignore[attr-defined]
    assert [each.number for each in opened] == [0, 1, 2, 3, 1]
    assert [each.closed for each in opened] == [0, 1, 1, 1, 0]
    kept.close()
    assert [each.closed for each in opened] == [1] * 5


def test_many_at_once_open_a_slide_once() -> None:
    opened: list[Any] = []

    def open_one(number: int) -> Any:
        opened.append(_Reader(number))
        return opened[-1]

    kept = KeptReaders(open_one)

    def use(_: int) -> int:
        with kept.reader(7) as reader:
            assert not reader.closed  # type: ignore[attr-defined]
            return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(use, range(100))) == 100
    assert len(opened) == 1


def test_what_cannot_be_opened_is_tried_again() -> None:
    tries: list[int] = []

    def open_one(number: int) -> Any:
        tries.append(number)
        if len(tries) == 1:
            raise SlideOpenError("no slide")
        return _Reader(number)

    kept = KeptReaders(open_one)
    with pytest.raises(SlideOpenError), kept.reader(0):
        pass
    with kept.reader(0):
        pass
    kept.close()
    assert tries == [0, 0]
