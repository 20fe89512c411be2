"""The stream itself: slides in, outcomes out, each the moment it is complete.

    dispatcher ── plans slides ahead in a pool, gives every block of tiles its slots ──▶ tasks
    readers    ── read a block of tiles, cut and resize them into their slots ─────────▶ inbox
    caller     ── has full batches prepared and encoded, scatters their features ──────▶ outcomes

Slots are given out in input order, so that batches hold the same tiles whatever the threads do.
A slide that fails keeps its slots, which nobody looks at.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import NotFiniteError, SlideReadError, as_slide_error
from slide2vec.prepare import Preparer
from slide2vec.progress import (
    ProgressReporter,
    RunFinished,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
)
from slide2vec.runtime import Engine
from slide2vec.slides import Slide
from slide2vec.stream.batches import Batch, Batches, Piece, Stopped
from slide2vec.stream.encoding import IN_FLIGHT, Encoding, Ticket
from slide2vec.stream.feed import HOST_FEED, Feed
from slide2vec.stream.meters import Meters, find_bottleneck
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.planner import Planner
from slide2vec.stream.planning import Arrivals, Planning
from slide2vec.stream.sources import bad_tiles, damaged, not_finite, place_singly
from slide2vec.stream.staging import InPlace
from slide2vec.tiling import BadTile, Tiling

__all__ = ["SlideOutcome", "Stream"]

#: Tiles of a typical supertile: readers need slots for about two each to stay busy.
TILES_PER_READ = 64
#: How often it is looked whether features have come, while no batch does.
LOOK_UP_S = 0.001


@dataclass(frozen=True)
class SlideOutcome:
    """A slide that is through: `embedded` and `tiling` are there, or else `error`.

    Attributes:
        backend: what read its tiles: a reader's name, or "archive".
        skipped: tiles that could not be decoded, and are in neither `embedded` nor `tiling`.
        tiles_tar_path: the archive of its tiles, where there is one.
    """

    slide: Slide
    embedded: EmbeddedSlide | None = None
    tiling: Tiling | None = None
    backend: str | None = None
    skipped: tuple[BadTile, ...] = ()
    tiles_tar_path: Path | None = None
    error: Exception | None = None


class _Job:
    """One slide on its way through the stream."""

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.plan: SlidePlan | None = None
        self.embeddings: Tensor | None = None
        self.missing = 0
        self.settled = False
        self.failed = False
        self.bad: dict[int, SlideReadError] = {}
        #: Tiles whose embeddings hold NaN or infinities -> whether they were finite before the cast.
        self.overflowed: dict[int, bool] = {}
        self._reads = 1  # one for the dispatcher, so that the reader stays open while it works
        self._lock = threading.Lock()

    def begin_read(self) -> None:
        with self._lock:
            self._reads += 1

    def end_read(self) -> None:
        """Close the slide after its last read."""
        with self._lock:
            self._reads -= 1
            done = self._reads == 0
        if done and self.plan is not None:
            self.plan.source.close()

    def reject(self, bad: dict[int, SlideReadError]) -> None:
        """Leave tiles out, or fail the slide, as its plan says."""
        assert self.plan is not None
        if bad and not self.plan.skips_bad_tiles:
            raise damaged(self.plan.tiling, bad)
        with self._lock:
            self.bad.update(bad)

    def collect(self, tiles: Tensor, features: Tensor, dtype: torch.dtype) -> None:
        assert self.plan is not None
        if self.embeddings is None:
            self.embeddings = torch.empty((len(self.plan.tiling.x), features.shape[1]), dtype=dtype)
        values = features.to(dtype)
        self.embeddings[tiles] = values
        self.missing -= len(tiles)
        for row in rows_not_finite(values).tolist():
            self.overflowed[int(tiles[row])] = bool(features[row].isfinite().all())

    def not_finite(self, engine: Engine) -> NotFiniteError | None:
        """The error of a slide whose embeddings hold NaN or infinities, but for tiles that are left out."""
        assert self.plan is not None
        wrong = {tile: fits for tile, fits in self.overflowed.items() if tile not in self.bad}
        return not_finite(self.plan.tiling, wrong, engine) if wrong else None


@dataclass(frozen=True)
class _Read:
    job: _Job
    block: int
    pieces: list[Piece[_Job]]


@dataclass(frozen=True)
class _Planned:
    job: _Job


@dataclass(frozen=True)
class _Failed:
    job: _Job
    error: Exception


@dataclass(frozen=True)
class _End:
    slides: int


@dataclass(frozen=True)
class _Broken:
    error: Exception


class Stream:
    """The five stations on one device; one use per call.

    Args:
        engine, preparer: what encodes and prepares.
        batch_size: tiles per forward pass.
        tile_size_px: side of the tiles as planned (the requested size).
        dtype: of the embeddings.
        readers, planners: threads of those stations.
        encoder_threads: of PyTorch on the CPU, while it prepares and encodes; None = as they are set.
        ahead: batches that readers may be ahead of the encoder.
        reporter: receives progress events, from the calling thread.
        feed: where tiles are kept, and how they get there.
    """

    def __init__(
        self,
        engine: Engine,
        preparer: Preparer,
        *,
        batch_size: int,
        tile_size_px: int,
        dtype: torch.dtype = torch.float32,
        readers: int,
        planners: int,
        encoder_threads: int | None = None,
        ahead: int,
        reporter: ProgressReporter,
        feed: Feed = HOST_FEED,
    ) -> None:
        self._engine, self._dtype, self._feed = engine, dtype, feed
        self._readers, self._planners, self._reporter = readers, planners, reporter
        self._inbox: queue.SimpleQueue[Batch[_Job] | _Planned | _Failed | _Broken | _End] = (
            queue.SimpleQueue()
        )
        self._tasks: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._batches: Batches[_Job] = Batches(
            batch_size,
            tile_size_px,
            ahead=max(ahead, 2 * readers * TILES_PER_READ // batch_size),
            ready=self._inbox.put,
            abandoned=lambda: not self._consumer.is_alive(),
            allocate=feed.allocate,
        )
        self._consumer = threading.current_thread()
        self._meters = Meters()
        self._encoding = Encoding(
            engine, preparer, self._meters, batch_size=batch_size, threads=encoder_threads
        )
        self._flight: deque[tuple[Batch[_Job], Ticket]] = deque()
        self._roads: Counter[str] = Counter()
        self._stopping = False
        self._tiles = 0

    def run(
        self, slides: Iterable[Slide] | Arrivals, planner: Planner
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides; yields each as soon as it is complete or has failed.

        Memory does not grow with the number of slides.
        """
        started = time.perf_counter()
        planning = Planning(slides, planner, partial(self._plan, planner), self._planners)
        threads = self._start(planning)
        embedded = failed = 0
        try:
            for outcome in self._encode_all():
                embedded, failed = embedded + (outcome.error is None), failed + (outcome.error is not None)
                yield outcome
        finally:
            self._stopping = True
            planning.stop()
            self._batches.stop()
            planner.stop()
            for thread in threads:
                thread.join()
            self._land()
        seconds = time.perf_counter() - started
        self._reporter.emit(RunFinished(self._summary(planner.stager, embedded, failed, seconds)))

    def _start(self, planning: Planning) -> list[threading.Thread]:
        """The readers and the dispatcher, running."""
        work: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
            (f"read-{number}", self._read_all, ()) for number in range(self._readers)
        ]
        work.append(("dispatch", self._dispatch_all, (planning,)))
        threads = [threading.Thread(name=n, target=f, args=args) for n, f, args in work]
        for thread in threads:
            thread.start()
        return threads

    # plan -------------------------------------------------------------------------------------

    def _dispatch_all(self, planning: Planning) -> None:
        count = 0
        try:
            with planning:
                for slide, planned in planning:
                    count += 1
                    self._dispatch(_Job(slide), planned)
            self._batches.finish()
        except Stopped:
            if not self._stopping:
                self._inbox.put(_Broken(RuntimeError("the thread that iterated over the outcomes has ended")))
        except Exception as error:
            self._inbox.put(_Broken(error))
        finally:
            for _ in range(self._readers):
                self._tasks.put(None)
            self._inbox.put(_End(count))

    def _plan(self, planner: Planner, slide: Slide) -> SlidePlan:
        with self._meters.waiting("plan"):
            planner.wait(slide)
        with self._meters.busy("plan"):
            planned = planner.plan(slide)
            try:
                return self._feed.adopt(planned)
            except BaseException:
                planned.source.close()
                raise

    def _dispatch(self, job: _Job, planned: Future[SlidePlan]) -> None:
        """Give every supertile of a slide its slots, as room allows."""
        error = planned.exception()
        if error is not None:
            told = as_slide_error(error, job.slide.sample_id, "finding its tiles")
            self._inbox.put(_Failed(job, told))
            return
        job.plan = planned.result()
        job.missing = len(job.plan.tiling.x)
        self._inbox.put(_Planned(job))
        try:
            for block, tiles in enumerate(job.plan.source.blocks):
                if job.failed:
                    return
                with self._meters.waiting("plan"):
                    pieces = self._batches.reserve(job, tiles)
                job.begin_read()
                self._tasks.put(_Read(job, block, pieces))
        finally:
            job.end_read()

    # read and prepare -------------------------------------------------------------------------

    def _read_all(self) -> None:
        while True:
            with self._meters.waiting("read"):
                task = self._tasks.get()
            if task is None:
                return
            try:
                if not (task.job.failed or self._stopping):
                    self._read(task)
            except Exception as error:  # the boundary of one slide: its error, not the run's
                task.job.failed = True
                told = as_slide_error(error, task.job.slide.sample_id, "reading its tiles")
                self._inbox.put(_Failed(task.job, told))
            finally:
                task.job.end_read()
                written = self._feed.lane.record()
                for piece in task.pieces:
                    self._batches.fill(piece, written)

    def _read(self, task: _Read) -> None:
        assert task.job.plan is not None
        source = task.job.plan.source
        targets: list[Any] = [target for piece in task.pieces for target in piece.targets()]
        self._feed.lane.wait(piece.batch.free for piece in task.pieces if piece.batch.free is not None)
        try:
            with self._meters.busy("read"):
                data = source.fetch(task.block)
            with self._meters.busy("prepare"):
                source.place(task.block, data, targets)
        except SlideReadError:
            with self._meters.busy("read"):
                task.job.reject(place_singly(source, task.block, targets))

    # encode and collect -----------------------------------------------------------------------

    def _encode_all(self) -> Iterator[SlideOutcome]:
        settled, expected = 0, None
        while settled != expected:
            self._consumer = threading.current_thread()
            outcomes: Iterable[SlideOutcome] = ()
            match self._next():
                case _End(slides):
                    expected = slides
                case _Broken(error):
                    raise error
                case _Planned(job):
                    outcomes = self._planned(job)
                case _Failed(job, error):
                    outcomes = self._fail(job, error)
                case (batch, ticket):
                    outcomes = self._collect(batch, ticket)
                case batch:
                    self._submit(batch)
            for outcome in outcomes:
                settled += 1
                yield outcome

    def _next(self) -> Any:
        """Of what there is to do: features that are there, else the next item of the inbox.

        Waits for the oldest features only when as many batches as may be are in flight.
        """
        with self._meters.waiting("encode"):
            while True:
                if self._flight and (len(self._flight) >= IN_FLIGHT or self._flight[0][1].done.query()):
                    self._flight[0][1].done.synchronize()
                    return self._flight.popleft()
                with contextlib.suppress(queue.Empty):
                    return self._inbox.get(timeout=LOOK_UP_S if self._flight else None)

    def _planned(self, job: _Job) -> Iterator[SlideOutcome]:
        assert job.plan is not None
        road = job.plan.road or job.plan.source.backend
        self._roads[road] += 1
        self._reporter.emit(SlidePlanned(job.slide.sample_id, job.missing, road))
        if not job.missing:
            job.embeddings = torch.empty((0, self._engine.feature_dim), dtype=self._dtype)
            yield self._finish(job)

    def _fail(self, job: _Job, error: Exception) -> Iterator[SlideOutcome]:
        if not job.settled:
            job.settled = True
            self._reporter.emit(SlideFailed(job.slide.sample_id, error))
            yield SlideOutcome(job.slide, error=error)

    def _submit(self, batch: Batch[_Job]) -> None:
        if all(piece.owner.failed for piece in batch.pieces):
            self._batches.release(batch)
            return
        ticket = self._encoding.submit(batch.pixels[: batch.reserved], batch.written)
        self._batches.release(batch, ticket.read)
        self._flight.append((batch, ticket))

    def _collect(self, batch: Batch[_Job], ticket: Ticket) -> Iterator[SlideOutcome]:
        for piece in batch.pieces:
            if piece.owner.failed:
                continue
            with self._meters.busy("collect"):
                features = ticket.features[piece.slots]
                piece.owner.collect(torch.from_numpy(piece.tiles), features, self._dtype)
            self._reporter.emit(TilesEncoded(len(piece.tiles), piece.owner.slide.sample_id))
            if not piece.owner.missing:
                yield from self._complete(piece.owner)
        self._encoding.release(ticket)

    def _land(self) -> None:
        """Wait for what is in flight: its memory is about to go."""
        while self._flight:
            self._flight.popleft()[1].done.synchronize()

    def _complete(self, job: _Job) -> Iterator[SlideOutcome]:
        assert job.plan is not None
        if job.bad and not job.plan.tiling.kept(job.bad).any():
            yield from self._fail(job, damaged(job.plan.tiling, job.bad))
        elif (error := job.not_finite(self._engine)) is not None:
            yield from self._fail(job, error)
        else:
            yield self._finish(job)

    def _finish(self, job: _Job) -> SlideOutcome:
        plan, embeddings = job.plan, job.embeddings
        assert plan is not None and embeddings is not None
        tiling, skipped = plan.tiling, plan.skipped
        if job.bad:
            skipped += tuple(bad_tiles(tiling, job.bad))
            embeddings = embeddings[torch.from_numpy(tiling.kept(job.bad))]
            tiling = tiling.without(job.bad)
        job.settled = True
        self._tiles += len(embeddings)
        self._reporter.emit(SlideFinished(job.slide.sample_id, len(embeddings)))
        embedded = EmbeddedSlide(
            sample_id=job.slide.sample_id,
            tile_embeddings=embeddings,
            slide_embedding=None,
            x=tiling.x,
            y=tiling.y,
            tile_size_lv0=tiling.geometry.tile_size_lv0,
            image_path=job.slide.image_path,
            mask_path=job.slide.mask_path,
            num_tiles=len(embeddings),
            mask_preview_path=plan.mask_preview_path,
            tiling_preview_path=plan.tiling_preview_path,
        )
        return SlideOutcome(
            job.slide,
            embedded=embedded,
            tiling=tiling,
            backend=plan.source.backend,
            skipped=skipped,
            tiles_tar_path=plan.tiles_tar_path,
        )

    def _summary(self, stager: InPlace, embedded: int, failed: int, seconds: float) -> RunSummary:
        workers = {
            "plan": self._planners,
            "read": self._readers,
            "prepare": self._readers,
            "encode": 1,
            "collect": 1,
        }
        if stager.threads:
            workers["stage"] = stager.threads
            self._meters.add_busy("stage", stager.busy_s)
        stations = self._meters.times(workers)
        return RunSummary(
            slides=embedded,
            failed=failed,
            tiles=self._tiles,
            seconds=seconds,
            stations=stations,
            bottleneck=find_bottleneck(stations, seconds),
            roads=dict(self._roads),
        )
