"""Run a cohort: embed its slides, or only tile them, with everything kept on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial

from slide2vec.cohort.books import Books
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.events import Entry, Settle, Settled, settled_alone
from slide2vec.cohort.opened import Settings, opened, remove_all_partial
from slide2vec.cohort.patient_files import PatientPublisher
from slide2vec.cohort.publish import Publisher
from slide2vec.cohort.results import RunResult
from slide2vec.cohort.resume import take_up
from slide2vec.cohort.writer import OnPersisted, Writer
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import as_slide_error
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    StationTime,
    TilesEncoded,
    active_reporter,
)
from slide2vec.slides import Slide
from slide2vec.stream import InPlace, SlideOutcome, stager_for
from slide2vec.tiling import Tiling

__all__ = ["OnPersisted", "embed_cohort", "tile_cohort"]


def embed_cohort(
    embedder: Embedder,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    tilings: Mapping[str, Tiling] | None = None,
    settings: Settings | None = None,
    on_slide_persisted: OnPersisted | None = None,
) -> RunResult:
    """Embed slides; publish each one's files the moment it is complete. A slide that fails is recorded.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        tilings: of slides whose tiles are known, by sample_id; the others are tiled.
        settings: gives the text to keep as config.yaml, of the configuration as it is used.
        on_slide_persisted: called with each new artifact, in a thread of the run.

    Raises:
        ConfigError: the output directory holds other tiles than those that were asked for.
        OutputLockedError: another run writes into the output directory.
        OutputError: a file cannot be written; finished slides stay.
    """
    cohort = Cohort(config, execution, embedder, tilings)
    with opened(cohort, slides, settings) as (cohort, books, log):
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
            with Writer(on_slide_persisted) as writer:
                for slide, tiles in todo.tiles:
                    writer.put(partial(publisher.stored_tiles, slide, tiles))
                for slide, embedding in todo.embeddings:
                    writer.put(partial(publisher.stored_embedding, slide, embedding))
                _embed(todo.slides, cohort, embedder, books, publisher, settle, writer)
        return books.result(log.summary)


def _embed(
    slides: Sequence[Slide],
    cohort: Cohort,
    embedder: Embedder,
    books: Books,
    publisher: Publisher,
    settle: Settle,
    writer: Writer,
) -> None:
    """From tiles on, here or in workers."""
    if not slides:
        return
    workers = embedder.workers(cohort.execution)
    if workers is not None:
        publish = workers.publish(
            slides, cohort.config, cohort.execution, cohort.tilings, cohort.place, cohort.files
        )
        with closing(publish) as told:
            for item in told:
                _take(item, books, publisher, settle, writer)
        if workers.lost and cohort.execution.shard is None:  # what they left half-written
            remove_all_partial(cohort.place.root)
        return
    active_reporter().emit(RunStarted(len(slides), embedder.name))
    with closing(embedder.outcomes(slides, cohort.config, cohort.execution, cohort.plan)) as outcomes:
        for outcome in outcomes:
            writer.put(partial(publisher.outcome, outcome))
            del outcome  # the memory of the last slide, while the next one is waited for


def _take(
    told: Entry | Settled | SlideOutcome,
    books: Books,
    publisher: Publisher,
    settle: Settle,
    writer: Writer,
) -> None:
    """What a worker has told of a slide, or the outcome of one that no worker has survived."""
    match told:
        case Entry():
            told.enter(books)
            if told.what == "add":
                writer.put(partial(iter, told.values[-1:]))
        case Settled():
            writer.put(partial(settle, told))
        case SlideOutcome():
            writer.put(partial(publisher.outcome, told))


def tile_cohort(
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    settings: Settings | None = None,
) -> RunResult:
    """Tile slides and publish their coordinates, previews and archives; nothing is embedded.

    Args:
        config: with requested_spacing_um and requested_tile_size_px set.
        settings: gives the text to keep as config.yaml, of the configuration as it is used.

    Raises:
        ConfigError: the output directory holds other tiles than those that were asked for.
        OutputLockedError: another run writes into the output directory.
        OutputError: a file cannot be written; finished slides stay.
    """
    cohort = Cohort(config, execution)
    with opened(cohort, slides, settings) as (cohort, books, log), stager_for(execution) as stager:
        slides = books.slides  # those of the shard, if it is one
        log.emit(RunStarted(len(slides), "tiling"))
        started = time.perf_counter()
        tiles = failed = 0
        busy = 0.0
        workers = execution.budget("cpu").planning_threads
        pool = ThreadPoolExecutor(workers, thread_name_prefix="plan")
        try:
            jobs = {pool.submit(_tile, cohort, slide, stager): slide for slide in stager.ahead(slides)}
            for job in as_completed(jobs):
                slide, error = jobs.pop(job), job.exception()
                if error is None:
                    count, backend, took = job.result()
                    tiles, busy = tiles + count, busy + took
                    log.emit(SlidePlanned(slide.sample_id, count, backend))
                    log.emit(TilesEncoded(count, slide.sample_id))
                    log.emit(SlideFinished(slide.sample_id, count))
                elif isinstance(error, Exception):
                    failed += 1
                    told = as_slide_error(error, slide.sample_id, "finding its tiles")
                    cohort.fail(slide, told, "tiling")
                    log.emit(SlideFailed(slide.sample_id, told))
                else:
                    raise error
        finally:
            stager.stop()
            pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - started
        station = StationTime("plan", workers, busy, 0.0)
        log.emit(RunFinished(RunSummary(len(slides) - failed, failed, tiles, seconds, (station,), "plan")))
        return books.result(log.summary)


def _tile(cohort: Cohort, slide: Slide, stager: InPlace) -> tuple[int, str, float]:
    """Tiles of a slide, what read it, and seconds."""
    started = time.perf_counter()
    plan = cohort.plan(slide, stager)
    plan.source.close()
    cohort.tiled(plan)
    return len(plan.tiling), plan.source.backend, time.perf_counter() - started
