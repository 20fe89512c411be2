"""Tile archives through NVIDIA DALI: its webdataset reader and its JPEG decoder, on a GPU or the CPU.

On the CPU it is not the faster way: on two cores 4,900 tiles/s of 256 px, where OpenCV in two threads
decodes 7,100. On a GPU the tiles are decoded by its engines and stay in its memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ExtraMissingError, SlideReadError
from slide2vec.installation import add_extra
from slide2vec.prepare.pixel_difference import DECODED, tiles_to_compare

__all__ = ["Archive", "DaliArchive", "fault", "unavailable"]

logger = logging.getLogger(__name__)

#: Blocks that were passed on the way to another one and are kept for who will ask.
MOST_KEPT = 64

Pixels = NDArray[np.uint8]


class Archive(Protocol):
    """What DaliArchive needs of an archive that has been checked.

    Attributes:
        members: (N, 2) int64, offset and size in bytes of each tile's JPEG in the file.
    """

    path: Path
    backend: str
    blocks: tuple[NDArray[np.int64], ...]
    members: NDArray[np.int64]

    def fetch(self, number: int) -> Any: ...
    def check(self, number: int, data: Any) -> None: ...
    def place(self, number: int, data: Any, targets: Sequence[Pixels]) -> None: ...
    def read_tile(self, tile: int, target: Pixels) -> None: ...
    def close(self) -> None: ...


def unavailable() -> str | None:
    """Why DALI cannot be used here, None when it can."""
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        return None
    return f"NVIDIA DALI is not installed: {add_extra('cuda')} (Linux)"


def fault(error: Exception) -> str:
    """What DALI says in an error, without where its pipeline was written and its own sources."""
    text = str(error).partition("encountered:")[2] or str(error)
    for follows in ("C++ context", "Current pipeline object"):
        text = text.partition(follows)[0]
    return " ".join(text.split()).rstrip(" .:")


class DaliArchive:
    """The tiles of a slide out of its archive, decoded by DALI; safe to use from several threads.

    The pixels are those of `archive`. DALI parses no tar: it is given the places of the JPEGs, and gets
    none that `archive` has not looked at. Since it makes up pixels for damage inside of a JPEG, no block is
    handed out that `archive` has not checked strictly. Where DALI fails, `archive` does the rest, and says
    what is wrong. DALI starts with the first block that is asked for.

    Args:
        archive: what is read; it is closed with this.
        tile_size_px: side of its tiles.
        threads: that decode.

    Raises:
        ExtraMissingError: DALI is not installed.
    """

    def __init__(self, archive: Archive, *, tile_size_px: int, threads: int) -> None:
        if reason := unavailable():
            archive.close()
            raise ExtraMissingError(reason)
        self.backend, self.blocks = archive.backend, archive.blocks
        self._archive, self._side, self._threads = archive, tile_size_px, threads
        self._lock = threading.Lock()
        self._pipeline: Any | None = None
        self._next = 0  # the block that DALI gives next
        self._passed: dict[int, Pixels] = {}
        self._works = True
        self._device: Any = None

    def use_device(self, device: Any) -> str | None:
        """Decode on a device from now on: `fetch` gives tensors there. To be called before `fetch`.

        Args:
            device: a torch.device.

        Returns:
            Why it does not: it cannot, or its pixels of some tiles are further from the CPU's than those of
            decoders may be.
        """
        self._device = device
        reason = self._difference()
        self._works = reason is None
        return reason

    def _difference(self) -> str | None:
        """What is wrong with DALI's pixels of some tiles with much texture, None when nothing is."""
        tiles = np.concatenate(self.blocks) if self.blocks else np.empty(0, np.int64)
        tiles, pixels = tiles_to_compare(tiles, self._side, self._archive.read_tile)
        if not len(tiles):
            return "the CPU cannot decode the tiles that would be compared"
        try:
            pipeline = _build(self._archive, (tiles,), self._threads, self._device)
            found = self._decoded(pipeline, len(tiles))
        except (RuntimeError, OSError, ImportError, ValueError) as error:
            return fault(error)
        return DECODED.exceeded(found.cpu().numpy(), pixels)

    def fetch(self, number: int) -> Any:
        """The pixels of a block, (n, S, S, 3) uint8, an array or, on a device, a tensor; its JPEGs where DALI
        does not have them.

        Raises:
            SlideReadError: it cannot be decoded.
        """
        jpegs = self._archive.fetch(number)
        if self._works:
            self._archive.check(number, jpegs)  # by as many threads as there are
        with self._lock:
            while self._works and self._next <= number:
                self._advance()
            pixels = self._passed.pop(number, None)
        return jpegs if pixels is None else pixels

    def place(self, number: int, data: Any, targets: Sequence[Pixels]) -> None:
        """Write what `fetch` gave into targets, (S, S, 3) uint8 each.

        Raises:
            SlideReadError: one of the tiles cannot be decoded.
        """
        if not hasattr(data, "shape"):
            self._placed(lambda staged: self._archive.place(number, data, staged), targets)
            return
        for tile, target in zip(data, targets, strict=True):
            target[:] = tile

    def _placed(self, place: Callable[[Sequence[Pixels]], None], targets: Sequence[Any]) -> None:
        """Have the archive write into targets, wherever they are."""
        if all(isinstance(target, np.ndarray) for target in targets):
            place(targets)
            return
        staged = np.empty((len(targets), self._side, self._side, 3), np.uint8)
        place(list(staged))
        for tile, target in zip(staged, targets, strict=True):
            target.copy_(import_module("torch").from_numpy(tile))

    def read_tile(self, tile: int, target: Pixels) -> None:
        """Fetch and place a single tile, without DALI.

        Raises:
            SlideReadError: it cannot be decoded.
        """
        self._placed(lambda staged: self._archive.read_tile(tile, staged[0]), [target])

    def close(self) -> None:
        """Release DALI and the file. May be called twice."""
        with self._lock:
            self._works, self._pipeline = False, None
            self._passed.clear()
        self._archive.close()

    def _advance(self) -> None:
        """Decode the next block, or give DALI up."""
        number, tiles = self._next, self.blocks[self._next]
        try:
            self._archive.fetch(number)  # for its checks: DALI would decode a JPEG of any size
            if self._pipeline is None:
                self._pipeline = _build(self._archive, self.blocks, self._threads, self._device)
            pixels = self._decoded(self._pipeline, len(tiles))
        except (RuntimeError, OSError, ImportError, ValueError) as error:
            if not isinstance(error, SlideReadError):  # `archive` reports that one
                logger.warning("%s is read without DALI, which failed: %s", self._archive.path, fault(error))
            self._works, self._pipeline = False, None
            return
        self._next += 1
        self._passed[number] = pixels
        if len(self._passed) > MOST_KEPT:
            del self._passed[min(self._passed)]

    def _decoded(self, pipeline: Any, count: int) -> Any:
        """The next tiles, in memory of their own."""
        if self._device is None:
            (decoded,) = pipeline.run()
            return np.stack([np.asarray(decoded.at(index)) for index in range(count)])
        torch = import_module("torch")
        on_gpu = self._device.type == "cuda"
        ordered = (torch.cuda.current_stream(self._device),) if on_gpu else ()
        (decoded,) = pipeline.run(*ordered)
        return torch.from_dlpack(decoded.as_tensor())[:count].clone()


