"""The coordinator, with workers that only say what they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import Slide2VecError
from slide2vec.progress import SlidePlanned, TilesEncoded
from slide2vec.scale.coordinator import Coordinator
from slide2vec.scale.messages import (
    Broken,
    Done,
    EndOfJob,
    Flush,
    Job,
    JobFinished,
    JobStarted,
    Lost,
    ProgressMessage,
    Ready,
    Report,
    StartJob,
    Task,
)
from slide2vec.slides import Slide

JOB = Job(PreprocessingConfig(), ExecutionOptions(), aggregate=True, identity={})


class Scripted:
    """A pool whose workers report in turn, one at each `receive`; notes the commands that they get."""

    def __init__(self, size: int, *lines: tuple[str, Report]) -> None:
        self.size, self.ready = size, ("w",)
        self.lines = list(lines)
        self.take_report: list[tuple[str, Any]] = []

    def send(self, worker: str, command: Any) -> None:
        self.take_report.append((worker, command))

    def receive(self) -> Sequence[tuple[str, Report]]:
        name, report = self.lines.pop(0)
        self.size -= isinstance(report, Lost)
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
