"""Sources of tiles in a GPU's memory: decoded there, or on the CPU and uploaded; and which it was."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slide2vec.errors import Slide2VecError, SlideReadError
from slide2vec.stream.cuda_streams import DeviceStream
from slide2vec.stream.decode_tally import DecodeTally
from slide2vec.stream.tile_sources import TileSource

__all__ = ["ArchiveOnDevice", "DecodedOnDevice", "OnDevice", "Uploaded", "is_out_of_memory", "neighbours"]

logger = logging.getLogger(__name__)

#: Compressed tiles that a device's decoder may refuse, and blocks that it may fail at, before the rest of a
#: slide is decoded on the CPU: what it refuses is decoded there tile by tile, slower than by a whole block.
MOST_REFUSED = 8
MOST_FAILED = 2
#: Blocks that a device is given at once where the CPU decodes beside it: one is decoded, the next read.
TURNS = 2
#: What libraries say when a GPU's memory does not suffice (PyTorch, CUDA's runtime and driver, nvJPEG, C++).
_OUT_OF_MEMORY = ("out of memory", "out_of_memory", "memoryallocation", "allocator_failure", "bad_alloc")

IntArray = NDArray[np.int64]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is that a device's memory did not suffice."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        of_library = isinstance(error, RuntimeError) and not isinstance(error, Slide2VecError)
        if of_library and any(sign in text for sign in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


class OnDevice:
    """A source that works on a device. See `TileSource`."""

    def __init__(self, source: TileSource, stream: DeviceStream) -> None:
        self._source, self._stream = source, stream
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        with self._stream.current():
            return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        with self._stream.current():
            self._source.place(number, data, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        with self._stream.current():
            self._source.read_tile(tile, target)

    def close(self) -> None:
        self._source.close()


class ArchiveOnDevice(OnDevice):
    """A tile archive that DALI decodes on a device, and the CPU where DALI was given up. See `TileSource`.

    Args:
        tally: called with the tiles of every block.
    """

    decode_path = "archive, dali on the device"

    def __init__(self, source: TileSource, stream: DeviceStream, tally: DecodeTally) -> None:
        super().__init__(source, stream)
        self._tally = tally

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        super().place(number, data, targets)
        by_dali = isinstance(data, Tensor)
        self._tally.add(self.decode_path if by_dali else "archive, uploaded", len(targets))

    def read_tile(self, tile: int, target: Any) -> None:
        super().read_tile(tile, target)
        self._tally.add("archive, uploaded", 1)


class Uploaded:
    """A source that works in host memory, with one asynchronous copy for neighbouring slots. See
    `TileSource`."""

    def __init__(self, source: TileSource, stream: DeviceStream) -> None:
        self._source, self._stream = source, stream
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        staged = self._staging(len(targets), targets[0])
        self._source.place(number, data, list(staged.numpy()))
        self._upload(staged, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        staged = self._staging(1, target)
        self._source.read_tile(tile, staged.numpy()[0])
        self._upload(staged, [target])

    def _staging(self, count: int, target: Any) -> Tensor:
        """Page-locked where the device is a GPU: PyTorch hands such memory out again after the copy."""
        cuda = self._stream.device.type == "cuda"
        with self._stream.current():  # or it opens a context on another GPU
            return torch.empty((count, *target.shape), dtype=torch.uint8, pin_memory=cuda)

    def _upload(self, staged: Tensor, targets: Sequence[Any]) -> None:
        with self._stream.current():
            for slots, target in neighbours([torch.as_tensor(target) for target in targets]):
                target.copy_(staged[slots], non_blocking=True)

    def close(self) -> None:
        self._source.close()


def neighbours(targets: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Targets that lie one behind the other in memory as one tensor each, and which they are."""
    start = 0
    for end in range(1, len(targets) + 1):
        if end < len(targets) and _follows(targets[end], targets[end - 1]):
            continue
        first = targets[start]
        count = end - start
        whole = (
            first[None]
            if count == 1
            else first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
        )
        yield slice(start, end), whole
        start = end


def _follows(target: Tensor, before: Tensor) -> bool:
    same = target.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    gap = target.storage_offset() - before.storage_offset()
    adjacent = int(gap) == before.numel()
    return same and adjacent and before.is_contiguous() and target.is_contiguous()


class _Fetched(NamedTuple):
    """A block of tiles: by whom it was read, and what; by nobody yet, where memory did not suffice."""

    by: TileSource | None
    data: Any = None


