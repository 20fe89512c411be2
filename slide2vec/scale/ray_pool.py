"""Workers on a Ray cluster, one actor per device."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.cpus import VARIABLE
from slide2vec.scale.messages import (
    Broken,
    Command,
    JobFinished,
    JobStarted,
    Load,
    Lost,
    Ready,
    Report,
    StartJob,
)
from slide2vec.scale.ray_cluster import Connection, Placement, WorkerResources
from slide2vec.scale.ray_worker import RayWorker

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.config import ExecutionOptions

__all__ = ["RayPool", "start_ray"]

logger = logging.getLogger(__name__)

WAIT_S = 1.0
#: Seconds between looks at which nodes there are.
LOOK_S = 3.0
#: Seconds, at most, after which a worker is asked for again where some ended before they began a job.
RETRY_S = 300.0
#: Seconds without any worker after which it is said that the run waits for the cluster.
PATIENCE_S = 30.0
#: Threads of an actor: for a receive that waits, and sends meanwhile.
THREADS = 4
#: Characters of what Ray says of a lost actor.
MAX_REASON = 1000


@dataclass(eq=False)
class _Actor:
    name: str
    resources: WorkerResources
    handle: Any
    sent: int = 0
    heard: bool = False
    begun: bool = False
    ready: bool = False


class RayPool:
    """See `WorkerPool`. Nodes may come and go: workers are wanted where `Placement` says.

    Args:
        loader: called in each worker as `loader(device=…)`.
        address: of the cluster.
        workers, num_gpus: see `Placement`.

    Raises:
        ExtraMissingError, ConfigError: see `Connection` and `Placement`.
    """

    keeps_last_words = False  # they wait in the actor until they are fetched, and are lost with it

    def __init__(
        self,
        loader: Callable[..., Any],
        *,
        address: str | None = None,
        workers: int | None = None,
        num_gpus: int | None = None,
    ) -> None:
        self._loader, self._connection = loader, Connection(address)
        self._ray, self._actors = self._connection.ray, dict[str, _Actor]()
        self._end = weakref.finalize(self, _end, self._connection, self._actors)
        self._polls: dict[Any, _Actor] = {}
        self._failures: Counter[WorkerResources] = Counter()
        self._retry_at: dict[WorkerResources, float] = {}
        self._started = self._most = 0
        self._look_at, self._heard_at = 0.0, time.monotonic()
        try:
            self._placement = Placement(self._ray.nodes(), workers, num_gpus)
            self._fill()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The most that there were to be, nodes that are gone included: they may come back."""
        return self._most

    @property
    def ready(self) -> Sequence[str]:
        """See `WorkerPool`."""
        return [actor.name for actor in self._actors.values() if actor.ready]

    def _fill(self) -> None:
        """Ask for the workers that are wanted and not there; Ray starts each when there is room for it."""
        self._look_at = time.monotonic() + LOOK_S
        wanted = self._placement.wanted(self._ray.nodes())
        there = Counter(actor.resources for actor in self._actors.values())
        for resources, count in wanted.items():
            if time.monotonic() >= self._retry_at.get(resources, 0.0):
                for _ in range(count - there[resources]):
                    self._start(resources)
        self._most = max(self._most, wanted.total())

    def _start(self, resources: WorkerResources) -> None:
        self._started += 1
        handle = self._ray.remote(RayWorker).options(**_options(resources)).remote(str(Path.cwd()))
        actor = self._actors[f"#{self._started}"] = _Actor(f"#{self._started}", resources, handle)
        self.send(actor.name, Load(self._loader, "cuda:0" if resources.gpus else "cpu"))
        self._poll(actor)

    def _poll(self, actor: _Actor) -> None:
        self._polls[actor.handle.receive.remote(WAIT_S)] = actor

    def send(self, worker: str, command: Command) -> None:
        """See `WorkerPool`."""
        actor = self._actors.get(worker)
        if actor is None:
            return
        if isinstance(command, StartJob):
            actor.ready = False
        actor.handle.send.remote(actor.sent, self._ray.cloudpickle.dumps(command))
        actor.sent += 1

    def receive(self) -> Sequence[tuple[str, Report]]:
        """See `WorkerPool`."""
        if time.monotonic() >= self._look_at:
            self._fill()
        self._warn_of_waiting()
        if not self._polls:
            time.sleep(WAIT_S)
            return []
        self._ray.wait(list(self._polls), timeout=WAIT_S)
        answered, _ = self._ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        return [(actor.name, report) for each in answered for actor, report in self._answer(each)]

    def _answer(self, poll: Any) -> list[tuple[_Actor, Report]]:
        actor = self._polls.pop(poll)
        try:
            reports: list[Report] = pickle.loads(self._ray.get(poll))
        except self._ray.exceptions.RayError as error:
            return [(actor, self._on_exit(actor, error))]
        actor.heard, self._heard_at = True, time.monotonic()
        if any(isinstance(report, JobStarted) for report in reports):
            actor.begun, self._failures[actor.resources] = True, 0
        actor.ready = actor.ready or any(isinstance(report, Ready | JobFinished) for report in reports)
        if any(isinstance(report, Broken) for report in reports):
            self._ray.kill(actor.handle)
        self._poll(actor)
        return [(actor, report) for report in reports]

    def _on_exit(self, actor: _Actor, error: Exception) -> Lost:
        """Another is asked for at the next look at what there is; later and later where none gets ready."""
        del self._actors[actor.name]
        if not actor.begun:
            self._failures[actor.resources] += 1
            pause = min(RETRY_S, LOOK_S * 2 ** self._failures[actor.resources])
            self._retry_at[actor.resources] = time.monotonic() + pause
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)
        return Lost(" ".join(str(error).split())[:MAX_REASON])

    def _warn_of_waiting(self) -> None:
        now = time.monotonic()
        if any(actor.heard for actor in self._actors.values()):
            self._heard_at = now
        elif now - self._heard_at > PATIENCE_S:
            self._heard_at = float("inf")
            needs = {(actor.resources.cpus, actor.resources.gpus) for actor in self._actors.values()}
            logger.warning(
                "the Ray cluster has no room for a worker (%s), and is waited for: see `ray status` for what "
                "holds it; workers of other models of this process do while these models are there",
                "; ".join(f"{cpus} CPUs, {gpus} GPUs on one node" for cpus, gpus in needs) or "no nodes",
            )

    def load_features(self, features: Any) -> Tensor:
        """See `WorkerPool`."""
        import torch

        return torch.from_numpy(features)

    def close(self) -> None:
        """See `WorkerPool`."""
        self._polls.clear()
        self._end()


def _options(resources: WorkerResources) -> dict[str, Any]:
    """Of an actor, in Ray's words."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment = {VARIABLE: str(max(1, resources.cpus)), "PYTHONPATH": path}
    pinned = resources.node and NodeAffinitySchedulingStrategy(resources.node, soft=False)
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "max_restarts": 0,
        "max_concurrency": THREADS,
        "scheduling_strategy": pinned or "SPREAD",
        "runtime_env": {"env_vars": environment},
    }


def _end(connection: Connection, actors: Mapping[str, _Actor]) -> None:
    if connection.ray.is_initialized():
        for actor in actors.values():
            with suppress(connection.ray.exceptions.RayError):
                connection.ray.kill(actor.handle)
    connection.close()


def start_ray(loader: Callable[..., Any], devices: Sequence[str], execution: ExecutionOptions) -> RayPool:
    """Workers on the nodes of a Ray cluster: for each of its GPUs, or as the options say."""
    workers = None if execution.devices is None else len(execution.devices)
    return RayPool(loader, address=execution.ray_address, workers=workers, num_gpus=execution.num_gpus)
