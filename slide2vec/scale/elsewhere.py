"""Embed slides in the workers of a fleet."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from slide2vec.cohort.events import Entry, Settled
from slide2vec.cohort.shards import slide_sizes
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import as_slide_error
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    active_reporter,
    merged,
)
from slide2vec.scale.coordinator import Coordinator, Failed
from slide2vec.scale.fleet import Fleet
from slide2vec.scale.messages import Embedded, Event, Job, Report, Task
from slide2vec.scale.parts import SlideInParts, divisible
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome, plan_slide, stager_for
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    from slide2vec.artifacts.places import Place
    from slide2vec.cohort.embedder import Encoder
    from slide2vec.stream.identities import Identities

__all__ = ["Elsewhere"]


class Elsewhere:
    """A model at work in several processes. See `slide2vec.cohort.embedder.Workers`.

    Args:
        model: the one that workers load, for its name and identity.
        start: starts a fleet of them.
        kept: where a fleet waits for the next call; empty while it works.
    """

    def __init__(self, model: Encoder, start: Callable[[], Fleet], kept: list[Fleet]) -> None:
        self._model, self._start, self._kept = model, start, kept
        self.lost = 0

    def outcomes(
        self, slides: Sequence[Slide], config: PreprocessingConfig, execution: ExecutionOptions
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides in memory; each is yielded when it is through.

        A single one is embedded in parts, on all devices; then it has no slide embedding yet.
        """
        with self._fleet() as fleet:
            if len(slides) == 1 and fleet.size > 1 and divisible(config):
                yield self._in_parts(fleet, slides[0], config, execution)
                return
            job = self._job(config, execution, fleet.size, publish=False, aggregate=True)
            reports = self._run(fleet, job, [Task(slide) for slide in slides], len(slides))
            by_name = {slide.sample_id: slide for slide in slides}
            yield from self._outcomes(fleet, reports, by_name)

    def publish(
        self,
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        tilings: Mapping[str, Tiling],
        place: Place,
        files: Identities,
    ) -> Generator[Entry | Settled | SlideOutcome, None, None]:
        """See `Workers`."""
        by_name = {slide.sample_id: slide for slide in slides}
        tasks = [Task(slide, tilings.get(slide.sample_id), files.known(slide.sample_id)) for slide in slides]
        with self._fleet() as fleet:
            job = self._job(config, execution, fleet.size, publish=True, aggregate=True)
            job = replace(job, place=place)
            for report in self._run(fleet, job, tasks, len(slides)):
                match report:
                    case Failed(name=name, error=error):
                        yield SlideOutcome(by_name[name], error=error)
                    case Entry() | Settled():
                        yield report

    def _in_parts(
        self, fleet: Fleet, slide: Slide, config: PreprocessingConfig, execution: ExecutionOptions
    ) -> SlideOutcome:
        reporter = active_reporter()
        try:
            with stager_for(execution) as stager:
                plan = plan_slide(slide, config, execution.output_dir, stager=stager)
                with closing(plan.source):
                    parts = SlideInParts(plan, fleet.size)
        except Exception as error:  # the boundary of one slide, as in the stream
            reporter.emit(RunStarted(1, self._model.name))
            told = as_slide_error(error, slide.sample_id, "finding its tiles")
            reporter.emit(SlideFailed(slide.sample_id, told))
            return SlideOutcome(slide, error=told)
        drawn = config.preview.updated(save_mask_preview=False, save_tiling_preview=False)
        job = self._job(config.updated(preview=drawn), execution, fleet.size, publish=False, aggregate=False)
        by_name = {task.name: task.slide for task in parts.tasks}
        reports = self._run(fleet, job, parts.tasks, 1, whole=slide.sample_id)
        found = {each.slide.sample_id: each for each in self._outcomes(fleet, reports, by_name)}
        outcome = parts.joined([found[task.name] for task in parts.tasks])
        if outcome.error is not None:
            reporter.emit(SlideFailed(slide.sample_id, outcome.error))
        return outcome

    def _outcomes(
        self, fleet: Fleet, reports: Iterator[Report | Failed], slides: Mapping[str, Slide]
    ) -> Iterator[SlideOutcome]:
        """Each once: a worker may be lost between the last that it tells of a slide and its end."""
        seen = set()
        for report in reports:
            match report:
                case Embedded(outcome, features):
                    if outcome.embedded is not None:
                        values = fleet.adopt(features)
                        outcome = replace(outcome, embedded=replace(outcome.embedded, tile_embeddings=values))
                case Failed(name=name, error=error):
                    outcome = SlideOutcome(slides[name], error=error)
                case _:
                    continue
            if outcome.slide.sample_id not in seen:
                seen.add(outcome.slide.sample_id)
                yield outcome

    def _job(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        workers: int,
        *,
        publish: bool,
        aggregate: bool,
    ) -> Job:
        """Each worker takes its one device, and on this machine its share of the disk for staging."""
        own = execution.updated(
            devices=None,
            num_gpus=None,
            executor="local",
            ray_address=None,
            stage_gb=_stage_share(execution, workers),
        )
        identity = self._model.identity(own, config.requested_tile_size_px)
        return Job(config, own, publish, aggregate, identity)

    def _run(
        self, fleet: Fleet, job: Job, tasks: Sequence[Task], slides: int, whole: str | None = None
    ) -> Iterator[Report | Failed]:
        """What workers tell, with what the progress reporter is to know told to it.

        Args:
            whole: the slide that the tasks are parts of.
        """
        started, reporter = time.perf_counter(), active_reporter()
        reporter.emit(RunStarted(slides, self._model.name))
        coordinator = Coordinator(fleet, job, tasks, _sizes(tasks, job.config))
        for report in coordinator.run():
            match report:
                case Event(SlidePlanned() | SlideFinished() | SlideFailed()) if whole is not None:
                    pass
                case Event(event):
                    reporter.emit(event)
                case Failed(name=name, error=error):
                    if whole is None:
                        reporter.emit(SlideFailed(name, error))
                    yield report
                case _:
                    yield report
        self.lost += coordinator.lost
        summary = merged(coordinator.summaries, time.perf_counter() - started)
        if whole is not None:
            summary = replace(summary, slides=1 - bool(summary.failed), failed=int(bool(summary.failed)))
        reporter.emit(RunFinished(summary))

    @contextmanager
    def _fleet(self) -> Iterator[Fleet]:
        """A fleet, kept for the next call unless this one broke off: then its workers have work in hand."""
        fleet = self._kept.pop() if self._kept else self._start()
        try:
            yield fleet
        except BaseException:
            fleet.close()
            raise
        self._kept.append(fleet)


def _stage_share(execution: ExecutionOptions, workers: int) -> float | None:
    """GB that each of several workers may stage; of a cluster's nodes it is not known who shares a disk."""
    if execution.stage_dir is None or execution.executor != "local":
        return execution.stage_gb
    if execution.stage_gb is not None:
        return execution.stage_gb / workers
    try:
        return max(1e-9, shutil.disk_usage(execution.stage_dir).free / 2e9 / workers)
    except OSError:  # the worker will tell
        return None


def _sizes(tasks: Sequence[Task], config: PreprocessingConfig) -> Mapping[str, float]:
    """Tiles where they are known of all, else bytes of the slides' files."""
    if all(task.tiling is not None for task in tasks):
        return {task.name: float(len(task.tiling or ())) for task in tasks}
    return slide_sizes([task.slide for task in tasks], config)
