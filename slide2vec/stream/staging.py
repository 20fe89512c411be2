"""Copying slides from slow storage to a local disk, ahead of the station that plans them.

    stream takes a slide ──▶ a thread copies it ──▶ it is planned and read ──▶ its copy is removed

Copies begin in the order in which slides are taken, each as soon as there is room for it. What waits for
room waits for earlier slides only, which are read without it: so waiting always ends.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from slide2vec.config import ExecutionOptions
from slide2vec.errors import ConfigError, SlideOpenError
from slide2vec.files import is_remote
from slide2vec.files.scratch import private_folder
from slide2vec.readers.fingerprint import Stamp, stamps_of
from slide2vec.readers.slide_files import SlideFiles, slide_files
from slide2vec.slides import Slide
from slide2vec.stream.batches import Stopped

__all__ = ["IN_PLACE", "InPlace", "Staged", "Stager", "stager_for"]

logger = logging.getLogger(__name__)

#: Slides that are copied at once: object stores give one reader only a part of what the network has.
THREADS = 2
#: Read at once, so that one request to an object store is worth its round trip.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Staged:
    """Where a slide's files are read. Closing it removes the copy, if it is one; may be called twice."""

    image_path: Path
    mask_path: Path | None
    close: Callable[[], None] = field(default=lambda: None, repr=False)
    #: Of a copy: the stamps of the files, by the image or mask that they belong to, before they were copied.
    stamps: Mapping[Path, Mapping[Path, Stamp]] = field(default_factory=dict, repr=False)


class InPlace:
    """Reads slides where they are."""

    threads = 0
    busy_s = 0.0

    def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]:
        """The slides, each announced as it is taken."""
        return iter(slides)

    def wait(self, slide: Slide) -> None:
        """Wait until `take` returns at once."""

    def take(self, slide: Slide) -> Staged:
        """The files to read, once they are there.

        Raises:
            SlideOpenError: it cannot be read in place, and there is no copy.
            Stopped: the run is being closed.
        """
        return Staged(slide.image_path, slide.mask_path)

    def stop(self) -> None:
        """Copy nothing more; whoever waits gets `Stopped`."""


IN_PLACE = InPlace()


class _NotForStaging(Exception):
    """A slide that can never be staged: no failure, and read where it is."""


