"""Run a cohort: embed its slides, or only tile them, with everything kept on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager

from slide2vec.artifacts import HierarchicalEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.cohort.bill import write_bill
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.disk_sink import DiskSink
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.output_dir import Settings, output_directory
from slide2vec.cohort.patient_writer import PatientWriter
from slide2vec.cohort.record_events import OnSlideCompleted, without_patient
from slide2vec.cohort.recorder import RunRecorder
from slide2vec.cohort.results import RunResult
from slide2vec.cohort.resume import ResumePlan, resume_run
from slide2vec.cohort.sink import Sink
from slide2vec.cohort.slide_writer import OnPersisted
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import EmbedSlidesError, ManifestError, as_slide_error
from slide2vec.manifests import by_class
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
from slide2vec.stream import Planner, SlideOutcome
from slide2vec.tiling import Tiling

__all__ = [
    "OnPersisted",
    "embed_cohort",
    "embed_tiles",
    "embed_what_is_left",
    "left_in_words",
    "sink_of_run",
    "tile_cohort",
]


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
    slides = by_class(slides, config.masks)
    cohort = Cohort(config, execution, embedder, tilings)
    with output_directory(cohort, slides, settings) as (cohort, recorder, log):
        slides = recorder.slides  # those of the shard, if it is one
        todo = resume_run(cohort, recorder)
        log.write(left_in_words(todo, slides))
        embed_what_is_left(cohort, recorder, embedder, todo, embedder.embed_into, on_slide_persisted)
        write_bill(log, log.summary, {cohort.place.name: log.summary})
        return recorder.result(log.summary)


def left_in_words(todo: ResumePlan, slides: Sequence[Slide]) -> str:
    """How much is left of a run, for its log."""
    return (
        f"{len(todo.slides)} of {len(slides)} slides to embed, {len(todo.tiles)} to aggregate from their "
        "tile embeddings on disk"
    )


def embed_what_is_left(
    cohort: Cohort,
    recorder: RunRecorder,
    embedder: Embedder,
    todo: ResumePlan,
    embed_into: Callable[[Sink, Sequence[Slide]], Generator[SlideOutcome, None, None]],
    on_slide_persisted: OnPersisted | None,
) -> None:
    """Do what is left of a run.

    Args:
        embed_into: of the embedder, here or in workers.
    """
    if not todo:
        embedder.confirm_weights()  # that all is finished is said of these weights
        return
    with sink_of_run(cohort, recorder, embedder, todo, on_slide_persisted) as sink:
        if todo.slides:
            with closing(embed_into(sink, todo.slides)) as outcomes:
                for _ in outcomes:  # nothing comes back: it goes onto disk
                    pass


@contextmanager
def sink_of_run(
    cohort: Cohort,
    recorder: RunRecorder,
    embedder: Embedder,
    todo: ResumePlan,
    on_slide_persisted: OnPersisted | None,
) -> Iterator[DiskSink]:
    """Where the slides of a run go; what an earlier one has left to aggregate has been put there."""
    on_slide_completed: OnSlideCompleted = without_patient
    if cohort.kind == "patient":
        on_slide_completed = PatientWriter(cohort, recorder, embedder, todo).on_slide_completed
    with DiskSink(cohort, embedder, on_slide_completed, on_persisted=on_slide_persisted) as sink:
        for slide, tiles in todo.tiles:
            sink.put_tiles(slide, tiles)
        for slide, embedding in todo.embeddings:
            sink.put_embedding(slide, embedding)
        yield sink


def embed_tiles(
    embedder: Embedder,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    tilings: Sequence[Tiling] | Mapping[str, Tiling] | None = None,
    on_slide_persisted: OnPersisted | None = None,
) -> list[TileEmbeddingArtifact] | list[HierarchicalEmbeddingArtifact]:
    """Embed the tiles of slides onto disk; an artifact per slide, in their order.

    Args:
        embedder: tile-level.
        tilings: of the slides, in their order or by sample_id; None = find them.

    Raises:
        EmbedSlidesError: some slides failed; the artifacts of the others are in `.results`.
        ManifestError: slides and tilings do not match.
        OutputError, OutputLockedError, ConfigError: as `embed_cohort`.
    """
    slides = by_class(slides, config.masks)
    result = embed_cohort(
        embedder,
        slides,
        config,
        execution,
        tilings=_by_sample_id(slides, tilings),
        on_slide_persisted=on_slide_persisted,
    )
    artifacts = result.tile_artifacts or result.hierarchical_artifacts
    if result.failed:
        made = {artifact.name: artifact for artifact in artifacts}
        failed = {item.sample_id: item.error for item in result.failed}
        raise EmbedSlidesError.of(failed, [made.get(slide.sample_id) for slide in slides])
    return artifacts


def _by_sample_id(
    slides: Sequence[Slide], tilings: Sequence[Tiling] | Mapping[str, Tiling] | None
) -> Mapping[str, Tiling]:
    if tilings is None or isinstance(tilings, Mapping):
        return tilings or {}
    if len(tilings) != len(slides):
        raise ManifestError(f"{len(slides)} slides and {len(tilings)} tiling_results: give one per slide")
    return {slide.sample_id: tiling for slide, tiling in zip(slides, tilings, strict=True)}


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
    slides = by_class(slides, config.masks)
    cohort = Cohort(config, execution)
    with output_directory(cohort, slides, settings) as (cohort, recorder, log), cohort.planner() as planner:
        slides = recorder.slides  # those of the shard, if it is one
        log.emit(RunStarted(len(slides), "tiling"))
        started = time.perf_counter()
        tiles = failed = 0
        busy = 0.0
        workers = execution.budget("cpu").planning_threads
        pool = ThreadPoolExecutor(workers, thread_name_prefix="plan")
        try:
            jobs = {pool.submit(_tile, cohort, planner, slide): slide for slide in planner.ahead(slides)}
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
                    slide_error = as_slide_error(error, slide.sample_id, "finding its tiles")
                    cohort.fail(slide, slide_error, "tiling")
                    log.emit(SlideFailed(slide.sample_id, slide_error))
                else:
                    raise error
        finally:
            planner.stop()
            pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - started
        station = StationTime("plan", workers, busy, 0.0)
        log.emit(RunFinished(RunSummary(len(slides) - failed, failed, tiles, seconds, (station,), "plan")))
        return recorder.result(log.summary)


def _tile(cohort: Cohort, planner: Planner, slide: Slide) -> tuple[int, str, float]:
    """Tiles of a slide, what read it, and seconds."""
    started = time.perf_counter()
    plan = planner.plan(slide)
    plan.source.close()
    cohort.tiled(plan)
    return len(plan.tiling), plan.source.backend, time.perf_counter() - started
