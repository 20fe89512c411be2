"""Slots: packed in order across owners, filled in any order, bounded, never stuck."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from slide2vec.stream.batches import Batch, Batches, Stopped


def make(size: int, ahead: int = 100) -> tuple[Batches[str], list[Batch[str]]]:
    ready: list[Batch[str]] = []
    return Batches(size, 8, ahead=ahead, ready=ready.append), ready


def test_packs_across_owners_and_fills_in_any_order() -> None:
    batches, ready = make(4)
    first = batches.reserve("a", np.arange(3))
    second = batches.reserve("b", np.arange(6))
    assert [(p.start, p.tiles.tolist()) for p in first] == [(0, [0, 1, 2])]
    assert [(p.start, p.tiles.tolist()) for p in second] == [(3, [0]), (0, [1, 2, 3, 4]), (0, [5])]
    for piece in reversed(second):
        batches.fill(piece)
    assert [[p.owner for p in b.pieces] for b in ready] == [["b"]]
    batches.fill(first[0])
    assert [[p.owner for p in b.pieces] for b in ready] == [["b"], ["a", "b"]]
    batches.finish()
    assert ready[-1].reserved == 1


def test_finish_waits_for_what_is_not_filled() -> None:
    batches, ready = make(4)
    (piece,) = batches.reserve("a", np.arange(2))
    batches.finish()
    assert not ready
    batches.fill(piece)
    assert [b.reserved for b in ready] == [2]


def test_targets_are_views_of_the_batch() -> None:
    batches, ready = make(2)
    (piece,) = batches.reserve("a", np.arange(2))
    for value, target in enumerate(piece.targets(), start=1):
        target[:] = value
    batches.fill(piece)
    assert ready[0].pixels[:, 0, 0, 0].tolist() == [1, 2]


def test_reserve_blocks_until_a_batch_is_released_and_reuses_its_memory() -> None:
    batches, ready = make(2, ahead=1)
    (piece,) = batches.reserve("a", np.arange(2))
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.extend(batches.reserve("b", np.arange(2))))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not got
    batches.fill(piece)
    memory = ready[0].pixels
    batches.release(ready[0])
    thread.join(5)
    assert not thread.is_alive()
    assert got[0].batch.pixels is memory  # type: ignore[attr-defined]


def test_more_tiles_than_may_be_ahead_do_not_block() -> None:
    """A supertile of many small tiles spans more batches than the limit; it must get them."""
    batches, ready = make(2, ahead=1)
    pieces = batches.reserve("a", np.arange(9))
    assert len(pieces) == 5
    for piece in pieces:
        batches.fill(piece)
    assert len(ready) == 4


def test_stop_turns_waiting_threads_away() -> None:
    batches, _ = make(1, ahead=1)
    batches.reserve("a", np.arange(1))
    caught = threading.Event()

    def wait() -> None:
        try:
            batches.reserve("b", np.arange(1))
        except Stopped:
            caught.set()

    thread = threading.Thread(target=wait)
    thread.start()
    batches.stop()
    thread.join(5)
    assert caught.is_set()
    with pytest.raises(Stopped):
        batches.reserve("c", np.arange(1))
