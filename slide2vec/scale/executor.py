"""Runs slides through a pool of workers instead of this process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slide2vec.cohort.record_events import RecordEvent, SlideCompleted
from slide2vec.cohort.shards import slide_sizes
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import as_slide_error
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    active_reporter,
    merged,
)
from slide2vec.scale.coordinator import Coordinator, TaskFailed
from slide2vec.scale.messages import Embedded, Job, ProgressMessage, Report, Task
from slide2vec.scale.pool import WorkerPool
from slide2vec.scale.split_slide import SplitSlide, divisible
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome

if TYPE_CHECKING:
    from slide2vec.artifacts.places import Place
    from slide2vec.cohort.embedder import Encoder
    from slide2vec.cohort.sink import Sink

__all__ = ["WorkerExecutor"]

#: How tiles were read by workers that did not live to tell, in `RunSummary.roads`.
LOST = "workers that were lost"


class WorkerExecutor:
    """A model at work in several processes.

    Args:
        model: the one that workers load, for its name and identity.
        start: starts a pool of them.
        kept: where a pool waits for the next call; empty while it works.

    Attributes:
        lost: how many workers have died.
    """

    def __init__(self, model: Encoder, start: Callable[[], WorkerPool], kept: list[WorkerPool]) -> None:
        self._model, self._start, self._kept = model, start, kept
        self.lost = 0

    def embed_into(self, sink: Sink, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        """Embed slides and put each into the sink when it is complete; gives what goes back from there.

        In memory a single one is embedded in parts, on all devices, and aggregated in this process.
        """
        with self._pool() as pool:
            if sink.place is None and len(slides) == 1 and pool.size > 1 and divisible(sink.config):
                yield from sink.put(self._in_parts(pool, slides[0], sink))
                return
            job = self._job(sink, pool.size, place=sink.place)
            tasks = [Task(slide, *sink.known(slide)) for slide in slides]
            by_name = {slide.sample_id: slide for slide in slides}
            for item in self._through(pool, self._run(pool, job, tasks, len(slides)), by_name):
                if isinstance(item, SlideOutcome):
                    yield from sink.put(item)
                else:
                    sink.take_report(item)
                del item  # the memory of the last slide, while the next one is waited for
        if self.lost:
            sink.tidy()

    def _in_parts(self, pool: WorkerPool, slide: Slide, sink: Sink) -> SlideOutcome:
        reporter = active_reporter()
        try:
            with sink.planner() as planner:
                plan = planner.plan(slide)
                with closing(plan.source):
                    parts = SplitSlide(plan, pool.size)
        except Exception as error:  # the boundary of one slide, as in the stream
            reporter.emit(RunStarted(1, self._model.name))
            slide_error = as_slide_error(error, slide.sample_id, "finding its tiles")
            reporter.emit(SlideFailed(slide.sample_id, slide_error))
            return SlideOutcome(slide, error=slide_error)
        drawn = sink.config.preview.updated(save_mask_preview=False, save_tiling_preview=False)
        job = self._job(sink, pool.size, aggregate=False)
        job = replace(job, config=sink.config.updated(preview=drawn))
        by_name = {task.name: task.slide for task in parts.tasks}
        reports = self._run(pool, job, parts.tasks, 1, whole=slide.sample_id)
        found = {
            each.slide.sample_id: each
            for each in self._through(pool, reports, by_name)
            if isinstance(each, SlideOutcome)
        }
        outcome = parts.joined([found[task.name] for task in parts.tasks])
        if outcome.error is not None:
            reporter.emit(SlideFailed(slide.sample_id, outcome.error))
        return outcome

    def _through(
        self, pool: WorkerPool, reports: Iterator[Report | TaskFailed], slides: Mapping[str, Slide]
    ) -> Iterator[SlideOutcome | RecordEvent | SlideCompleted]:
        """What becomes of slides; each outcome once: a worker may be lost between its last report of
        a slide and its end."""
        seen = set()
        for report in reports:
            match report:
                case RecordEvent() | SlideCompleted():
                    yield report
                    continue
                case Embedded(outcome, features):
                    if outcome.embedded is not None:
                        values = pool.load_features(features)
                        outcome = replace(outcome, embedded=replace(outcome.embedded, tile_embeddings=values))
                case TaskFailed(name=name, error=error):
                    outcome = SlideOutcome(slides[name], error=error)
                case _:
                    continue
            if outcome.slide.sample_id not in seen:
                seen.add(outcome.slide.sample_id)
                yield outcome

    def _job(self, sink: Sink, workers: int, *, place: Place | None = None, aggregate: bool = True) -> Job:
        """Each worker takes its one device, and on this machine its share of the disk for staging."""
        own = sink.execution.updated(
            devices=None,
            num_gpus=None,
            executor="local",
            ray_address=None,
            stage_gb=_stage_share(sink.execution, workers),
        )
        identity = self._model.identity(own, sink.config.requested_tile_size_px)
        tiles: Mapping[str, Any] = identity
        while "below" in tiles:
            tiles = tiles["below"]
        if tiles.get("runtime") == "torch":  # whatever engines they would find: a run does not mix
            own = own.updated(engine="torch")
        return Job(sink.config, own, aggregate, identity, place)

    def _run(
        self, pool: WorkerPool, job: Job, tasks: Sequence[Task], slides: int, whole: str | None = None
    ) -> Iterator[Report | TaskFailed]:
        """What workers report; progress events go to the progress reporter.

        Args:
            whole: the slide that the tasks are parts of.
        """
        started, reporter = time.perf_counter(), active_reporter()
        reporter.emit(RunStarted(slides, self._model.name))
        coordinator = Coordinator(pool, job, tasks, _sizes(tasks, job.config))
        ended: dict[str, SlideFinished | SlideFailed] = {}
        for report in coordinator.run():
            match report:
                case ProgressMessage(SlideFinished(name) | SlideFailed(name) as event):
                    if whole is None and name not in ended:
                        reporter.emit(event)
                    ended.setdefault(name, event)
                case ProgressMessage(SlidePlanned()) if whole is not None:
                    pass
                case ProgressMessage(event):
                    reporter.emit(event)
                case TaskFailed(name=name, error=error):
                    ended[name] = SlideFailed(name, error)
                    if whole is None:
                        reporter.emit(ended[name])
                    yield report
                case _:
                    yield report
        self.lost += coordinator.lost
        summary = _counted(merged(coordinator.summaries, time.perf_counter() - started), ended.values())
        if whole is not None:
            summary = replace(summary, slides=1 - bool(summary.failed), failed=int(bool(summary.failed)))
        reporter.emit(RunFinished(summary))

    @contextmanager
    def _pool(self) -> Iterator[WorkerPool]:
        """A pool, kept for the next call unless this one broke off: then its workers have unfinished work."""
        pool = self._kept.pop() if self._kept else self._start()
        try:
            yield pool
        except BaseException:
            pool.close()
            raise
        self._kept.append(pool)


def _counted(summary: RunSummary, ended: Collection[SlideFinished | SlideFailed]) -> RunSummary:
    """The summary of workers' streams, with the slides that they reported: a lost one leaves no summary."""
    finished = [event for event in ended if isinstance(event, SlideFinished)]
    tiles = sum(event.tiles for event in finished)
    roads, unknown = dict(summary.roads), tiles - sum(summary.roads.values())
    if unknown > 0:
        roads[LOST] = unknown
    return replace(summary, slides=len(finished), failed=len(ended) - len(finished), tiles=tiles, roads=roads)


def _stage_share(execution: ExecutionOptions, workers: int) -> float | None:
    """GB that each of several workers may stage; of a cluster's nodes it is not known who shares a disk."""
    if execution.stage_dir is None or execution.executor != "local":
        return execution.stage_gb
    if execution.stage_gb is not None:
        return execution.stage_gb / workers
    try:
        return max(1e-9, shutil.disk_usage(execution.stage_dir).free / 2e9 / workers)
    except OSError:  # the worker reports it
        return None


def _sizes(tasks: Sequence[Task], config: PreprocessingConfig) -> Mapping[str, float]:
    """Tiles where they are known of all, else bytes of the slides' files."""
    if all(task.tiling is not None for task in tasks):
        return {task.name: float(len(task.tiling or ())) for task in tasks}
    return slide_sizes([task.slide for task in tasks], config)
