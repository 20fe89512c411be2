"""Who embeds what next: the largest slides first, to whoever has room for one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from statistics import fmean

__all__ = ["Scheduler"]

#: A worker is given more than one task ahead while all that it has is no more than this part of its share
#: of the work left: what is assigned to it cannot be given to others any more.
PREFETCH_SHARE = 0.25


class Scheduler:
    """Assigns tasks to workers. A pure state machine: it sends nothing, and sees no clock.

    An assigned task is ahead until its worker's stream comes to it (`planned`). A worker gets one ahead, so
    that it never waits, unless it has more to do than the others on average; and up to `depth` while
    that is little against what is left (guided self-scheduling).

    Tasks of a lost worker are suspects: each is assigned once more, to a worker that has
    nothing else and gets nothing else meanwhile, so that a task that kills its worker harms no other.
    They go first; for them up to half of the workers finish what they have and get nothing new.

    Ask `next_task`, until it gives nothing, for a worker that joins and when a task of its is planned,
    encoded in part or done; for every worker when one was lost.

    Args:
        sizes: task -> estimated size, its file's bytes usually; 0 or NaN: unknown, taken as the mean.
        depth: tasks that a worker may have ahead.
        expected: workers that will join, as far as known.

    Raises:
        ValueError: `depth` is less than 1.
    """

    def __init__(self, sizes: Mapping[str, float], *, depth: int, expected: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; a worker needs at least 1 task ahead")
        self._work = _Work(sizes)
        self._depth, self._expected = depth, expected
        self._queue = deque(sorted(sizes, key=self._work.of, reverse=True))
        self._suspects: deque[str] = deque()
        self._assigned: dict[str, dict[str, None]] = {}
        self._holder: dict[str, str] = {}
        self._begun: set[str] = set()
        self._suspected: set[str] = set()
        self._clearing: set[str] = set()

    @property
    def workers(self) -> tuple[str, ...]:
        """Who has joined and is not lost, in that order."""
        return tuple(self._assigned)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Tasks that are assigned to nobody and still to be done, in their order."""
        return (*self._suspects, *self._queue)

    @property
    def finished(self) -> bool:
        """Every task is done, or has failed through `lost`."""
        return not (self._queue or self._suspects or self._holder)

    def assigned(self, worker: str) -> tuple[str, ...]:
        """The worker's tasks, in the order in which it got them."""
        return tuple(self._assigned[worker])

    def join(self, worker: str) -> None:
        """A worker is ready; at any time.

        Raises:
            ValueError: it has joined already.
        """
        if worker in self._assigned:
            raise ValueError(f"worker {worker} has joined already")
        self._assigned[worker] = {}

    def next_task(self, worker: str) -> str | None:
        """The next task for the worker, assigned to it from now on; None: nothing, as things stand."""
        own = self._assigned[worker]
        if self._suspects and not own:
            task = self._suspects.popleft()
        elif self._queue and self._has_room(worker):
            task = self._queue.popleft()
        else:
            return None
        own[task] = None
        self._holder[task] = worker
        return task

    def should_flush(self, worker: str) -> bool:
        """Whether nothing comes to the worker before it has finished what it has.

        It should encode its partial batch then. It may be given more later.
        """
        if not self._assigned[worker]:
            return not (self._queue or self._suspects)
        if not self._queue or self._is_apart(worker):
            return True
        return not (self._ahead(worker) or self._has_room(worker))

    def planned(self, task: str, tiles: int) -> None:
        """The worker's stream has come to the task, which has so many tiles."""
        if task in self._holder:
            self._begun.add(task)
            self._work.measure(task, tiles)

    def encoded(self, task: str, tiles: int) -> None:
        """So many more of its tiles are done. Not needed, but then loads are known better."""
        if task in self._begun:
            self._work.reduce(task, tiles)

    def done(self, task: str) -> None:
        """The task is finished, or failed by itself, for good. Changes nothing for a task that is done
        already."""
        if task in self._holder:
            self._release(task)
        elif task in self._suspects:  # the last word of a lost worker
            self._suspects.remove(task)
        else:
            return
        self._work.drop(task)

    def lost(self, worker: str, untaken: Collection[str] = ()) -> list[str]:
        """The worker is gone.

        Args:
            untaken: tasks that were assigned to it and never came to it: they cannot be why.

        Returns:
            Its tasks that have died with two workers now, and fail. The others come back, as suspects where
            they had come to it.
        """
        tasks = self.assigned(worker)
        for task in tasks:
            self._release(task)
        del self._assigned[worker]
        failed = [task for task in tasks if task in self._suspected and task not in untaken]
        for task in failed:
            self._work.drop(task)
        self._suspected.update(task for task in tasks if task not in untaken)
        back = [task for task in tasks if task not in failed]
        self._suspects += [task for task in back if task in self._suspected]
        self._queue.extendleft(task for task in reversed(back) if task not in self._suspected)
        self._make_room()
        return failed

    def _release(self, task: str) -> None:
        del self._assigned[self._holder.pop(task)][task]
        self._begun.discard(task)

    def _make_room(self) -> None:
        """Choose who gets nothing new, to have room for suspects: those with the least to do."""
        apart = [worker for worker, own in self._assigned.items() if self._suspected.intersection(own)]
        others = [worker for worker in self._assigned if worker not in apart]
        others.sort(key=lambda worker: (self._load(worker), worker))
        most = math.ceil(len(self._assigned) / 2) - len(apart)
        self._clearing = set(others[: max(0, min(most, len(self._suspects)))])

    def _is_apart(self, worker: str) -> bool:
        """The worker has a suspect, or makes room for one that waits."""
        makes_room = self._suspects and worker in self._clearing
        return bool(makes_room) or not self._suspected.isdisjoint(self._assigned[worker])

    def _has_room(self, worker: str) -> bool:
        """For one more of the queue."""
        if not self._assigned[worker]:
            return True
        if self._is_apart(worker):
            return False
        share = self._work.total / max(self._expected, len(self._assigned))
        ahead = self._ahead(worker)
        if not ahead:
            return self._load(worker) <= share
        return (
            ahead < self._depth
            and self._load(worker) + self._work.of(self._queue[0]) <= PREFETCH_SHARE * share
        )

    def _ahead(self, worker: str) -> int:
        return sum(task not in self._begun for task in self._assigned[worker])

    def _load(self, worker: str) -> float:
        return sum(self._work.of(task) for task in self._assigned[worker])


