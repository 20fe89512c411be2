"""Who embeds what next, with workers that behave as streams do: batches across slides, flushed when told."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from slide2vec.scale.scheduler import Scheduler, _Work

#: Tiles per batch of the workers here.
BATCH = 64


class Worker:
    """A stream in small: tiles of begun tasks wait until a batch is full, or the schedule says flush."""

    def __init__(self) -> None:
        self.ahead: list[str] = []
        self.buffer: list[tuple[str, int]] = []


class Run:
    """Random events until all is done: workers go on, die and join in any order.

    Args:
        tiles: of each task; a task of 0 tiles is done as soon as it is begun.
        poison: tasks that kill their worker when it comes to them.
        losses: probability that a step kills the worker that it fell on.
        reports: whether encoded tiles are reported.
    """

    def __init__(
        self,
        seed: int,
        tiles: dict[str, int],
        workers: int,
        *,
        depth: int = 3,
        poison: frozenset[str] = frozenset(),
        losses: float = 0.0,
        reports: bool = True,
    ) -> None:
        self.random = random.Random(seed)
        self.tiles, self.poison, self.losses, self.reports = tiles, poison, losses, reports
        noisy = {task: 1000 * count * self.random.uniform(0.3, 3) for task, count in tiles.items()}
        self.schedule = Scheduler(noisy, depth=depth)
        self.workers: dict[str, Worker] = {}
        self.joined = 0
        self.wanted = workers
        self.given: Counter[str] = Counter()
        self.order: list[tuple[str, str]] = []
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.suspects: set[str] = set()

    def go(self) -> Run:
        for _ in range(200 * len(self.tiles) + 1000):
            if self.schedule.finished:
                return self
            if len(self.workers) < self.wanted and (not self.workers or self.random.random() < 0.2):
                self.join()
            else:
                self.step(self.random.choice(sorted(self.workers)))
        raise AssertionError(f"not finished: {self.schedule.waiting}")

    def join(self) -> None:
        name = f"w{self.joined}"
        self.joined += 1
        self.workers[name] = Worker()
        self.schedule.join(name)
        self.ask(name)

    def ask(self, name: str) -> None:
        before = self.schedule.should_flush(name)
        while (task := self.schedule.next_task(name)) is not None:
            assert not before or not self.schedule.assigned(name)[:-1], "flushed although more came"
            self.given[task] += 1
            self.order.append((name, task))
            self.workers[name].ahead.append(task)
            hand = self.schedule.assigned(name)
            if self.suspects.intersection(hand):
                assert hand == (task,), "a suspect is not alone"

    def step(self, name: str) -> None:
        worker = self.workers[name]
        if self.random.random() < self.losses or (worker.ahead[:1] and worker.ahead[0] in self.poison):
            self.lose(name)
        elif worker.ahead:
            self.begin(name, worker.ahead.pop(0))
        elif worker.buffer and self.schedule.should_flush(name):
            self.encode(name, sum(count for _, count in worker.buffer))
        elif worker.buffer:
            self.ask(name)
            assert worker.ahead, "neither flushed nor given anything: it waits for ever"
        else:
            self.ask(name)
            assert worker.ahead or not self.schedule.waiting, "idle although there is work"

    def begin(self, name: str, task: str) -> None:
        worker, count = self.workers[name], self.tiles[task]
        self.schedule.planned(task, count)
        if count:
            worker.buffer.append((task, count))
        else:
            self.finish(task)
        self.ask(name)
        self.encode(name, sum(left for _, left in worker.buffer) // BATCH * BATCH)

    def encode(self, name: str, count: int) -> None:
        worker = self.workers[name]
        while count:
            task, left = worker.buffer.pop(0)
            part = min(left, count)
            count -= part
            if self.reports:
                self.schedule.encoded(task, part)
            if part < left:
                worker.buffer.insert(0, (task, left - part))
            else:
                self.finish(task)
        self.ask(name)

    def finish(self, task: str) -> None:
        self.schedule.done(task)
        self.done.add(task)

    def lose(self, name: str) -> None:
        had = self.schedule.assigned(name)
        del self.workers[name]
        failed = self.schedule.lost(name)
        assert set(failed) == self.suspects.intersection(had)
        self.failed.update(failed)
        self.suspects.update(had)
        for other in sorted(self.workers):
            self.ask(other)


def cohort(seed: int, count: int) -> dict[str, int]:
    """Sizes from nothing to many batches, small ones most."""
    sizes = random.Random(seed)
    return {f"s{number}": int(math.exp(sizes.uniform(-1, 8))) for number in range(count)}


@pytest.mark.parametrize("seed", range(30))
def test_every_task_is_given_once_when_nobody_is_lost(seed: int) -> None:
    tiles = cohort(seed, 80)
    run = Run(seed, tiles, workers=1 + seed % 7, depth=1 + seed % 4, reports=seed % 2 == 0).go()
    assert run.done == set(tiles)
    assert set(run.given.values()) == {1}


@pytest.mark.parametrize("seed", range(60))
def test_losses_cost_no_task_more_than_a_second_run(seed: int) -> None:
    tiles = cohort(seed, 60)
    run = Run(seed, tiles, workers=1 + seed % 6, losses=0.03, reports=seed % 2 == 0).go()
    assert run.done | run.failed == set(tiles) and not run.done & run.failed
    assert max(run.given.values()) <= 2
    assert {task for task, times in run.given.items() if times == 2} <= run.suspects


@pytest.mark.parametrize("seed", range(40))
def test_tasks_that_kill_their_worker_fail_and_no_others(seed: int) -> None:
    tiles = cohort(seed, 60)
    poison = frozenset(random.Random(seed).sample(sorted(tiles), 1 + seed % 5))
    run = Run(seed, tiles, workers=1 + seed % 6, poison=poison).go()
    assert run.failed == poison
    assert run.done == set(tiles) - poison


def test_the_same_events_give_the_same_order() -> None:
    runs = [Run(7, cohort(7, 60), workers=4, losses=0.03).go() for _ in range(2)]
    assert runs[0].order == runs[1].order


def test_largest_first_and_ties_in_the_order_given() -> None:
    scheduler = Scheduler({"a": 1, "b": 5, "c": 0, "d": 1, "e": math.nan, "f": 5}, depth=9)
    assert scheduler.waiting == ("b", "f", "c", "e", "a", "d")  # unknown: the mean, 3


def test_nothing_to_do_is_finished() -> None:
    scheduler = Scheduler({}, depth=1)
    scheduler.join("w")
    assert scheduler.finished and scheduler.next_task("w") is None and scheduler.should_flush("w")


def test_all_sizes_unknown() -> None:
    assert Run(1, {f"s{n}": 100 for n in range(20)}, workers=3).go().done
    scheduler = Scheduler(dict.fromkeys("abc", 0.0), depth=1)
    assert scheduler.waiting == ("a", "b", "c")


def test_a_worker_has_one_ahead_and_more_while_much_is_left() -> None:
    scheduler = Scheduler({f"s{n}": 100.0 for n in range(100)}, depth=4)
    scheduler.join("w")
    given = [scheduler.next_task("w") for _ in range(4)]
    assert given == ["s0", "s1", "s2", "s3"] and scheduler.next_task("w") is None
    scheduler.planned("s0", 10)
    assert scheduler.next_task("w") == "s4" and scheduler.next_task("w") is None

    scheduler = Scheduler({f"s{n}": 100.0 for n in range(4)}, depth=4)
    scheduler.join("w")
    assert scheduler.next_task("w") == "s0" and scheduler.next_task("w") is None
    assert not scheduler.should_flush("w")
    scheduler.planned("s0", 10)
    assert scheduler.next_task("w") == "s1" and scheduler.next_task("w") is None


def test_a_worker_with_more_than_its_share_gets_nothing_ahead() -> None:
    scheduler = Scheduler({"huge": 1000.0} | {f"s{n}": 10.0 for n in range(10)}, depth=4)
    for worker in "ab":
        scheduler.join(worker)
    assert scheduler.next_task("a") == "huge"
    scheduler.planned("huge", 1000)
    assert scheduler.next_task("a") is None and scheduler.should_flush("a")
    scheduler.encoded("huge", 990)
    assert not scheduler.should_flush("a") and scheduler.next_task("a") == "s0"


def test_what_is_ahead_and_the_next_may_be_a_quarter_of_the_share() -> None:
    """The quarter itself included: 2 of 8."""
    scheduler = Scheduler({f"s{n}": 1.0 for n in range(8)}, depth=4)
    scheduler.join("w")
    assert [scheduler.next_task("w") for _ in range(3)] == ["s0", "s1", None]
    # 2 + 2 of 14 / 4; the last ones would be little enough.
    scheduler = Scheduler({"a": 2.0, "b": 2.0} | {f"s{n}": 0.1 for n in range(100)}, depth=4)
    scheduler.join("w")
    assert [scheduler.next_task("w") for _ in range(2)] == ["a", None]
    # 1.8 of (16 * 0.9 + 0.6) / 2 / 4 = 1.875.
    sizes = {f"s{n}": 0.9 for n in range(16)} | {"last": 0.6}
    scheduler = Scheduler(sizes, depth=4, expected=2)
    scheduler.join("w")
    assert [scheduler.next_task("w") for _ in range(3)] == ["s0", "s1", None]


def test_a_worker_with_just_its_share_gets_one_ahead() -> None:
    scheduler = Scheduler({"a": 10.0, "b": 10.0}, depth=1, expected=2)
    scheduler.join("w")
    assert scheduler.next_task("w") == "a"
    scheduler.planned("a", 10)
    assert scheduler.next_task("w") == "b"


def test_what_is_left_is_known_better_and_better() -> None:
    work = _Work({"a": 100.0, "b": 300.0, "c": 0.0, "d": math.inf, "e": math.nan, "f": -1.0})
    assert [work.of(task) for task in "abcdef"] == [100, 300, 200, 200, 200, 200]
    assert work.total == 1200
    work.measure("a", 10)  # so every tenth of a size is a tile
    assert (work.of("a"), work.of("b"), work.total) == (10, 30, 10 + 110)
    work.reduce("a", 4)
    assert (work.of("a"), work.total) == (6, 6 + 110)
    work.measure("a", 12)  # begun again: its worker was lost
    assert (work.of("a"), work.of("b"), work.total) == (12, 30, 12 + 110)
    work.reduce("a", 99)
    assert (work.of("a"), work.total) == (0, 110)
    work.drop("b")
    assert (work.of("b"), work.total) == (0, 80)
    work.measure("c", 7)
    work.drop("c")
    assert work.of("c") == 0 and work.total == pytest.approx(600 * 17 / 300)


def test_of_equal_unknown_sizes_one_tells_of_the_others() -> None:
    work = _Work({"a": 0.0, "b": math.nan})
    assert work.total == 2
    work.measure("a", 10)
    assert (work.of("b"), work.total) == (10, 20)


def test_a_task_that_failed_with_two_workers_is_no_work_any_more() -> None:
    scheduler = Scheduler({"poison": 1000.0} | {f"s{n}": 1.0 for n in range(8)}, depth=4)
    for worker, failed in (("a", []), ("b", ["poison"])):
        scheduler.join(worker)
        assert scheduler.next_task(worker) == "poison" and scheduler.next_task(worker) is None
        assert scheduler.lost(worker) == failed
    scheduler.join("c")
    assert [scheduler.next_task("c") for _ in range(3)] == ["s0", "s1", None]  # a quarter of 8


def test_suspects_go_first_and_others_go_on() -> None:
    scheduler = Scheduler({f"s{n}": 100.0 for n in range(100)}, depth=2)
    for worker in "abcd":
        scheduler.join(worker)
        assert scheduler.next_task(worker) and scheduler.next_task(worker)
    assert scheduler.lost("a") == []
    cleared = [worker for worker in "bcd" if scheduler.should_flush(worker)]
    assert cleared == ["b", "c"], "half of the workers, rounded up"
    for task in scheduler.assigned("b"):
        assert scheduler.next_task("b") is None
        scheduler.planned(task, 10)
        scheduler.done(task)
    assert scheduler.next_task("b") == "s0" and scheduler.next_task("b") is None
    scheduler.planned(scheduler.assigned("d")[0], 10)
    assert scheduler.next_task("d") is not None
    scheduler.join("e")
    assert scheduler.next_task("e") == "s1"
    assert not scheduler.should_flush("c") and scheduler.next_task("c") is None, (
        "no suspect is left: it goes on as before"
    )
    assert scheduler.lost("e") == ["s1"]


def test_a_task_that_never_came_to_a_worker_is_not_blamed_for_its_death() -> None:
    scheduler = Scheduler({"a": 2.0, "b": 1.0}, depth=1)
    for worker, untaken, failed in (("u", ["a"], []), ("v", [], []), ("w", ["a"], []), ("x", [], ["a"])):
        scheduler.join(worker)
        assert scheduler.next_task(worker) == "a" and scheduler.waiting == ("b",)
        assert scheduler.lost(worker, untaken) == failed
        assert scheduler.waiting == (("b",) if failed else ("a", "b"))


def test_last_word_of_a_lost_worker() -> None:
    scheduler = Scheduler({"a": 1.0}, depth=1)
    scheduler.join("w")
    assert scheduler.next_task("w") == "a" and scheduler.lost("w") == []
    assert scheduler.waiting == ("a",) and not scheduler.finished
    scheduler.done("a")
    scheduler.done("a")
    assert scheduler.finished


def test_many_tasks_and_workers_in_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving does not look at all tasks or workers: the work per task stays the same."""
    looked = Counter[str]()
    room = Scheduler._has_room

    def counted(self: Scheduler, worker: str) -> bool:
        looked["room"] += 1
        return room(self, worker)

    monkeypatch.setattr(Scheduler, "_has_room", counted)
    run = Run(3, {f"s{n}": 100 for n in range(3000)}, workers=50).go()
    assert len(run.done) == 3000 and looked["room"] < 20 * 3000


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        Scheduler({}, depth=0)
    scheduler = Scheduler({}, depth=1)
    scheduler.join("w")
    with pytest.raises(ValueError, match="w has joined"):
        scheduler.join("w")


