"""Batch size from free memory."""

from __future__ import annotations

import pytest

from slide2vec.compile.batch_size import SHARE, fitting


@pytest.mark.parametrize(
    ("wanted", "free", "per_tile", "expected"),
    [
        (64, 10_000, 1, 64),
        (64, 64 / SHARE + 1, 1, 64),
        (64, 64 / SHARE - 1, 1, 32),
        (64, 1000, 100, 4),
        (64, 1, 100, 1),  # the stream says so when it fails
        (1, 0, 100, 1),
    ],
)
def test_as_many_as_fit(wanted: int, free: float, per_tile: float, expected: int) -> None:
    assert fitting(wanted, int(free), per_tile) == expected