class _Work:
    """What is left to do, in tiles: estimated from sizes by the mean of those tasks whose tiles are known."""

    def __init__(self, sizes: Mapping[str, float]) -> None:
        known = [size for size in sizes.values() if 0 < size < math.inf]
        mean = fmean(known) if known else 1.0
        self._size = {task: size if 0 < size < math.inf else mean for task, size in sizes.items()}
        self._tiles: dict[str, int] = {}
        self._unknown, self._known = math.fsum(self._size.values()), 0
        self._seen_size, self._seen_tiles = 0.0, 0

    @property
    def total(self) -> float:
        return self._known + self._unknown * self._tiles_per_size

    @property
    def _tiles_per_size(self) -> float:
        return self._seen_tiles / self._seen_size if self._seen_size else 1.0

    def of(self, task: str) -> float:
        return self._tiles[task] if task in self._tiles else self._size[task] * self._tiles_per_size

    def measure(self, task: str, tiles: int) -> None:
        """The task has so many tiles, none of them done."""
        if task not in self._tiles:
            self._unknown -= self._size[task]
            self._seen_size += self._size[task]
            self._seen_tiles += tiles
        self._known += tiles - self._tiles.get(task, 0)
        self._tiles[task] = tiles

    def reduce(self, task: str, tiles: int) -> None:
        tiles = min(tiles, self._tiles[task])
        self._tiles[task] -= tiles
        self._known -= tiles

    def drop(self, task: str) -> None:
        """Nothing of the task is left."""
        if task not in self._tiles:
            self._unknown -= self._size[task]
        self._known -= self._tiles.get(task, 0)
        self._tiles[task] = 0
