"""The coordinator, with workers that only say what they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import Slide2VecError
from slide2vec.progress import SlidePlanned, TilesEncoded
from slide2vec.scale.coordinator import Coordinator, TaskFailed
from slide2vec.scale.messages import (
    ALONE,
    Broken,
    Done,
    EndOfJob,
    Flush,
    Job,
    JobFinished,
    JobPart,
    JobStarted,
    Lost,
    ProgressMessage,
    Ready,
    Report,
    StartJob,
    Taken,
    Task,
)
from slide2vec.slides import Slide

JOB = Job({ALONE: JobPart(PreprocessingConfig(), ExecutionOptions(), aggregate=True, identity={})})


class Scripted:
    """A pool whose workers report in turn, one at each `receive`; notes the commands that they get."""

    keeps_last_words = True
    replaced: Sequence[str] = ()  # workers whose place another takes

    def __init__(self, size: int, *lines: tuple[str, Report]) -> None:
        self.size, self.ready = size, ("w",)
        self.lines = list(lines)
        self.take_report: list[tuple[str, Any]] = []

    def send(self, worker: str, command: Any) -> None:
        self.take_report.append((worker, command))

    def receive(self) -> Sequence[tuple[str, Report]]:
        name, report = self.lines.pop(0)
        self.size -= isinstance(report, Lost) and name not in self.replaced
        return [(name, report)]

    def load_features(self, features: Any) -> Any:
        return features

    def close(self) -> None:
        pass


def coordinated(pool: Scripted, *names: str) -> Coordinator:
    tasks = [Task(Slide(sample_id=name, image_path=f"{name}.svs")) for name in names]  # type: ignore[arg-type]
    return Coordinator(pool, JOB, tasks, {name: 10.0 for name in names})  # type: ignore[arg-type]


def test_the_schedule_knows_which_tiles_are_done() -> None:
    pool = Scripted(
        1,
        ("w", JobStarted()),
        ("w", ProgressMessage(SlidePlanned("a", 40, "cucim"))),
        ("w", ProgressMessage(TilesEncoded(30, "a"))),
        ("w", Done("a")),
        ("w", JobFinished(())),
    )
    coordinator = coordinated(pool, "a")
    reports = coordinator.run()
    left = [coordinator._scheduler._load("w") for _ in zip(range(2), reports, strict=False)]
    assert left == [40, 10]
    assert [report for report in reports] == []
    kinds = [type(command) for _, command in pool.take_report]
    assert kinds == [StartJob, Task, Flush, EndOfJob]


def test_a_run_without_any_worker_ends() -> None:
    pool = Scripted(1, ("w", JobStarted()), ("w", Lost("killed")))
    with pytest.raises(Slide2VecError, match="no worker is left"):
        list(coordinated(pool, "a").run())


def test_what_the_first_worker_cannot_do_is_the_error_of_the_run() -> None:
    pool = Scripted(2, ("w", Broken(ValueError("no weights"))))
    with pytest.raises(ValueError, match="no weights"):
        list(coordinated(pool, "a").run())


def test_what_a_later_worker_cannot_do_is_only_its_loss() -> None:
    pool = Scripted(
        2,
        ("w", JobStarted()),
        ("v", Ready()),
        ("v", Broken(ValueError("other weights"))),
        ("v", Lost("status 0")),
        ("w", Done("a")),
        ("w", JobFinished(())),
    )
    coordinator = coordinated(pool, "a")
    assert list(coordinator.run()) == [] and coordinator.lost == 1


@pytest.mark.parametrize("taken", [True, False])
def test_two_workers_that_die_at_one_moment_do_not_condemn_a_slide(taken: bool) -> None:
    """The second was dead before the slide of the first came to it."""
    pool = Scripted(
        2,
        *(("w", JobStarted()), ("w", Taken("a")), ("v", Ready()), ("v", JobStarted()), ("w", Lost("killed"))),
        *([("v", Taken("a"))] if taken else []),
        *(("v", Lost("killed")), ("u", Ready()), ("u", JobStarted()), ("u", Taken("a")), ("u", Done("a"))),
        ("u", JobFinished(())),
    )
    pool.replaced = ("w", "v")
    failed = [report for report in coordinated(pool, "a").run() if isinstance(report, TaskFailed)]
    assert bool(failed) == taken


def killed(replaced: Sequence[str], *lines: tuple[str, Report]) -> Coordinator:
    """Of two workers, "v" is killed, and those that are to take its place cannot load; "w" has a slide."""
    pool = Scripted(
        2,
        ("w", JobStarted()),
        ("w", ProgressMessage(SlidePlanned("a", 40, "cucim"))),
        ("v", Ready()),
        ("v", JobStarted()),
        ("v", Lost("killed")),
        *lines,
    )
    pool.replaced = ("v", *replaced)
    return coordinated(pool, "a")


@pytest.mark.parametrize("tells", [True, False])
def test_who_cannot_take_the_place_of_a_lost_worker_ends_no_other(tells: bool) -> None:
    failed_loads: list[tuple[str, Report]] = []
    for name in ("v2", "v3", "v4", "v5", "v6", "v7"):
        if tells:
            failed_loads.append((name, Broken(ValueError("out of memory"))))
        failed_loads.append((name, Lost("killed")))
    names = ("v2", "v3", "v4", "v5", "v6")
    coordinator = killed(names, *failed_loads, ("w", Done("a")), ("w", JobFinished(())))
    (planned,) = coordinator.run()
    assert isinstance(planned, ProgressMessage) and coordinator.lost == 7


def test_without_any_worker_the_run_ends_with_the_error_of_the_load() -> None:
    lines = [("v2", Broken(ValueError("out of memory"))), ("v2", Lost("status 0")), ("w", Lost("killed"))]
    with pytest.raises(ValueError, match="out of memory"):
        list(killed((), *lines).run())


def test_a_slow_load_is_waited_for_while_another_is_killed() -> None:
    lines = [(f"v{n}", Lost("killed")) for n in range(3)]
    pool = Scripted(2, *lines, ("w", JobStarted()), ("w", Done("a")), ("w", JobFinished(())))
    pool.replaced = ("v0", "v1")
    assert list(coordinated(pool, "a").run()) == []


def test_workers_that_are_lost_at_every_load_end_the_run() -> None:
    pool = Scripted(2, *((f"v{n}", Lost("killed")) for n in range(9)))
    pool.ready, pool.replaced = (), tuple(f"v{n}" for n in range(9))
    with pytest.raises(Slide2VecError, match="no slide got through"):
        list(coordinated(pool, "a").run())