class Stager(InPlace):
    """Copies slides into a folder, as many as fit.

    Args:
        folder: of this run alone.
        limit_bytes: that copies may take in it at any time.

    Attributes:
        busy_s: seconds that its threads have copied.
    """

    threads = THREADS

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="stage")
        self._copies: dict[str, Future[Staged]] = {}
        self._room = threading.Condition()
        self._begun = self._admitted = 0
        self._used = 0
        self._stopped = False
        self.busy_s = 0.0

    def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]:
        """See `InPlace.ahead`; the copy of a slide begins here."""
        for slide in slides:
            self._begin(slide)
            yield slide

    def _begin(self, slide: Slide) -> Future[Staged]:
        copy = self._copies[slide.sample_id] = self._pool.submit(self._stage, slide, self._begun)
        self._begun += 1
        return copy

    def wait(self, slide: Slide) -> None:
        """See `InPlace.wait`."""
        copy = self._copies.get(slide.sample_id)
        if copy is not None:
            copy.exception()

    def take(self, slide: Slide) -> Staged:
        """See `InPlace.take`."""
        return (self._copies.pop(slide.sample_id, None) or self._begin(slide)).result()

    def _stage(self, slide: Slide, turn: int) -> Staged:
        place = self._folder / str(turn)
        try:
            with self._in_turn(turn):
                stamps = _stamps(slide)
                files = self._files(slide)
                size = sum(source.stat().st_size for source, _ in files)
                self._wait_for_room(size, turn)
        except Stopped:
            raise
        except Exception as error:  # the boundary of one copy: without it the slide is read in place
            return self._not_staged(slide, error)
        try:
            self._copy(files, place)
            if _stamps(slide) != stamps:
                raise OSError("it changed while it was copied")
        except BaseException as error:
            self._release(place, size)
            if isinstance(error, Stopped) or not isinstance(error, Exception):
                raise
            return self._not_staged(slide, error)
        return self._staged(slide, place, size, stamps)

    @contextmanager
    def _in_turn(self, turn: int) -> Iterator[None]:
        """When the block ends, however it ends, it is the next slide's turn to be admitted."""
        try:
            yield
        finally:
            with self._room:
                self._room.wait_for(lambda: self._stopped or self._admitted == turn)
                self._admitted = max(self._admitted, turn + 1)
                self._room.notify_all()

    def _wait_for_room(self, size: int, turn: int) -> None:
        if size > self._limit:
            raise _NotForStaging(
                f"it has {size / 1e9:,.3g} GB, more than the {self._limit / 1e9:,.3g} GB that stage_gb allows"
            )
        with self._room:
            self._room.wait_for(
                lambda: self._stopped or (self._admitted == turn and self._used + size <= self._limit)
            )
            if self._stopped:
                raise Stopped
            self._used += size

    def _files(self, slide: Slide) -> SlideFiles:
        image = slide_files(slide.image_path)
        mask = [] if slide.mask_path is None else slide_files(slide.mask_path)
        if image is None or mask is None:
            raise _NotForStaging(f"it is not known which files belong to a {slide.image_path.suffix} slide")
        return [
            *((source, Path("image") / name) for source, name in image),
            *((source, Path("mask") / name) for source, name in mask),
        ]

    def _copy(self, files: SlideFiles, place: Path) -> None:
        """Into a folder that has its name only when all is there."""
        started = time.perf_counter()
        partial = place.with_suffix(".partial")
        for source, name in files:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copy_file(source, target)
        partial.rename(place)
        with self._room:
            self.busy_s += time.perf_counter() - started

    def _copy_file(self, source: Path, target: Path) -> None:
        with source.open("rb") as read_ahead, target.open("wb", buffering=0) as writing:
            while chunk := read_ahead.read(CHUNK_BYTES):
                if self._stopped:
                    raise Stopped
                writing.write(chunk)

    def _staged(
        self, slide: Slide, place: Path, size: int, stamps: Mapping[Path, Mapping[Path, Stamp]]
    ) -> Staged:
        left = [size]

        def close() -> None:
            with self._room:
                held = left.pop() if left else None
            if held is not None:
                self._release(place, held)

        mask = None if slide.mask_path is None else place / "mask" / slide.mask_path.name
        return Staged(place / "image" / slide.image_path.name, mask, close, stamps)

    def _release(self, place: Path, size: int) -> None:
        for folder in (place, place.with_suffix(".partial")):
            shutil.rmtree(folder, ignore_errors=True)
        with self._room:
            self._used -= size
            self._room.notify_all()

    def _not_staged(self, slide: Slide, reason: Exception) -> Staged:
        """Read where it is, which is logged; what is remote cannot be."""
        if is_remote(slide.image_path) or is_remote(slide.mask_path):
            raise SlideOpenError(
                f"slide {slide.sample_id}: {slide.image_path} is on remote storage and cannot be "
                f"staged: {reason}"
            ) from reason
        level = logging.INFO if isinstance(reason, _NotForStaging) else logging.WARNING
        logger.log(level, "slide %s is read where it is, not staged: %s", slide.sample_id, reason)
        return Staged(slide.image_path, slide.mask_path)

    def stop(self) -> None:
        """See `InPlace.stop`."""
        with self._room:
            self._stopped = True
            self._room.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=False)

    def close(self) -> None:
        """Stop, and wait for the threads."""
        self.stop()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stamps(slide: Slide) -> dict[Path, Mapping[Path, Stamp]]:
    """Of the slide's files, by the image or mask that they belong to."""
    return {path: stamps_of(path) for path in (slide.image_path, slide.mask_path) if path is not None}


@contextmanager
def stager_for(execution: ExecutionOptions) -> Iterator[InPlace]:
    """What stages the slides of a run; its copies and their folder are gone when the block ends.

    Raises:
        ConfigError: nothing can be written into stage_dir.
    """
    if execution.stage_dir is None:
        yield IN_PLACE
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(private_folder(execution.stage_dir))
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise ConfigError(
                f"stage_dir={execution.stage_dir} cannot be written to ({error.strerror or error}): give a "
                "folder on a local disk, or leave stage_dir out"
            ) from error
        limit = free // 2 if execution.stage_gb is None else int(execution.stage_gb * 1e9)
        yield stack.enter_context(Stager(folder, limit))
