"""Decoded tiles that wait in files for encoders whose turn comes later, so that a slide is decoded once.

Nothing outlives the run: another never reads its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slide2vec.cohort.scratch_room import Tiles, has_room, scratch_room, tile_bytes
from slide2vec.config import ExecutionOptions
from slide2vec.errors import SlideReadError
from slide2vec.files.locks import wait_for_lock
from slide2vec.readers.fingerprint import FileIdentity
from slide2vec.stream.cuda_streams import DeviceStream
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.tile_sources import TileSource
from slide2vec.stream.transfer import TileTransfer
from slide2vec.tiling import Tiling

__all__ = ["FROM_SCRATCH", "TileScratch", "tile_scratch"]

logger = logging.getLogger(__name__)

#: By which road the pixels of a kept slide come, in summaries.
FROM_SCRATCH = "scratch"
#: Of files that have all tiles of a slide.
_WHOLE = ".tiles"


@contextmanager
def tile_scratch(execution: ExecutionOptions, turns: int) -> Iterator[TileScratch | None]:
    """Where tiles wait for a later turn, gone when the block ends; see `scratch_room`."""
    with scratch_room(execution, turns) as room:
        yield None if room is None else TileScratch(room.folder, room.limit_bytes)


class TileScratch:
    """Keeps the tiles of slides for later turns, as many as fit. Used from several threads, and by a copy in
    each worker of this machine: all that they have in common is in the folder.

    A file is named after its turn, its slide and tiles, and what decides their pixels; one that is not whole
    after its process, too, and has its full length from the beginning, so that there is room for it.

    Args:
        folder: of this run alone.
        limit_bytes: that tiles may take in it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._later: Collection[Tiles] = ()
        self._turn = 0

    def begin_turn(self, now: Collection[Tiles], later: Collection[Tiles]) -> None:
        """The next turn begins, while nobody reads or writes: what neither it nor a later one wants goes, and
        what is not whole.

        Args:
            now, later: see `tiles_wanted`.
        """
        self._turn, self._later = self._turn + 1, later
        wanted = {_digest(tiles) for tiles in (*now, *later)}
        for path in self._folder.iterdir():
            if path.suffix != _WHOLE or path.name.split("-")[1] not in wanted:
                _remove(path)

    @property
    def bytes(self) -> int:
        """That wait in it."""
        return sum(_size(path) for path in self._folder.iterdir())

    def over(self, transfer: TileTransfer) -> TileTransfer:
        """A transfer that has tiles kept, and brings those that were."""
        return _Through(transfer, self)

    def bind(self, plan: SlidePlan, transfer: TileTransfer) -> SlidePlan:
        """See `TileTransfer.bind`; from the scratch, or into it where a later turn wants the tiles."""
        if plan.identity is None or not len(plan.tiling):
            return transfer.bind(plan)
        geometry = plan.tiling.geometry
        tiles = plan.slide.sample_id, geometry.requested_spacing_um, geometry.requested_tile_size_px
        pixels = _pixels(plan, plan.identity.image, transfer)
        if (source := self._source(tiles, pixels, plan)) is not None:
            bound = transfer.bind(replace(plan, source=source))
            plan.source.close()
            return replace(bound, decode_path=FROM_SCRATCH)
        bound = transfer.bind(plan)
        kept = self._begin(tiles, pixels, plan)
        return bound if kept is None else replace(bound, source=_Keeping(bound.source, kept, transfer.stream))

    def _source(self, tiles: Tiles, pixels: str, plan: SlidePlan) -> _FromScratch | None:
        """Its tiles, if an earlier turn has kept them and they are just these."""
        for path in self._folder.glob(f"*-{_digest(tiles)}-{pixels}{_WHOLE}"):
            if int(path.name.split("-")[0]) < self._turn:
                try:
                    return _FromScratch(path, plan.source, plan.tiling)
                except OSError as error:
                    logger.warning("slide %s: its kept tiles are lost: %s", tiles[0], error)
        return None

    def _begin(self, tiles: Tiles, pixels: str, plan: SlidePlan) -> _Kept | None:
        """A file for the tiles of a slide, if they are wanted later, and fit."""
        if tiles not in self._later or not self._limit:
            return None
        name, side = f"{self._turn}-{_digest(tiles)}", tile_bytes(plan.tiling.geometry.requested_tile_size_px)
        try:
            with self._alone():
                for old in self._folder.glob(f"*-{_digest(tiles)}-*"):
                    if old.suffix == _WHOLE and not old.name.startswith(f"{self._turn}-"):
                        _remove(old)
                    elif old.suffix in (_WHOLE, f".{os.getpid()}"):
                        return None  # another reading of this turn keeps them
                taken = [_size(path) for path in self._folder.iterdir()]
                if not has_room(taken, len(plan.tiling) * side, self._limit):
                    logger.info("slide %s: its tiles are not kept: the scratch is full", tiles[0])
                    return None
                path = self._folder / f"{name}-{pixels}.{os.getpid()}"
                return _Kept(path, len(plan.tiling), side, lambda error: self._give_up(tiles, error))
        except OSError as error:
            self._give_up(tiles, error)
            return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While nobody else, here or in another worker, looks for room."""
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            wait_for_lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _give_up(self, tiles: Tiles, error: OSError) -> None:
        """Write nothing more: whatever room is left is for the run's own files."""
        if self._limit:
            logger.warning(
                "slide %s: its tiles are not kept (%s), nor those of slides after it: each group of encoders "
                "decodes them",
                *(tiles[0], error),
            )
        self._limit = 0


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _pixels(plan: SlidePlan, image: FileIdentity, transfer: TileTransfer) -> str:
    """What decides the pixels of a slide's tiles: of a file that has not been touched since."""
    tiling, files = plan.tiling, sorted(image.stamps.items())
    how = plan.source.backend, transfer.kind, astuple(tiling.geometry)
    corners = hashlib.sha256(np.stack([tiling.x, tiling.y]).astype(np.int64).tobytes()).hexdigest()
    return _digest(image.path, json.dumps(image.content, sort_keys=True), files, how, corners)


