"""The coordinator: hands slides to workers, one job at a time, and sees it through when workers are lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from slide2vec.errors import OutputError, Slide2VecError, WorkerLostError
from slide2vec.progress import RunSummary, SlidePlanned, TilesEncoded
from slide2vec.scale.fleet import Fleet
from slide2vec.scale.messages import (
    Begin,
    Begun,
    Broken,
    Done,
    Drain,
    Event,
    Finish,
    Finished,
    Job,
    Logged,
    Lost,
    Ready,
    Report,
    Task,
)
from slide2vec.scale.schedule import Schedule

__all__ = ["DEPTH", "Coordinator", "Failed"]

logger = logging.getLogger(__name__)

#: Slides that a worker may have ahead of the one that it reads, to plan them meanwhile.
DEPTH = 4
#: Workers that may be lost one after the other, per worker, while no slide gets through.
HOPELESS = 2


class Failed:
    """A task that no worker has survived."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
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
        summaries: of the workers' streams.
    """

    def __init__(self, fleet: Fleet, job: Job, tasks: Sequence[Task], sizes: Mapping[str, float]) -> None:
        self._fleet, self._job = fleet, job
        self._tasks = {task.name: task for task in tasks}
        self._schedule = Schedule(sizes, depth=DEPTH, expected=fleet.size)
        self._drained: set[str] = set()
        self._planned: set[str] = set()
        self._working: set[str] = set()
        self._begun: set[str] = set()
        self._logged: set[str] = set()
        self._broken: dict[str, Exception] = {}
        self._without_success = 0
        self.lost = 0
        self.summaries: list[RunSummary] = []

    def run(self) -> Iterator[Report | Failed]:
        """Reports of the workers that are not about the coordination itself, and failures.

        Raises:
            Slide2VecError: workers cannot load the model, write, or get any slide through.
        """
        for worker in self._fleet.ready:
            self._begin(worker)
        while not self._schedule.finished:
            if not self._fleet.size:
                raise Slide2VecError("no worker is left: none could be started in the place of those lost")
            for worker, report in self._fleet.receive():
                yield from self._take(worker, report)
        for worker in self._working:
            self._fleet.send(worker, Finish())
        while self._working:
            for worker, report in self._fleet.receive():
                yield from self._take_last(worker, report)

    def _begin(self, worker: str) -> None:
        self._working.add(worker)
        self._fleet.send(worker, Begin(self._job))

    def _take_last(self, worker: str, report: Report) -> Iterator[Report]:
        """Of a worker that has nothing more to do."""
        match report:
            case Finished(summaries):
                self.summaries += summaries
                self._working.discard(worker)
            case Lost():
                self._working.discard(worker)
            case Ready() | Begun() | Broken():
                pass
            case _:
                yield from self._pass_on(report)

    def _take(self, worker: str, report: Report) -> Iterator[Report | Failed]:
        match report:
            case Ready():
                self._begin(worker)
            case Begun():
                self._begun.add(worker)
                self._schedule.join(worker)
                self._feed(worker)
            case Broken(error):
                self._broken[worker] = error
                if isinstance(error, OutputError) or not self._schedule.workers:
                    raise error
            case Lost(reason):
                yield from self._lose(worker, reason)
            case Done(name):
                self._without_success = 0
                self._schedule.done(name)
                self._feed(worker)
            case Event(SlidePlanned(name, tiles, _)):
                self._schedule.planned(name, tiles)
                self._feed(worker)
                if name not in self._planned:
                    yield report
                self._planned.add(name)
            case Event(TilesEncoded(count, name)):
                if name is not None:
                    self._schedule.encoded(name, count)
                self._feed(worker)
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

    def _feed(self, worker: str) -> None:
        """Give a worker what it may have."""
        if worker not in self._schedule.workers:
            return
        while (name := self._schedule.give(worker)) is not None:
            self._drained.discard(worker)
            self._fleet.send(worker, self._tasks[name])
        if worker not in self._drained and self._schedule.drains(worker):
            self._drained.add(worker)
            self._fleet.send(worker, Drain())

    def _lose(self, worker: str, reason: str) -> Iterator[Failed]:
        self.lost += 1
        self._without_success += 1
        self._working.discard(worker)
        broken = self._broken.pop(worker, None)
        reason = f"{type(broken).__name__}: {broken}" if broken else reason
        logger.warning("worker %s is lost: %s", worker, reason)
        if self._without_success > HOPELESS * max(1, self._fleet.size):
            raise broken or Slide2VecError(
                f"{self._without_success} workers were lost one after the other, and no slide got through: "
                f"{reason}"
            )
        if worker not in self._schedule.workers:
            return
        self._begun.discard(worker)
        for name in self._schedule.lost(worker):
            yield Failed(name, reason)
        for other in self._schedule.workers:
            self._feed(other)
