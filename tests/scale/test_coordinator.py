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
    Begin,
    Begun,
    Broken,
    Done,
    Drain,
    Event,
    Finish,
    Finished,
    Job,
    Lost,
    Ready,
    Report,
    Task,
)
from slide2vec.slides import Slide

JOB = Job(PreprocessingConfig(), ExecutionOptions(), aggregate=True, identity={})


class Scripted:
    """A fleet whose workers say their lines, one at each `receive`; notes what they are told."""

    def __init__(self, size: int, *lines: tuple[str, Report]) -> None:
        self.size, self.ready = size, ("w",)
        self.lines = list(lines)
        self.told: list[tuple[str, Any]] = []

    def send(self, worker: str, command: Any) -> None:
        self.told.append((worker, command))

    def receive(self) -> Sequence[tuple[str, Report]]:
        name, report = self.lines.pop(0)
        self.size -= isinstance(report, Lost)
        return [(name, report)]

    def adopt(self, features: Any) -> Any:
        return features

    def close(self) -> None:
        pass


def coordinated(fleet: Scripted, *names: str) -> Coordinator:
    tasks = [Task(Slide(sample_id=name, image_path=f"{name}.svs")) for name in names]  # type: ignore[arg-type]
    return Coordinator(fleet, JOB, tasks, {name: 10.0 for name in names})  # type: ignore[arg-type]


def test_the_schedule_knows_which_tiles_are_done() -> None:
    fleet = Scripted(
        1,
        ("w", Begun()),
        ("w", Event(SlidePlanned("a", 40, "cucim"))),
        ("w", Event(TilesEncoded(30, "a"))),
        ("w", Done("a")),
        ("w", Finished(())),
    )
    coordinator = coordinated(fleet, "a")
    reports = coordinator.run()
    left = [coordinator._schedule._load("w") for _ in zip(range(2), reports, strict=False)]
    assert left == [40, 10]
    assert [report for report in reports] == []
    kinds = [type(command) for _, command in fleet.told]
    assert kinds == [Begin, Task, Drain, Finish]


def test_a_run_without_any_worker_ends() -> None:
    fleet = Scripted(1, ("w", Begun()), ("w", Lost("killed")))
    with pytest.raises(Slide2VecError, match="no worker is left"):
        list(coordinated(fleet, "a").run())


def test_what_the_first_worker_cannot_do_is_the_error_of_the_run() -> None:
    fleet = Scripted(2, ("w", Broken(ValueError("no weights"))))
    with pytest.raises(ValueError, match="no weights"):
        list(coordinated(fleet, "a").run())


def test_what_a_later_worker_cannot_do_is_only_its_loss() -> None:
    fleet = Scripted(
        2,
        ("w", Begun()),
        ("v", Ready()),
        ("v", Broken(ValueError("other weights"))),
        ("v", Lost("status 0")),
        ("w", Done("a")),
        ("w", Finished(())),
    )
    coordinator = coordinated(fleet, "a")
    assert list(coordinator.run()) == [] and coordinator.lost == 1
