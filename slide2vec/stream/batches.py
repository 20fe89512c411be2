"""Batches of fixed size, filled by readers in any order, packed across slides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.stream.cuda_streams import Event

__all__ = ["Batch", "BatchSlice", "Batches", "Stopped"]

Owner = TypeVar("Owner")

#: Seconds after which a thread that waits for room checks whether the stream is still consumed.
LOOK_UP_S = 0.5


class Stopped(Exception):
    """The stream is being closed; threads leave."""


@dataclass
class BatchSlice(Generic[Owner]):
    """Consecutive slots of one batch, for tiles of one slide.

    Attributes:
        tiles: (n,) int64 indices of the tiles in their slide.
    """

    batch: Batch[Owner]
    start: int
    owner: Owner
    tiles: NDArray[np.int64]

    @property
    def slots(self) -> slice:
        """Where in the batch."""
        return slice(self.start, self.start + len(self.tiles))

    def targets(self) -> NDArray[np.uint8] | torch.Tensor:
        """(n, S, S, 3) uint8 view of the batch to write the tiles into: an array, on a device a tensor."""
        pixels = self.batch.pixels
        return pixels.numpy()[self.slots] if pixels.device.type == "cpu" else pixels[self.slots]


@dataclass(eq=False)
class Batch(Generic[Owner]):
    """Slots for tiles: `pixels` (B, S, S, 3) uint8, of which `reserved` are spoken for.

    Attributes:
        free: after which they may be written: whoever read them before has done so.
        written: after which they are, as far as they are `filled`.
        takers: that have yet to release it.
        read: after which those that have released it have read it.
    """

    pixels: torch.Tensor
    free: tuple[Event, ...] = ()
    written: list[Event] = field(default_factory=list)
    pieces: list[BatchSlice[Owner]] = field(default_factory=list)
    reserved: int = 0
    filled: int = 0
    sealed: bool = False
    takers: int = 1
    read: list[Event] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Every slot that will be used holds its tile."""
        return self.sealed and self.filled == self.reserved


class Batches(Generic[Owner]):
    """Hands out slots in the order they are asked for, and each batch when it is full.

    Args:
        size: B, tiles per batch.
        tile_size_px: S.
        ahead: full batches that may wait to be encoded before `reserve` blocks.
        ready: called with each full batch.
        abandoned: whether nobody takes the batches any more: a script that dies while it
            holds the iterator leaves the stream suspended, and its threads must end all the same.
        allocate: gives their memory, (B, S, S, 3) uint8.
    """

    def __init__(
        self,
        size: int,
        tile_size_px: int,
        *,
        ahead: int,
        ready: Callable[[Batch[Owner]], None],
        abandoned: Callable[[], bool],
        allocate: Callable[[tuple[int, ...]], torch.Tensor],
    ) -> None:
        self._shape = (size, tile_size_px, tile_size_px, 3)
        self._ahead = ahead
        self._ready = ready
        self._abandoned = abandoned
        self._allocate = allocate
        self._free: list[tuple[torch.Tensor, tuple[Event, ...]]] = []
        self._open: Batch[Owner] | None = None
        self._unreleased = 0
        self._stopped = False
        self._room = threading.Condition()

    def reserve(self, owner: Owner, tiles: NDArray[np.int64]) -> list[BatchSlice[Owner]]:
        """Slots for the tiles, in order; blocks while enough batches wait to be encoded.

        Only batches whose slots are all given out count as waiting, and these are filled without
        any further reservation: so waiting for them always ends.

        Raises:
            Stopped: the stream was closed or abandoned meanwhile.
        """
        with self._room:
            while not self._room.wait_for(lambda: self._stopped or self._unreleased < self._ahead, LOOK_UP_S):
                if self._abandoned():
                    raise Stopped
            if self._stopped:
                raise Stopped
            return self._take(owner, tiles)

    def _take(self, owner: Owner, tiles: NDArray[np.int64]) -> list[BatchSlice[Owner]]:
        pieces = []
        while len(tiles):
            batch = self._open = self._open or self._new()
            piece = BatchSlice(batch, batch.reserved, owner, tiles[: self._shape[0] - batch.reserved])
            batch.pieces.append(piece)
            batch.reserved += len(piece.tiles)
            pieces.append(piece)
            tiles = tiles[len(piece.tiles) :]
            if batch.reserved == self._shape[0]:
                self._seal(batch)
        return pieces

    def _new(self) -> Batch[Owner]:
        if self._free:
            return Batch(*self._free.pop())
        return Batch(self._allocate(self._shape))

    def _seal(self, batch: Batch[Owner]) -> None:
        batch.sealed, self._open = True, None
        self._unreleased += 1

    def fill(self, piece: BatchSlice[Owner], written: Event | None = None) -> None:
        """The slots are written, once the event comes (or given up: nobody looks at them)."""
        with self._room:
            piece.batch.written += [written] if written else []
            piece.batch.filled += len(piece.tiles)
            ready = piece.batch.is_ready
        if ready:
            self._ready(piece.batch)

    def release(self, batch: Batch[Owner], read: Event | None = None) -> None:
        """The batch's pixels have been read, once the event comes, by one of its takers; after the last of
        them its memory is used again."""
        with self._room:
            batch.read += [read] if read else []
            batch.takers -= 1
            if batch.takers > 0:
                return
            self._free.append((batch.pixels, tuple(batch.read)))
            del batch.pixels  # its pieces, which hold it, would keep them until Python looks for circles
            self._unreleased -= 1
            self._room.notify_all()

    def finish(self) -> None:
        """No more tiles will come: the last batch counts as it is."""
        with self._room:
            last = self._open
            if last is None:
                return
            self._seal(last)
            ready = last.is_ready
        if ready:
            self._ready(last)

    def close(self) -> None:
        """Let go of the memory of batches that were released and have been read."""
        self._free.clear()

    def stop(self) -> None:
        """Make every `reserve` that waits raise `Stopped`."""
        with self._room:
            self._stopped = True
            self._room.notify_all()
