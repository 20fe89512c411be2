"""Preparing and encoding batches without waiting for them: features are collected when they are there.

    prepare stream ── tiles to the engine's input ──▶ encode stream ── features ──▶ copy stream ── to the host

The three are streams of the device; each begins when the event of the one before it has come, and the host
waits for none of them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slide2vec.errors import EngineError
from slide2vec.prepare import Preparer
from slide2vec.runtime import Engine
from slide2vec.runtime.device import torch_threads
from slide2vec.stream.cuda_streams import Event, device_stream
from slide2vec.stream.station_timers import StationTimers

__all__ = ["IN_FLIGHT", "BatchEncoder", "InFlightBatch"]

logger = logging.getLogger(__name__)

#: Batches that may be on the device at once: one is encoded while the next is prepared and the features
#: of the last are copied.
IN_FLIGHT = 2


#: On the CPU one encoder computes at a time, with all its threads: side by side they would slow each other.
_CPU = threading.Lock()


def _turn(device: torch.device) -> AbstractContextManager[object]:
    return _CPU if device.type == "cpu" else nullcontext()


@dataclass(eq=False)
class InFlightBatch:
    """A batch whose preparing and encoding is enqueued on the device.

    Attributes:
        features: (n, D) float32 in host memory, there once `done`.
        read: its tiles are no longer needed.
        memory: of the output ring, that holds the features.
        kept: tensors that device streams still work on.
        spans: stations with the beginning and the end of their work.
    """

    features: Tensor
    read: Event
    done: Event
    memory: Tensor
    kept: list[Tensor] = field(repr=False)
    spans: list[tuple[str, Event, Event]] = field(repr=False)


class BatchEncoder:
    """Prepares and encodes batches on an engine's device.

    A batch that does not fit into the device's memory is encoded in halves, and so are those after it.

    Args:
        batch_size: tiles per forward pass.
        threads: of PyTorch on the CPU meanwhile; None = as they are set.
    """

    def __init__(
        self,
        engine: Engine,
        preparer: Preparer,
        timers: StationTimers,
        *,
        batch_size: int,
        threads: int | None = None,
    ) -> None:
        self._engine, self._preparer, self._timers, self._threads = engine, preparer, timers, threads
        self._most = self._size = batch_size
        self._prepare, self._encode, self._copy = (device_stream(engine.device) for _ in range(3))
        self._ring: deque[Tensor] = deque()

    @property
    def most(self) -> int:
        """Tiles per forward pass that have fitted so far."""
        return self._most

    def submit(self, tiles: Tensor, written: Iterable[Event]) -> InFlightBatch:
        """Enqueue the work of a batch, or of several at once.

        Args:
            tiles: (n, S, S, 3) uint8; the forward passes take `batch_size` of them, one after the other.
            written: after which they are.

        Raises:
            EngineError: the encoder gives other features than a row for each tile.
            torch.OutOfMemoryError: not even one tile fits.
        """
        self._prepare.wait(written)
        kept: list[Tensor] = []
        spans: list[tuple[str, Event, Event]] = []
        features: list[Tensor] = []
        start = 0
        while start < len(tiles):
            chunk = tiles[start : start + self._most]
            with _turn(self._engine.device), torch_threads(self._threads):
                found = self._attempt(chunk, kept, spans)
            if found is None:
                self._halve(len(chunk))
                continue
            features.append(found)
            start += len(chunk)
        with self._encode.current():
            whole = features[0] if len(features) == 1 else torch.cat(features)
        read = self._encode.record()
        self._copy.wait([read])
        memory = self._memory(len(tiles))
        on_host = self._copy.to_host(whole, memory)
        kept += [*features, whole]
        return InFlightBatch(on_host, read, self._copy.record(), memory, kept, spans)

    def _attempt(
        self, tiles: Tensor, kept: list[Tensor], spans: list[tuple[str, Event, Event]]
    ) -> Tensor | None:
        """Features on the device; None if memory did not suffice (whose error holds on to what was used)."""
        try:
            begun = self._prepare.record()
            with self._prepare.current():
                pixels = self._preparer.prepare(tiles)
            prepared = self._prepare.record()
            self._encode.wait([prepared])
            encoding = self._encode.record()
            with self._encode.current():
                features = self._engine.run(pixels)
        except torch.OutOfMemoryError:
            if len(tiles) == 1:
                raise
            return None
        wanted = len(tiles), self._engine.feature_dim
        if tuple(features.shape) != wanted:  # or one row, or column, would be taken for all of them
            raise EngineError(
                f"the encoder gave features of shape {tuple(features.shape)} for {len(tiles)} tiles, not "
                f"{wanted}, a row for each tile: correct its code"
            )
        kept.append(pixels)
        spans += [("prepare", begun, prepared), ("encode", encoding, self._encode.record())]
        return features

    def _halve(self, tiles: int) -> None:
        self._most = max(1, min(self._most, tiles) // 2)
        logger.warning(
            "%d tiles at once do not fit into the memory of %s: going on with batch_size=%d",
            tiles,
            self._engine.device,
            self._most,
        )
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _memory(self, tiles: int) -> Tensor:
        """Host memory for the features of so many tiles."""
        cuda = self._engine.device.type == "cuda"
        if self._ring and (len(self._ring[0]) >= tiles or not cuda):
            return self._ring.popleft()
        size = max(self._size, tiles) if cuda else 0
        with self._copy.current():  # or it opens a context on another GPU
            return torch.empty((size, self._engine.feature_dim), pin_memory=cuda)

    def release(self, in_flight: InFlightBatch) -> None:
        """Its features are collected; their memory is used again."""
        for station, begun, ended in in_flight.spans:
            self._timers.add_busy(station, begun.elapsed_time(ended) / 1e3)
        in_flight.kept.clear()
        self._ring.append(in_flight.memory)
