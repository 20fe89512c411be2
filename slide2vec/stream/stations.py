"""The stream itself: slides in, outcomes out, each the moment it is complete.

plan, read ── `Reading`, in threads: full batches of tiles ───────────────────▶ inbox
caller     ── has batches prepared and encoded, scatters their features ──────▶ outcomes
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch

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
from slide2vec.stream.batches import Batch, Batches
from slide2vec.stream.encoding import IN_FLIGHT, Encoding, Ticket
from slide2vec.stream.feed import HOST_FEED, Feed
from slide2vec.stream.jobs import Broken, End, Failed, Item, Job, Planned, SlideOutcome
from slide2vec.stream.meters import Meters, find_bottleneck
from slide2vec.stream.planner import Planner
from slide2vec.stream.planning import Arrivals
from slide2vec.stream.reading import Reading
from slide2vec.stream.staging import InPlace

__all__ = ["Stream"]

#: Tiles of a typical supertile: readers need slots for about two each to stay busy.
TILES_PER_READ = 64
#: How often it is looked whether features have come, while no batch does.
LOOK_UP_S = 0.001


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
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._batches: Batches[Job] = Batches(
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
        self._flight: deque[tuple[Batch[Job], Ticket]] = deque()
        self._roads: Counter[str] = Counter()
        self._tiles = 0

    def run(
        self, slides: Iterable[Slide] | Arrivals, planner: Planner
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides; yields each as soon as it is complete or has failed.

        Memory does not grow with the number of slides.
        """
        started = time.perf_counter()
        work = self._batches, self._inbox, self._feed, self._meters
        reading = Reading(slides, planner, *work, readers=self._readers, planners=self._planners)
        reading.start()
        embedded = failed = 0
        try:
            for outcome in self._encode_all():
                embedded, failed = embedded + (outcome.error is None), failed + (outcome.error is not None)
                yield outcome
        finally:
            reading.stop()
            self._land()
        seconds = time.perf_counter() - started
        self._reporter.emit(RunFinished(self._summary(planner.stager, embedded, failed, seconds)))

    # encode -----------------------------------------------------------------------------------

    def _encode_all(self) -> Iterator[SlideOutcome]:
        settled, expected = 0, None
        while settled != expected:
            self._consumer = threading.current_thread()
            outcomes: Iterable[SlideOutcome] = ()
            match self._next():
                case End(slides):
                    expected = slides
                case Broken(error):
                    raise error
                case Planned(job):
                    outcomes = self._planned(job)
                case Failed(job, error):
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

    def _submit(self, batch: Batch[Job]) -> None:
        if all(piece.owner.failed for piece in batch.pieces):
            self._batches.release(batch)
            return
        ticket = self._encoding.submit(batch.pixels[: batch.reserved], batch.written)
        self._batches.release(batch, ticket.read)
        self._flight.append((batch, ticket))

    def _land(self) -> None:
        """Wait for what is in flight: its memory is about to go."""
        while self._flight:
            self._flight.popleft()[1].done.synchronize()

    # collect ----------------------------------------------------------------------------------

    def _collect(self, batch: Batch[Job], ticket: Ticket) -> Iterator[SlideOutcome]:
        for piece in batch.pieces:
            job = piece.owner
            if job.failed:
                continue
            with self._meters.busy("collect"):
                job.collect(torch.from_numpy(piece.tiles), ticket.features[piece.slots], self._dtype)
            self._reporter.emit(TilesEncoded(len(piece.tiles), job.slide.sample_id))
            if not job.missing:
                problem = job.problem(self._engine)
                yield from self._finish(job) if problem is None else self._fail(job, problem)
        self._encoding.release(ticket)

    def _planned(self, job: Job) -> Iterator[SlideOutcome]:
        assert job.plan is not None
        road = job.plan.road or job.plan.source.backend
        self._roads[road] += 1
        self._reporter.emit(SlidePlanned(job.slide.sample_id, job.missing, road))
        if not job.missing:
            job.embeddings = torch.empty((0, self._engine.feature_dim), dtype=self._dtype)
            yield from self._finish(job)

    def _finish(self, job: Job) -> Iterator[SlideOutcome]:
        outcome = job.outcome()
        assert outcome.embedded is not None
        job.settled = True
        self._tiles += outcome.embedded.num_tiles
        self._reporter.emit(SlideFinished(job.slide.sample_id, outcome.embedded.num_tiles))
        yield outcome

    def _fail(self, job: Job, error: Exception) -> Iterator[SlideOutcome]:
        if not job.settled:
            job.settled = True
            self._reporter.emit(SlideFailed(job.slide.sample_id, error))
            yield SlideOutcome(job.slide, error=error)

    def _summary(self, stager: InPlace, embedded: int, failed: int, seconds: float) -> RunSummary:
        reading = {"plan": self._planners, "read": self._readers, "prepare": self._readers}
        workers = {**reading, "encode": 1, "collect": 1}
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
