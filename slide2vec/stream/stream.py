"""The stream itself: slides in, outcomes out, each the moment it is complete.

plan, read ── `ReadAhead`, in threads: full batches of tiles ───────────────────▶ inbox
caller     ── has batches prepared and encoded, scatters their features ──────▶ outcomes
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
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
from slide2vec.stream.batch_encoder import IN_FLIGHT, BatchEncoder, InFlightBatch
from slide2vec.stream.batches import Batch, Batches
from slide2vec.stream.jobs import (
    EndOfSlides,
    Item,
    JobFailed,
    JobPlanned,
    SlideJob,
    SlideOutcome,
    StreamBroken,
)
from slide2vec.stream.plan_ahead import SlideQueue
from slide2vec.stream.planner import Planner
from slide2vec.stream.read_ahead import ReadAhead
from slide2vec.stream.staging import InPlace
from slide2vec.stream.station_timers import StationTimers, find_bottleneck
from slide2vec.stream.transfer import HOST_TRANSFER, TileTransfer

__all__ = ["Stream"]

#: Tiles of a typical supertile: readers need slots for about two each to stay busy.
TILES_PER_READ = 64
#: Seconds between checks for features that are there, while no batch comes.
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
        transfer: where tiles are kept, and how they get there.
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
        transfer: TileTransfer = HOST_TRANSFER,
    ) -> None:
        self._engine, self._dtype, self._transfer = engine, dtype, transfer
        self._readers, self._planners, self._reporter = readers, planners, reporter
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        itself = weakref.ref(self)  # held by nothing that it holds, it goes, and its memory, when it is done
        self._batches: Batches[SlideJob] = Batches(
            batch_size,
            tile_size_px,
            ahead=max(ahead, 2 * readers * TILES_PER_READ // batch_size),
            ready=self._inbox.put,
            abandoned=lambda: (stream := itself()) is None or not stream._consumer.is_alive(),
            allocate=transfer.allocate,
        )
        self._consumer = threading.current_thread()
        self._timers = StationTimers()
        self._encoder = BatchEncoder(
            engine, preparer, self._timers, batch_size=batch_size, threads=encoder_threads
        )
        self._flight: deque[tuple[Batch[SlideJob], InFlightBatch]] = deque()
        self._decode_paths: Counter[str] = Counter()
        self._tiles = 0

    def run(
        self, slides: Iterable[Slide] | SlideQueue, planner: Planner
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides; yields each as soon as it is complete or has failed.

        Memory does not grow with the number of slides.
        """
        started = time.perf_counter()
        work = self._batches, self._inbox, self._transfer, self._timers
        read_ahead = ReadAhead(slides, planner, *work, readers=self._readers, planners=self._planners)
        read_ahead.start()
        embedded = failed = 0
        try:
            for outcome in self._encode_all():
                embedded, failed = embedded + (outcome.error is None), failed + (outcome.error is not None)
                yield outcome
        finally:
            read_ahead.stop()
            self._drain()
            self._batches.close()
        seconds = time.perf_counter() - started
        self._reporter.emit(RunFinished(self._summary(planner.stager, embedded, failed, seconds)))

    # encode -----------------------------------------------------------------------------------

    def _encode_all(self) -> Iterator[SlideOutcome]:
        reported, expected = 0, None
        while reported != expected:
            self._consumer = threading.current_thread()
            outcomes: Iterable[SlideOutcome] = ()
            match self._next():
                case EndOfSlides(slides):
                    expected = slides
                case StreamBroken(error):
                    raise error
                case JobPlanned(job):
                    outcomes = self._planned(job)
                case JobFailed(job, error):
                    outcomes = self._fail(job, error)
                case (batch, in_flight):
                    outcomes = self._collect(batch, in_flight)
                case batch:
                    self._submit(batch)
            for outcome in outcomes:
                reported += 1
                yield outcome

    def _next(self) -> Any:
        """The next thing to do: features that are there, else the next item of the inbox.

        Waits for the oldest features only when as many batches as may be are in flight.
        """
        with self._timers.waiting("encode"):
            while True:
                if self._flight and (len(self._flight) >= IN_FLIGHT or self._flight[0][1].done.query()):
                    self._flight[0][1].done.synchronize()
                    return self._flight.popleft()
                with contextlib.suppress(queue.Empty):
                    return self._inbox.get(timeout=LOOK_UP_S if self._flight else None)

    def _submit(self, batch: Batch[SlideJob]) -> None:
        if all(piece.owner.failed for piece in batch.pieces):
            self._batches.release(batch)
            return
        in_flight = self._encoder.submit(batch.pixels[: batch.reserved], batch.written)
        self._batches.release(batch, in_flight.read)
        self._flight.append((batch, in_flight))

    def _drain(self) -> None:
        """Wait for the batches in flight: their memory is about to be released."""
        while self._flight:
            self._flight.popleft()[1].done.synchronize()

    # collect ----------------------------------------------------------------------------------

    def _collect(self, batch: Batch[SlideJob], in_flight: InFlightBatch) -> Iterator[SlideOutcome]:
        for piece in batch.pieces:
            job = piece.owner
            if job.failed:
                continue
            with self._timers.busy("collect"):
                job.collect(torch.from_numpy(piece.tiles), in_flight.features[piece.slots], self._dtype)
            self._reporter.emit(TilesEncoded(len(piece.tiles), job.slide.sample_id))
            if not job.missing:
                problem = job.problem(self._engine)
                yield from self._finish(job) if problem is None else self._fail(job, problem)
        self._encoder.release(in_flight)

    def _planned(self, job: SlideJob) -> Iterator[SlideOutcome]:
        assert job.plan is not None
        decode_path = job.plan.decode_path or job.plan.source.backend
        self._reporter.emit(SlidePlanned(job.slide.sample_id, job.missing, decode_path))
        if not job.missing:
            job.embeddings = torch.empty((0, self._engine.feature_dim), dtype=self._dtype)
            yield from self._finish(job)

    def _finish(self, job: SlideJob) -> Iterator[SlideOutcome]:
        outcome = job.outcome()
        assert outcome.embedded is not None
        job.reported = True
        assert job.plan is not None
        self._decode_paths.update(job.plan.decoded_by())
        self._tiles += outcome.embedded.num_tiles
        self._reporter.emit(SlideFinished(job.slide.sample_id, outcome.embedded.num_tiles))
        yield outcome

    def _fail(self, job: SlideJob, error: Exception) -> Iterator[SlideOutcome]:
        if not job.reported:
            job.reported = True
            self._reporter.emit(SlideFailed(job.slide.sample_id, error))
            yield SlideOutcome(job.slide, error=error)

    def _summary(self, stager: InPlace, embedded: int, failed: int, seconds: float) -> RunSummary:
        read_ahead = {"plan": self._planners, "read": self._readers, "prepare": self._readers}
        workers = {**read_ahead, "encode": 1, "collect": 1}
        if stager.threads:
            workers["stage"] = stager.threads
            self._timers.add_busy("stage", stager.busy_s)
        stations = self._timers.times(workers)
        return RunSummary(
            slides=embedded,
            failed=failed,
            tiles=self._tiles,
            seconds=seconds,
            stations=stations,
            bottleneck=find_bottleneck(stations, seconds),
            roads=dict(self._decode_paths),
        )