def _build(archive: Archive, blocks: Sequence[NDArray[np.int64]], threads: int, device: Any = None) -> Any:
    """A pipeline that gives blocks of an archive's tiles one after the other."""
    dali, fn = import_module("nvidia.dali"), import_module("nvidia.dali.fn")
    spans = archive.members[np.concatenate(blocks)].tolist()
    # A queue of 1: nothing is decoded before it was checked.
    on_gpu = device is not None and device.type == "cuda"
    number = (device.index or 0) if on_gpu else None
    pipeline = dali.Pipeline(len(blocks[0]), threads, device_id=number, prefetch_queue_depth=1)
    with TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        index.write_text(
            f"v1.2 {len(spans)}\n" + "".join(f"jpg {start} {size} tile\n" for start, size in spans)
        )
        with pipeline:
            jpegs = fn.readers.webdataset(
                paths=[str(archive.path)],
                index_paths=[str(index)],
                ext=["jpg"],
                missing_component_behavior="error",
                dont_use_mmap=True,  # a file that is cut short meanwhile would kill the process
            )
            tiles = fn.decoders.image(
                jpegs,
                device="mixed" if on_gpu else "cpu",
                jpeg_fancy_upsampling=True,  # on GPUs, too: up to 2.35 grey levels off without
                adjust_orientation=False,
            )
            pipeline.set_outputs(tiles)
        pipeline.build()
    return pipeline
