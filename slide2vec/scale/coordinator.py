"""The coordinator: gives slides to workers, one job at a time, and completes it when workers are lost."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

from slide2vec.errors import OutputError, Slide2VecError, WorkerLostError
from slide2vec.progress import RunSummary, SlidePlanned, TilesEncoded
from slide2vec.scale.messages import (
    ALONE,
    Broken,
    Done,
    EndOfJob,
    Flush,
    Job,
    JobFinished,
    JobStarted,
    Logged,
    Lost,
    ProgressMessage,
    Ready,
    Report,
    StartJob,
    Taken,
    Task,
)
from slide2vec.scale.pool import WorkerPool
from slide2vec.scale.scheduler import Scheduler

__all__ = ["DEPTH", "Coordinator", "TaskFailed"]

logger = logging.getLogger(__name__)

#: Slides that a worker may have ahead of the one that it reads, to plan them meanwhile.
DEPTH = 4
#: Workers that may be lost one after the other, per worker, while no slide gets through. Those that cannot
#: take the place of a lost one do not count while others work: of them it is the pool that gives up.
MAX_CONSECUTIVE_LOSSES = 2


class TaskFailed:
    """A task that no worker has survived, and the encoders that were left to do."""

    def __init__(self, name: str, reason: str, encoders: Collection[str] = (ALONE,)) -> None:
        self.name, self.encoders = name, encoders
        self.error = WorkerLostError(
            f"slide {name}: the worker that embedded it died, and so did the next, which had no other slide "
            f"({reason})"
        )


class Coordinator:
    """One job.

    Args:
        sizes: of the tasks, in any unit: bytes of their files.

    Attributes:
        lost: workers lost.
        summaries: of the workers' streams, each with its encoder.
    """

    def __init__(self, pool: WorkerPool, job: Job, tasks: Sequence[Task], sizes: Mapping[str, float]) -> None:
        self._pool, self._job = pool, job
        self._tasks = {task.name: task for task in tasks}
        self._scheduler = Scheduler(sizes, depth=DEPTH, expected=pool.size)
        self._drained: set[str] = set()
        #: Tiles of each task, by encoder, as far as they have told.
        self._planned: dict[str, dict[str, int]] = {name: {} for name in self._tasks}
        self._working: set[str] = set()
        #: Tasks that were sent to a worker and have not come to it, as far as it has said.
        self._untaken: dict[str, set[str]] = {}
        self._logged: set[str] = set()
        self._broken: dict[str, Exception] = {}
        self._most = pool.size
        self._cannot_begin: Exception | None = None
        self._without_success = 0
        self.lost = 0
        self.summaries: list[tuple[str, RunSummary]] = []

    def run(self) -> Iterator[Report | TaskFailed]:
        """Reports of the workers that are not about the coordination itself, and failures.

        Raises:
            Slide2VecError: workers cannot load the model, write, or get any slide through.
        """
        for worker in self._pool.ready:
            self._begin(worker)
        while not self._scheduler.finished:
            if not self._pool.size:
                raise self._cannot_begin or Slide2VecError(
                    "no worker is left: none could be started in the place of those lost"
                )
            for worker, report in self._pool.receive():
                yield from self._take(worker, report)
        for worker in self._working:
            self._pool.send(worker, EndOfJob())
        while self._working:
            for worker, report in self._pool.receive():
                yield from self._take_last(worker, report)

    def _begin(self, worker: str) -> None:
        self._working.add(worker)
        self._pool.send(worker, StartJob(self._job))

    def _take_last(self, worker: str, report: Report) -> Iterator[Report]:
        """Of a worker that has nothing more to do."""
        match report:
            case JobFinished(summaries):
                self.summaries += summaries
                self._working.discard(worker)
            case Lost():
                self._working.discard(worker)
            case Ready() | JobStarted() | Taken() | Broken():
                pass
            case _:
                yield from self._pass_on(report)

    def _take(self, worker: str, report: Report) -> Iterator[Report | TaskFailed]:
        match report:
            case Ready():
                self._begin(worker)
            case JobStarted():
                self._cannot_begin = None
                self._scheduler.join(worker)
                self._assign_next(worker)
            case Taken(name):
                self._untaken[worker].discard(name)
            case Broken(error):
                self._broken[worker] = error
                if isinstance(error, OutputError) or not self._scheduler.workers:
                    raise error
            case Lost(reason):
                yield from self._lose(worker, reason)
            case Done(name, encoder):
                self._without_success = 0
                self._tasks[name] = self._tasks[name].without(encoder)
                if not self._tasks[name].known:
                    self._scheduler.done(name)
                self._assign_next(worker)
            case ProgressMessage(SlidePlanned(name, tiles, _), encoder):
                known, left = self._planned[name], self._tasks[name].known
                is_first = encoder not in known
                known[encoder] = tiles
                self._scheduler.planned(name, sum(known.get(each, 0) for each in left))
                self._assign_next(worker)
                if is_first:
                    yield report
            case ProgressMessage(TilesEncoded(count, name)):
                if name is not None:
                    self._scheduler.encoded(name, count)
                self._assign_next(worker)
                yield report
            case _:
                yield from self._pass_on(report)

    def _pass_on(self, report: Report) -> Iterator[Report]:
        if isinstance(report, Logged):
            if report.text not in self._logged:
                self._logged.add(report.text)
                logging.getLogger(report.name).log(report.level, "%s", report.text)
        else:
            yield report

    def _assign_next(self, worker: str) -> None:
        """Give a worker what it may have."""
        if worker not in self._scheduler.workers:
            return
        while (name := self._scheduler.next_task(worker)) is not None:
            self._drained.discard(worker)
            self._untaken.setdefault(worker, set()).add(name)
            self._pool.send(worker, self._tasks[name])
        if worker not in self._drained and self._scheduler.should_flush(worker):
            self._drained.add(worker)
            self._pool.send(worker, Flush())

    def _lose(self, worker: str, reason: str) -> Iterator[TaskFailed]:
        self.lost += 1
        self._working.discard(worker)
        self._most = max(self._most, self._pool.size)
        has_worked = worker in self._scheduler.workers
        broken = self._broken.pop(worker, None)
        reason = f"{type(broken).__name__}: {broken}" if broken else reason
        logger.warning("worker %s is lost: %s", worker, reason)
        if not has_worked:
            self._cannot_begin = broken or self._cannot_begin
        self._without_success += has_worked or not self._scheduler.workers
        if self._without_success > MAX_CONSECUTIVE_LOSSES * max(1, self._most):
            raise broken or Slide2VecError(
                f"{self._without_success} workers were lost one after the other, and no slide got through: "
                f"{reason}"
            )
        if not has_worked:
            return
        untaken = self._untaken.pop(worker, set()) if self._pool.keeps_last_words else ()
        for name in self._scheduler.lost(worker, untaken):
            yield TaskFailed(name, reason, self._tasks[name].known)
        for other in self._scheduler.workers:
            self._assign_next(other)
