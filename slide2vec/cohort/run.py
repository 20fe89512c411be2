"""Run a cohort: embed its slides, or only tile them, with everything kept on disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Self

from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.finished import Artifact
from slide2vec.cohort.opened import opened
from slide2vec.cohort.patient_files import PatientPublisher
from slide2vec.cohort.publish import Publisher, Settle, settled_alone
from slide2vec.cohort.results import RunResult
from slide2vec.cohort.resume import take_up
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    StationTime,
    TilesEncoded,
)
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome
from slide2vec.tiling import Tiling

__all__ = ["OnPersisted", "embed_cohort", "tile_cohort"]

#: Slides that may wait to be written while the next ones are encoded.
_UNWRITTEN = 2

OnPersisted = Callable[[Artifact], None]


def embed_cohort(
    embedder: Embedder,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    tilings: Mapping[str, Tiling] | None = None,
    settings: str | None = None,
    on_slide_persisted: OnPersisted | None = None,
) -> RunResult:
    """Embed slides; publish each one's files the moment it is complete. A slide that fails is recorded.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        tilings: of slides whose tiles are known, by sample_id; the others are tiled.
        settings: text to keep as config.yaml.
        on_slide_persisted: called with each new artifact, in a thread of the run.

    Raises:
        OutputLockedError: another run writes into the output directory.
        OutputError: a file cannot be written; finished slides stay.
    """
    cohort = Cohort(config, execution, embedder, tilings)
    with opened(cohort, slides, settings) as (books, log):
        slides = books.slides  # those of the shard, if it is one
        todo = take_up(cohort, books)
        log.write(
            f"{len(todo.slides)} of {len(slides)} slides to embed, {len(todo.tiles)} to aggregate from their "
            "tile embeddings on disk"
        )
        if todo:
            settle: Settle = settled_alone
            if cohort.kind == "patient":
                settle = PatientPublisher(cohort, books, embedder, todo).settle
            publisher = Publisher(cohort, embedder, settle)
            with _Writer(on_slide_persisted) as writer:
                for slide, tiles in todo.tiles:
                    writer.put(partial(publisher.stored_tiles, slide, tiles))
                for slide, embedding in todo.embeddings:
                    writer.put(partial(publisher.stored_embedding, slide, embedding))
                _embed(embedder, todo.slides, cohort, lambda o: writer.put(partial(publisher.outcome, o)))
        return books.result(log.summary)


def _embed(
    embedder: Embedder, slides: Sequence[Slide], cohort: Cohort, put: Callable[[SlideOutcome], None]
) -> None:
    if not slides:
        return
    with closing(embedder.outcomes(slides, cohort.config, cohort.execution, cohort.plan)) as outcomes:
        for outcome in outcomes:
            put(outcome)
            del outcome  # the memory of the last slide, while the next one is waited for


class _Writer:
    """Publishes in a thread of its own, so that the encoder waits neither for the disk nor for what comes
    after its tiles."""

    def __init__(self, on_persisted: OnPersisted | None) -> None:
        self._on_persisted = on_persisted
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._unwritten: deque[Future[None]] = deque()

    def put(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        """Hand over what writes files; waits while `_UNWRITTEN` others are not through yet.

        Raises what an earlier one has raised.
        """
        while len(self._unwritten) >= _UNWRITTEN:
            self._unwritten.popleft().result()
        self._unwritten.append(self._pool.submit(self._run, publish))

    def _run(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        for artifact in publish():
            if self._on_persisted is not None:
                self._on_persisted(artifact)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._unwritten:
                future.result()


def tile_cohort(
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    settings: str | None = None,
) -> RunResult:
    """Tile slides and publish their coordinates, previews and archives; nothing is embedded.

    Args:
        config: with requested_spacing_um and requested_tile_size_px set.
        settings: text to keep as config.yaml.

    Raises:
        OutputLockedError: another run writes into the output directory.
        OutputError: a file cannot be written; finished slides stay.
    """
    cohort = Cohort(config, execution)
    with opened(cohort, slides, settings) as (books, log):
        slides = books.slides  # those of the shard, if it is one
        log.emit(RunStarted(len(slides), "tiling"))
        started = time.perf_counter()
        tiles = failed = 0
        busy = 0.0
        workers = execution.planning_threads()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="plan")
        try:
            jobs = {pool.submit(_tile, cohort, slide): slide for slide in slides}
            for job in as_completed(jobs):
                slide, error = jobs.pop(job), job.exception()
                if error is None:
                    count, backend, took = job.result()
                    tiles, busy = tiles + count, busy + took
                    log.emit(SlidePlanned(slide.sample_id, count, backend))
                    log.emit(TilesEncoded(count))
                    log.emit(SlideFinished(slide.sample_id, count))
                elif isinstance(error, Exception):
                    failed += 1
                    cohort.fail(slide, error, "tiling")
                    log.emit(SlideFailed(slide.sample_id, error))
                else:
                    raise error
        finally:
            pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - started
        station = StationTime("plan", workers, busy, 0.0)
        log.emit(RunFinished(RunSummary(len(slides) - failed, failed, tiles, seconds, (station,), "plan")))
        return books.result(log.summary)


def _tile(cohort: Cohort, slide: Slide) -> tuple[int, str, float]:
    """Tiles of a slide, what read it, and seconds."""
    started = time.perf_counter()
    plan = cohort.plan(slide)
    plan.source.close()
    cohort.tiled(plan)
    return len(plan.tiling), plan.source.backend, time.perf_counter() - started
