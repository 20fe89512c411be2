"""Slots: packed in order across owners, filled in any order, bounded, never stuck."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.stream.batches import Batch, Batches, Stopped
from slide2vec.stream.transfer import HostTransfer


def batches_of(size: int, **options: Any) -> Batches[str]:
    given = {"abandoned": lambda: False, "allocate": HostTransfer().allocate, **options}
    return Batches(size, 8, **given)


def make(size: int, ahead: int = 100) -> tuple[Batches[str], list[Batch[str]]]:
    ready: list[Batch[str]] = []
    return batches_of(size, ahead=ahead, ready=ready.append), ready


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
    assert len(set(ready)) == 3, "batches are told apart by what they are, not by what they hold"


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


def test_targets_begin_where_the_batch_is_free() -> None:
    """Slots 3 to 5, which a bit-wise mistake takes for 3 alone."""
    batches, ready = make(6)
    for owner, count in (("a", 3), ("b", 3)):
        (piece,) = batches.reserve(owner, np.arange(count))
        target = piece.targets()
        assert isinstance(target, np.ndarray) and target.shape == (3, 8, 8, 3)
        target[:] = ord(owner)
        batches.fill(piece)
    assert ready[0].pixels[:, 7, 7, 2].tolist() == [97] * 3 + [98] * 3


def test_memory_of_a_device_is_given_as_a_tensor() -> None:
    shapes: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> torch.Tensor:
        shapes.append(shape)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    batches = batches_of(4, ahead=1, ready=lambda batch: None, allocate=allocate)
    (piece,) = batches.reserve("a", np.arange(3))
    target = piece.targets()
    assert shapes == [(4, 8, 8, 3)]
    assert isinstance(target, torch.Tensor) and target.shape == (3, 8, 8, 3)


def test_events_are_kept_with_the_pixels_that_they_are_of() -> None:
    batches, ready = make(2)
    written, read = object(), object()
    first, second = (*batches.reserve("a", np.arange(1)), *batches.reserve("a", np.arange(1)))
    batches.fill(first)
    batches.fill(second, written)  # type: ignore[arg-type]
    assert ready[0].written == [written] and ready[0].free == ()
    pixels = ready[0].pixels
    batches.release(ready[0], read)  # type: ignore[arg-type]
    (piece,) = batches.reserve("b", np.arange(1))
    assert piece.batch.free == (read,) and piece.batch.pixels is pixels and not piece.batch.written


def test_memory_is_used_again_after_the_last_taker() -> None:
    batches, ready = make(2)
    (piece,) = batches.reserve("a", np.arange(2))
    batches.fill(piece)
    ready[0].takers, pixels = 3, ready[0].pixels
    for read in (None, event := object()):
        batches.release(ready[0], read)  # type: ignore[arg-type]
        assert not batches._free and batches._unreleased == 1
    batches.release(ready[0])
    (piece,) = batches.reserve("b", np.arange(2))
    assert piece.batch.pixels is pixels and piece.batch.free == (event,)


def test_a_stream_that_nobody_takes_from_turns_its_threads_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.stream.batches.LOOK_UP_S", 0.001)
    looks = iter([False, True])
    batches = batches_of(1, ahead=1, ready=lambda batch: None, abandoned=lambda: next(looks))
    batches.reserve("a", np.arange(1))
    with pytest.raises(Stopped):
        batches.reserve("b", np.arange(1))
    assert list(looks) == []


def test_finish_without_any_tile_or_after_full_batches_gives_nothing_more() -> None:
    batches, ready = make(2)
    batches.finish()
    for piece in batches.reserve("a", np.arange(2)):
        batches.fill(piece)
    batches.finish()
    assert [batch.reserved for batch in ready] == [2]


def test_reserve_blocks_until_a_batch_is_released_and_reuses_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slide2vec.stream.batches.LOOK_UP_S", 0.001)  # often, and still nobody gives up
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


def test_more_tiles_than_may_be_ahead_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supertile of many small tiles spans more batches than the limit; it must get them."""
    ready: list[Batch[str]] = []
    batches = batches_of(2, ahead=1, ready=ready.append, abandoned=lambda: True)
    pieces = batches.reserve("a", np.arange(9))
    assert len(pieces) == 5
    for piece in pieces:
        batches.fill(piece)
    assert len(ready) == 4
    monkeypatch.setattr("slide2vec.stream.batches.LOOK_UP_S", 0.001)
    for batch in ready:  # four are ahead: whoever comes now waits (here for nobody) till there is none
        with pytest.raises(Stopped):
            batches.reserve("b", np.arange(1))
        batches.release(batch)
    assert batches.reserve("b", np.arange(1))


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
