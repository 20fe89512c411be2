"""Runs slides through a pool of workers instead of this process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from slide2vec.cohort.record_events import RecordEvent, SlideCompleted
from slide2vec.cohort.shards import slide_sizes
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import OutputError, as_slide_error
from slide2vec.progress import (
    ProgressReporter,
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
from slide2vec.scale.messages import (
    ALONE,
    Embedded,
    EncoderBroken,
    Job,
    JobPart,
    Known,
    ProgressMessage,
    Recorded,
    Report,
    Task,
)
from slide2vec.scale.pool import WorkerPool
from slide2vec.scale.split_slide import SplitSlide, divisible
from slide2vec.scale.worker import load_several
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome

if TYPE_CHECKING:
    from slide2vec.artifacts.places import Place
    from slide2vec.cohort.embedder import Encoder
    from slide2vec.cohort.kept_tiles import TileScratch
    from slide2vec.cohort.sink import Sink
    from slide2vec.progress.together import TogetherReporter

__all__ = ["WorkerExecutor", "WorkerPools"]

#: Pools that wait for the next call, by what decides their workers.
WorkerPools: TypeAlias = dict[tuple[object, ...], list[WorkerPool]]

#: How tiles were read by workers that did not live to tell, in `RunSummary.roads`.
LOST = "workers that were lost"


class WorkerExecutor:
    """Models at work in several processes: one, or several side by side in each.

    Args:
        models: those that workers load, by name, for their names and identities.
        loader: builds them anew, as `loader(device=…)`.
        start: starts a pool of workers that call it.
        key: decides the workers, besides the models.
        kept: where a pool waits for the next call; none while it works.

    Attributes:
        lost: how many workers have died.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder],
        loader: Callable[..., Any],
        start: Callable[[Callable[..., Any]], WorkerPool],
        key: tuple[object, ...],
        kept: WorkerPools,
    ) -> None:
        self._models, self._loader, self._start, self.key = models, loader, start, key
        self._kept = kept.setdefault(key, [])
        self.lost = 0

    @classmethod
    def of_several(cls, alone: Mapping[str, WorkerExecutor], kept: WorkerPools) -> Self:
        """The models of several, whose keys are equal, in one pool of workers."""
        first = next(iter(alone.values()))
        loader = partial(load_several, {name: each._loader for name, each in alone.items()})
        models = {name: each._models[ALONE] for name, each in alone.items()}
        return cls(models, loader, first._start, first.key, kept)

    def embed_into(self, sink: Sink, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        """Embed slides and put each into the sink when it is complete; gives what goes back from there.

        In memory a single one is embedded in parts, on all devices, and aggregated in this process.
        """
        with self._pool() as pool:
            if sink.place is None and len(slides) == 1 and pool.size > 1 and divisible(sink.config):
                yield from sink.put(self._in_parts(pool, slides[0], sink))
                return
            job = Job({ALONE: self._part(ALONE, sink, pool.size, place=sink.place)})
            tasks = [Task(slide, {ALONE: Known(*sink.known(slide))}) for slide in slides]
            by_name = {slide.sample_id: slide for slide in slides}
            reporters = {ALONE: active_reporter()}
            reporters[ALONE].emit(RunStarted(len(slides), self._models[ALONE].name))
            for _, item in self._through(pool, self._run(pool, job, tasks, reporters), by_name):
                if isinstance(item, SlideOutcome):
                    yield from sink.put(item)
                else:
                    sink.take_report(item)
                del item  # the memory of the last slide, while the next one is waited for
        if self.lost:
            sink.tidy()

    def embed_together(
        self,
        sinks: Mapping[str, Sink],
        slides: Mapping[str, Sequence[Slide]],
        reporter: TogetherReporter,
        scratch: TileScratch | None = None,
        *,
        bare: Collection[str] = (),
    ) -> dict[str, list[SlideOutcome] | Exception]:
        """Embed slides with several models, each of which is read once for all that want it; and put each
        into the sinks when it is complete.

        Args:
            sinks: of each model, by name, as are its slides.
            reporter: is told of all of them.
            scratch: keeps decoded tiles for models that come later, and has those that were.
            bare: models of which slides come back without their slide embedding.

        Returns:
            What goes back to the caller, of each; or its error, where it has not done all of its slides or
            its sink took no more: that of one does not stop the others.
        """
        found: dict[str, list[SlideOutcome]] = {name: [] for name in sinks}
        broken: dict[str, Exception] = {}
        with self._pool() as pool:
            parts = {
                name: self._part(name, sink, pool.size, place=sink.place, aggregate=name not in bare)
                for name, sink in sinks.items()
            }
            by_name = {slide.sample_id: slide for theirs in slides.values() for slide in theirs}
            known: dict[str, dict[str, Known]] = {name: {} for name in by_name}
            for encoder, theirs in slides.items():
                for slide in theirs:
                    known[slide.sample_id][encoder] = Known(*sinks[encoder].known(slide))
            tasks = [Task(by_name[name], each) for name, each in known.items()]
            reporters = {name: reporter.of(name) for name in sinks}
            reports = self._run(pool, Job(parts, scratch), tasks, reporters)
            for encoder, item in self._through(pool, reports, by_name, broken):
                try:
                    if isinstance(item, SlideOutcome):
                        found[encoder] += sinks[encoder].put(item)
                    else:
                        sinks[encoder].take_report(item)
                except OutputError:  # nobody can write
                    raise
                except Exception as error:
                    broken.setdefault(encoder, error)
                del item
        if self.lost:
            next(iter(sinks.values())).tidy()
        return {name: broken.get(name, outcomes) for name, outcomes in found.items()}

    def _in_parts(self, pool: WorkerPool, slide: Slide, sink: Sink) -> SlideOutcome:
        reporter = active_reporter()
        reporter.emit(RunStarted(1, self._models[ALONE].name))
        try:
            with sink.planner() as planner:
                plan = planner.plan(slide)
                with closing(plan.source):
                    parts = SplitSlide(plan, pool.size)
        except Exception as error:  # the boundary of one slide, as in the stream
            slide_error = as_slide_error(error, slide.sample_id, "finding its tiles")
            reporter.emit(SlideFailed(slide.sample_id, slide_error))
            return SlideOutcome(slide, error=slide_error)
        drawn = sink.config.preview.updated(save_mask_preview=False, save_tiling_preview=False)
        part = self._part(ALONE, sink, pool.size, aggregate=False)
        job = Job({ALONE: replace(part, config=sink.config.updated(preview=drawn))})
        by_name = {task.name: task.slide for task in parts.tasks}
        reports = self._run(pool, job, parts.tasks, {ALONE: reporter}, whole=slide.sample_id)
        found = {
            each.slide.sample_id: each
            for _, each in self._through(pool, reports, by_name)
            if isinstance(each, SlideOutcome)
        }
        outcome = parts.joined([found[task.name] for task in parts.tasks])
        if outcome.error is not None:
            reporter.emit(SlideFailed(slide.sample_id, outcome.error))
        return outcome

    def _through(
        self,
        pool: WorkerPool,
        reports: Iterator[Report | TaskFailed],
        slides: Mapping[str, Slide],
        broken: dict[str, Exception] | None = None,
    ) -> Iterator[tuple[str, SlideOutcome | RecordEvent | SlideCompleted]]:
        """What becomes of slides, with each encoder; each outcome once: a worker may be lost between its last
        report of a slide and its end.

        Args:
            broken: gets the error of encoders that break off.
        """
        seen = set()
        for report in reports:
            outcomes: list[tuple[str, SlideOutcome]] = []
            match report:
                case Recorded(entry, encoder):
                    yield encoder, entry
                case Embedded(outcome, features, encoder):
                    if outcome.embedded is not None:
                        values = pool.load_features(features)
                        outcome = replace(outcome, embedded=replace(outcome.embedded, tile_embeddings=values))
                    outcomes = [(encoder, outcome)]
                case TaskFailed(name=name, error=error, encoders=encoders):
                    outcomes = [(encoder, SlideOutcome(slides[name], error=error)) for encoder in encoders]
                case EncoderBroken(encoder, error) if broken is not None:
                    broken.setdefault(encoder, error)
            for encoder, outcome in outcomes:
                if (encoder, outcome.slide.sample_id) not in seen:
                    seen.add((encoder, outcome.slide.sample_id))
                    yield encoder, outcome
            del outcomes

    def _part(
        self, name: str, sink: Sink, workers: int, *, place: Place | None = None, aggregate: bool = True
    ) -> JobPart:
        """What workers do with a model. Each takes its one device, and on this machine its share of the disk
        for staging."""
        own = sink.execution.updated(
            devices=None,
            num_gpus=None,
            executor="local",
            ray_address=None,
            stage_gb=_stage_share(sink.execution, workers),
        )
        identity = self._models[name].identity(own, sink.config.requested_tile_size_px)
        tiles: Mapping[str, Any] = identity
        while "below" in tiles:
            tiles = tiles["below"]
        if tiles.get("runtime") == "torch":  # whatever engines they would find: a run does not mix
            own = own.updated(engine="torch")
        return JobPart(sink.config, own, aggregate, identity, place)

    def _run(
        self,
        pool: WorkerPool,
        job: Job,
        tasks: Sequence[Task],
        reporters: Mapping[str, ProgressReporter],
        whole: str | None = None,
    ) -> Iterator[Report | TaskFailed]:
        """What workers report; progress events go to the progress reporters.

        Args:
            reporters: by encoder.
            whole: the slide that the tasks are parts of.
        """
        started = time.perf_counter()
        coordinator = Coordinator(pool, job, tasks, _sizes(tasks, next(iter(job.parts.values())).config))
        ended: dict[str, dict[str, SlideFinished | SlideFailed]] = {encoder: {} for encoder in reporters}
        for report in coordinator.run():
            match report:
                case ProgressMessage(SlideFinished(name) | SlideFailed(name) as event, encoder):
                    if whole is None and name not in ended[encoder]:
                        reporters[encoder].emit(event)
                    ended[encoder].setdefault(name, event)
                case ProgressMessage(SlidePlanned()) if whole is not None:
                    pass
                case ProgressMessage(event, encoder):
                    reporters[encoder].emit(event)
                case TaskFailed(name=name, error=error, encoders=encoders):
                    for encoder in encoders:
                        ended[encoder][name] = SlideFailed(name, error)
                        if whole is None:
                            reporters[encoder].emit(ended[encoder][name])
                    yield report
                case _:
                    yield report
        self.lost += coordinator.lost
        seconds = time.perf_counter() - started
        for encoder, reporter in reporters.items():
            streams = merged((each for name, each in coordinator.summaries if name == encoder), seconds)
            summary = _counted(streams, ended[encoder].values())
            if whole is not None:
                summary = replace(summary, slides=1 - bool(summary.failed), failed=int(bool(summary.failed)))
            reporter.emit(RunFinished(summary))

    @contextmanager
    def _pool(self) -> Iterator[WorkerPool]:
        """A pool, kept for the next call unless this one broke off: then its workers have unfinished work."""
        pool = self._kept.pop() if self._kept else self._start(self._loader)
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
    known = {task.name: list(task.known.values()) for task in tasks}
    if all(each.tiling is not None for theirs in known.values() for each in theirs):
        return {name: float(sum(len(each.tiling or ()) for each in theirs)) for name, theirs in known.items()}
    return slide_sizes([task.slide for task in tasks], config)
