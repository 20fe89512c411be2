"""The stream itself: slides in, outcomes out, each the moment it is complete.

plan, read ── `ReadAhead`, in threads: full batches of tiles ───────────────────▶ inbox
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
from slide2vec.progress.events import find_bottleneck
from slide2vec.runtime import Engine
from slide2vec.slides import Slide
from slide2vec.stream.batch_encoder import IN_FLIGHT, BatchEncoder, InFlightBatch
from slide2vec.stream.batches import Batch
from slide2vec.stream.jobs import (
    Collected,
    EndOfSlides,
    JobFailed,
    JobPlanned,
    SlideJob,
    SlideOutcome,
    StreamBroken,
)
from slide2vec.stream.plan_ahead import SlideQueue
from slide2vec.stream.planner import Planner
from slide2vec.stream.read_ahead import Outlet, ReadAhead, Wanted
from slide2vec.stream.staging import InPlace
from slide2vec.stream.station_timers import StationTimers
from slide2vec.stream.transfer import HOST_TRANSFER, TileTransfer

__all__ = ["Stream"]

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

    _read_ahead: ReadAhead

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
        self._engine, self._dtype, self._reporter = engine, dtype, reporter
        self._wanted = Wanted(batch_size, tile_size_px, readers, planners, ahead, transfer)
        self._outlet, self._timers = Outlet(), StationTimers()
        self._encoder = BatchEncoder(
            engine, preparer, self._timers, batch_size=batch_size, threads=encoder_threads
        )
        self._flight: deque[tuple[Batch[SlideJob], InFlightBatch]] = deque()
        #: Slides that are planned, neither complete nor failed.
        self._slides: dict[SlideJob, Collected] = {}
        self._decode_paths: Counter[str] = Counter()
        self._tiles = 0

    def run(
        self, slides: Iterable[Slide] | SlideQueue, planner: Planner
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides; yields each as soon as it is complete or has failed.

        Memory does not grow with the number of slides.
        """
        started = time.perf_counter()
        if planner.share is None:
            self._read_ahead = ReadAhead(slides, planner, self._wanted, [self._outlet])
            self._read_ahead.start()
        else:
            self._read_ahead = planner.share.join(planner, self._wanted, self._outlet)
        embedded = failed = 0
        try:
            for outcome in self._encode_all():
                embedded, failed = embedded + (outcome.error is None), failed + (outcome.error is not None)
                yield outcome
        finally:
            try:
                self._drain()
            finally:
                is_last = self._read_ahead.leave(self._outlet)
        fed_by = self._read_ahead.timers if is_last else None
        seconds = time.perf_counter() - started
        self._reporter.emit(RunFinished(self._summary(planner.stager, fed_by, embedded, failed, seconds)))

    # encode -----------------------------------------------------------------------------------

    def _encode_all(self) -> Iterator[SlideOutcome]:
        reported, expected = 0, None
        while reported != expected:
            self._outlet.consumer = threading.current_thread()
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
                    return self._outlet.inbox.get(timeout=LOOK_UP_S if self._flight else None)

    def _submit(self, batch: Batch[SlideJob]) -> None:
        if all(piece.owner.failed or piece.owner not in self._slides for piece in batch.pieces):
            self._read_ahead.release(self._outlet, batch)
            return
        in_flight = self._encoder.submit(batch.pixels[: batch.reserved], batch.written)
        self._read_ahead.release(self._outlet, batch, in_flight.read)
        self._flight.append((batch, in_flight))

    def _drain(self) -> None:
        """Wait for the batches in flight: their memory is about to be released."""
        while self._flight:
            self._flight.popleft()[1].done.synchronize()

    # collect ----------------------------------------------------------------------------------

    def _collect(self, batch: Batch[SlideJob], in_flight: InFlightBatch) -> Iterator[SlideOutcome]:
        for piece in batch.pieces:
            slide = self._slides.get(piece.owner)
            if slide is None or piece.owner.failed:
                continue
            with self._timers.busy("collect"):
                slide.collect(torch.from_numpy(piece.tiles), in_flight.features[piece.slots])
            self._reporter.emit(TilesEncoded(len(piece.tiles), piece.owner.slide.sample_id))
            if not slide.missing:
                problem = slide.problem()
                yield from self._finish(slide) if problem is None else self._fail(piece.owner, problem)
        self._encoder.release(in_flight)

    def _planned(self, job: SlideJob) -> Iterator[SlideOutcome]:
        self._slides[job] = slide = Collected(job, self._engine, self._dtype)
        decode_path = slide.plan.decode_path or slide.plan.source.backend
        self._reporter.emit(SlidePlanned(job.slide.sample_id, slide.missing, decode_path))
        if not slide.missing:
            yield from self._finish(slide)

    def _finish(self, slide: Collected) -> Iterator[SlideOutcome]:
        del self._slides[slide.job]
        outcome = slide.outcome()
        assert outcome.embedded is not None
        self._decode_paths.update(slide.plan.decoded_by())
        self._tiles += outcome.embedded.num_tiles
        self._reporter.emit(SlideFinished(outcome.slide.sample_id, outcome.embedded.num_tiles))
        del slide  # the memory of its embeddings, while the next one is waited for
        yield outcome

    def _fail(self, job: SlideJob, error: Exception) -> Iterator[SlideOutcome]:
        """Once, however many of its blocks cannot be read."""
        if job.plan is None or self._slides.pop(job, None) is not None:
            self._reporter.emit(SlideFailed(job.slide.sample_id, error))
            yield SlideOutcome(job.slide, error=error)

    def _summary(
        self, stager: InPlace, fed_by: StationTimers | None, embedded: int, failed: int, seconds: float
    ) -> RunSummary:
        """What feeds several streams is told by the last of them only."""
        readers, planners = (self._wanted.readers, self._wanted.planners) if fed_by else (0, 0)
        workers = {"plan": planners, "read": readers, "prepare": readers, "encode": 1, "collect": 1}
        if fed_by is not None:
            self._timers.add(fed_by)
        if fed_by is not None and stager.threads:
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