def _size(path: Path) -> int:
    """0 of one that is gone meanwhile."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _remove(path: Path) -> None:
    with suppress(OSError):  # it goes with its folder
        path.unlink()


class _Kept:
    """The tiles of a slide in a file, (N, S, S, 3) uint8 RGB, which has its name once all of them are there.

    Args:
        path: until then.
        tiles: N.
        size: bytes of a tile.
        failed: called if they cannot be written, with why.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, tiles: int, size: int, failed: Callable[[OSError], None]) -> None:
        self._path, self._missing, self._size, self._failed = path, tiles, size, failed
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self._file, tiles * size)

    def add(self, tiles: NDArray[np.int64], pixels: Sequence[NDArray[np.uint8]]) -> None:
        """Write tiles that have come. That they cannot be written is no error of the slide."""
        size = self._size
        if self._error is not None or self._file is None:
            return
        try:
            for tile, each in zip(tiles.tolist(), pixels, strict=True):
                if os.pwrite(self._file, np.ascontiguousarray(each).data, tile * size) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._error = error
            os.ftruncate(self._file, 0)  # its room may be wanted
            return
        with self._lock:
            self._missing -= len(tiles)

    def close(self) -> None:
        """No more tiles come, and nobody adds any. May be called twice."""
        file, self._file = self._file, None
        if file is None:
            return
        os.close(file)
        if self._error is None and not self._missing:
            with suppress(OSError):
                self._path.rename(self._path.with_suffix(_WHOLE))
            return
        _remove(self._path)
        if self._error is not None:
            self._failed(self._error)


class _Through:
    """A transfer by way of the scratch. See `TileTransfer`."""

    def __init__(self, transfer: TileTransfer, scratch: TileScratch) -> None:
        self._transfer, self._scratch = transfer, scratch
        self.device, self.stream, self.kind = transfer.device, transfer.stream, transfer.kind

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        return self._transfer.allocate(shape)

    def bind(self, plan: SlidePlan) -> SlidePlan:
        return self._scratch.bind(plan, self._transfer)


class _Keeping:
    """Tiles that are kept as they are placed. See `TileSource`."""

    def __init__(self, source: TileSource, kept: _Kept, stream: DeviceStream) -> None:
        self._source, self._kept, self._stream = source, kept, stream
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        self._source.place(number, data, targets)
        self._kept.add(self.blocks[number], self._on_host(targets))

    def _on_host(self, targets: Sequence[Any]) -> Sequence[NDArray[np.uint8]]:
        if not isinstance(targets[0], Tensor):
            return targets
        with self._stream.current():
            return list(torch.stack(list(targets)).cpu().numpy())

    def read_tile(self, tile: int, target: Any) -> None:
        """Of a block that cannot be read at once: such slides are not kept."""
        self._source.read_tile(tile, target)

    def close(self) -> None:
        self._source.close()
        self._kept.close()


class _FromScratch:
    """Tiles out of the scratch. See `TileSource`.

    Args:
        source: the slide, in whose blocks they come.

    Raises:
        OSError: the file is gone.
    """

    def __init__(self, path: Path, source: TileSource, tiling: Tiling) -> None:
        self.backend, self.blocks = source.backend, source.blocks
        self._name, self._path, self._size = (
            tiling.sample_id,
            path,
            tile_bytes(tiling.geometry.requested_tile_size_px),
        )
        self._file = path.open("rb", buffering=0)

    def fetch(self, number: int) -> list[bytes]:
        return [self._read(tile) for tile in self.blocks[number].tolist()]

    def place(self, number: int, data: Sequence[bytes], targets: Sequence[NDArray[np.uint8]]) -> None:
        for pixels, target in zip(data, targets, strict=True):
            target[:] = np.frombuffer(pixels, np.uint8).reshape(target.shape)

    def read_tile(self, tile: int, target: NDArray[np.uint8]) -> None:
        target[:] = np.frombuffer(self._read(tile), np.uint8).reshape(target.shape)

    def _read(self, tile: int) -> bytes:
        wrong: object = "the file is too short"
        try:
            if len(pixels := os.pread(self._file.fileno(), self._size, tile * self._size)) == self._size:
                return pixels
        except (OSError, ValueError) as error:
            wrong = error
        raise SlideReadError(
            f"slide {self._name}: tile {tile} cannot be read from {self._path}, where its decoded tiles were "
            f"kept: {wrong}; run again, with another scratch_dir or scratch_gb=0"
        )

    def close(self) -> None:
        self._file.close()