class DecodedOnDevice:
    """A slide that is decoded on a device, and on the CPU where that fails. See `TileSource`.

    A block for which the device's memory does not suffice is read in halves there, then on the CPU. After
    `MOST_FAILED` blocks that the device fails at, or `MOST_REFUSED` compressed tiles that its decoder does
    not take, the rest of the slide is decoded on the CPU, with a warning.

    Args:
        name: of the slide.
        decode_path: what the device's way is called.
        on_device: gives some of the slide's tiles, by their indices, decoded there; for all of them: None.
        uploaded: gives them decoded on the CPU.
        refused: how many compressed tiles the device's decoder has refused so far.
        tally: called with the tiles of every block.
        is_shared: a thread that finds the device busy with `TURNS` blocks has the CPU decode its own. Which
            tiles the CPU decodes depends on the time that others take then.
        close: what else is to be closed.
    """

    def __init__(
        self,
        name: str,
        decode_path: str,
        on_device: Callable[[IntArray | None], TileSource],
        uploaded: Uploaded,
        stream: DeviceStream,
        *,
        refused: Callable[[], int],
        tally: DecodeTally,
        close: Callable[[], None],
        is_shared: bool = False,
    ) -> None:
        self._name, self._path, self._opened, self._uploaded = name, decode_path, on_device, uploaded
        self._stream, self._refused, self._tally, self._close = stream, refused, tally, close
        self._device: TileSource = OnDevice(on_device(None), stream)
        self.backend, self.blocks = uploaded.backend, self._device.blocks
        self._most: int | None = None  # tiles of a block that fitted into the device's memory
        self._failed, self._given_up = 0, False
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(TURNS) if is_shared else None

    def fetch(self, number: int) -> Any:
        if self._given_up:
            return _Fetched(self._uploaded, self._uploaded.fetch(number))
        if self._most is not None and len(self.blocks[number]) > self._most:
            return _Fetched(None)
        if self._turns is not None and not self._turns.acquire(blocking=False):
            return _Fetched(self._uploaded, self._uploaded.fetch(number))
        try:
            data = self._device.fetch(number)
        except (SlideReadError, RuntimeError) as error:
            self._end_turn()
            return self._otherwise(number, error)
        self._count_refused()
        return _Fetched(self._device, data)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        found: _Fetched = data
        if found.by is self._device:
            try:
                self._device.place(number, found.data, targets)
                self._tally.add(self._path, len(targets))
                return
            except (SlideReadError, RuntimeError) as error:
                found = self._otherwise(number, error)
            finally:
                self._end_turn()
        if found.by is None:
            self._place_in_parts(self.blocks[number], targets)
            return
        self._uploaded.place(number, found.data, targets)
        self._tally.add(f"{self.backend}, uploaded", len(targets))

    def read_tile(self, tile: int, target: Any) -> None:
        if not self._given_up:
            try:
                self._device.read_tile(tile, target)
                self._tally.add(self._path, 1)
                return
            except (SlideReadError, RuntimeError):
                pass  # the CPU has the last word
        self._uploaded.read_tile(tile, target)
        self._tally.add(f"{self.backend}, uploaded", 1)

    def close(self) -> None:
        self._uploaded.close()
        self._close()

    def _end_turn(self) -> None:
        if self._turns is not None:
            self._turns.release()

    def _otherwise(self, number: int, error: Exception) -> _Fetched:
        """A block that the device failed at, by the CPU; by nobody yet where memory did not suffice."""
        if is_out_of_memory(error):
            self._make_room(len(self.blocks[number]))
            return _Fetched(None)
        data = self._uploaded.fetch(number)  # raises what is wrong with the slide, if it is that
        with self._lock:
            self._failed += 1
            give_up = self._failed > MOST_FAILED
        if give_up:
            self._give_up(f"the GPU failed at {self._failed} blocks of its tiles, last with: {error}")
        return _Fetched(self._uploaded, data)

    def _place_in_parts(self, tiles: IntArray, targets: Sequence[Any]) -> None:
        """Half of the tiles at a time, while the device's memory does not suffice for more."""
        if len(tiles) == 1:
            self._give_up("not even one tile fits into the GPU's memory")
            self._uploaded.read_tile(int(tiles[0]), targets[0])
            self._tally.add(f"{self.backend}, uploaded", 1)
            return
        middle = len(tiles) // 2
        for part in (slice(0, middle), slice(middle, None)):
            try:
                self._place_part(tiles[part], targets[part])
            except (SlideReadError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._make_room(len(tiles[part]))
                self._place_in_parts(tiles[part], targets[part])

    def _place_part(self, tiles: IntArray, targets: Sequence[Any]) -> None:
        source = OnDevice(self._opened(tiles), self._stream)
        for number, block in enumerate(source.blocks):
            source.place(number, source.fetch(number), [targets[index] for index in block.tolist()])
        self._tally.add(self._path, len(tiles))

    def _make_room(self, tiles: int) -> None:
        with self._lock:
            most = max(1, tiles // 2)
            warned, self._most = self._most is not None, most if self._most is None else min(self._most, most)
        if not warned:
            logger.warning(
                "slide %s: %d tiles at once do not fit into the memory of %s: they are decoded in halves, "
                "or on the CPU",
                self._name,
                tiles,
                self._stream.device,
            )
        if self._stream.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_refused(self) -> None:
        refused = self._refused()
        if refused > MOST_REFUSED:
            self._give_up(
                f"the GPU's decoder does not take its JPEGs ({refused} had to be decoded on the CPU)"
            )

    def _give_up(self, why: str) -> None:
        with self._lock:
            warned, self._given_up = self._given_up, True
        if not warned:
            logger.warning("slide %s: the rest of it is decoded on the CPU: %s", self._name, why)