def with_suspects(workers: int, suspects: int) -> Scheduler:
    """A run whose first worker was lost with so many tasks in its hands; the others have two each."""
    scheduler = Scheduler({f"s{n}": 100.0 for n in range(1000)}, depth=max(2, suspects))
    names = [f"w{number}" for number in range(workers + 1)]
    for name in names:
        scheduler.join(name)
    for _ in range(suspects):
        assert scheduler.next_task("w0")
    for name in names[1:]:
        assert scheduler.next_task(name) and scheduler.next_task(name)
    assert scheduler.lost("w0") == [] and len(scheduler.waiting) == 1000 - 2 * workers
    return scheduler


@pytest.mark.parametrize(("workers", "suspects"), [(1, 5), (2, 5), (3, 5), (4, 9), (5, 9), (5, 2), (4, 1)])
def test_however_many_suspects_half_of_the_workers_go_on(workers: int, suspects: int) -> None:
    scheduler = with_suspects(workers, suspects)
    apart = [worker for worker in scheduler.workers if scheduler.should_flush(worker)]
    assert len(apart) == min(suspects, (workers + 1) // 2)
    lost = scheduler.waiting[:suspects]
    for worker in apart:
        assert [each for each in scheduler.workers if scheduler.should_flush(each)] == apart
        for task in scheduler.assigned(worker):
            scheduler.done(task)
        assert scheduler.next_task(worker) in lost
    assert [worker for worker in scheduler.workers if scheduler.should_flush(worker)] == apart
    for worker in set(scheduler.workers) - set(apart):
        scheduler.planned(scheduler.assigned(worker)[0], 1)
        assert scheduler.next_task(worker) not in (None, *lost)


def test_room_is_made_until_the_last_suspect_is_given_or_done() -> None:
    scheduler = with_suspects(workers=2, suspects=2)
    (worker,) = (worker for worker in scheduler.workers if scheduler.should_flush(worker))
    scheduler.done("s0")  # last words of the lost worker
    assert scheduler.should_flush(worker)
    scheduler.done("s1")
    assert not scheduler.should_flush(worker)


def test_nobody_makes_room_where_more_than_half_are_apart_already() -> None:
    scheduler = with_suspects(workers=8, suspects=20)
    apart = [worker for worker in scheduler.workers if scheduler.should_flush(worker)]
    assert len(apart) == 4
    for worker in apart:
        for task in scheduler.assigned(worker):
            scheduler.done(task)
        assert scheduler.next_task(worker)
    for other in [worker for worker in scheduler.workers if worker not in apart][:2]:
        assert scheduler.lost(other) == []
    assert [worker for worker in scheduler.workers if scheduler.should_flush(worker)] == apart


@pytest.mark.parametrize(("workers", "room", "after"), [(6, 3, 3), (5, 3, 2), (3, 2, 1)])
def test_a_worker_with_a_suspect_counts_among_those_apart(workers: int, room: int, after: int) -> None:
    """Another loss makes room on no more than half of those who are left."""
    scheduler = with_suspects(workers, suspects=9)
    first = [worker for worker in scheduler.workers if scheduler.should_flush(worker)]
    assert len(first) == room
    for task in scheduler.assigned(first[0]):
        scheduler.done(task)
    assert scheduler.next_task(first[0]) == "s0"
    other = next(worker for worker in scheduler.workers if worker not in first)
    assert scheduler.lost(other) == []
    apart = [worker for worker in scheduler.workers if scheduler.should_flush(worker)]
    assert len(apart) == after and first[0] in apart
