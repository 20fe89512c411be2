"""A Ray cluster: the connection to it, and the places for workers on it."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from slide2vec.cpus import job_cpus
from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.installation import add_extra

__all__ = ["Connection", "Placement", "WorkerResources", "import_ray"]

logger = logging.getLogger(__name__)

#: Seconds that a cluster has to take a connection.
ANSWER_S = 10.0
#: Addresses that name no host.
_WORDS = ("auto", "local")


def import_ray() -> ModuleType:
    """Ray.

    Raises:
        ExtraMissingError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ExtraMissingError(
            f'executor="ray" needs Ray, which cannot be imported ({error}): {add_extra("ray")}'
        ) from None
    return ray


class Connection:
    """The connection to Ray: made by the first pool that needs it, closed with the last.

    Args:
        address: None = RAY_ADDRESS, else a new cluster of this machine alone.

    Raises:
        ExtraMissingError: Ray is not installed.
        ConfigError: no cluster answers there, or the process is connected to another one.
    """

    _pools: ClassVar[int] = 0
    _address: ClassVar[str | None] = None
    _printing: ClassVar[Any] = None

    def __init__(self, address: str | None) -> None:
        self.ray, cls = import_ray(), Connection
        if not self.ray.is_initialized():
            _connect(self.ray, address)
            cls._pools, cls._address, cls._printing = 0, address, _silence_stdout(self.ray)
            self._ours = True
        else:
            self._ours = cls._pools > 0
        if self._ours and cls._address != address:
            raise ConfigError(
                f"ray_address={address}: this process works with the Ray cluster "
                f"{cls._address or 'of its own'} already; drop the models that have workers there, or use "
                "another process"
            )
        cls._pools += self._ours

    def close(self) -> None:
        """Once."""
        Connection._pools -= self._ours
        if self._ours and not Connection._pools and self.ray.is_initialized():
            self.ray.shutdown()
            self.ray._private.worker.print_to_stdstream = Connection._printing


def _connect(ray: ModuleType, address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address in (None, "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=job_cpus(), include_dashboard=False, **quiet)
        return
    assert address is not None
    try:
        _check_reachable(address)
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"ray_address={address}: no Ray cluster can be connected to there "
            f"({' '.join(str(error).split())}): start one (ray start --head --port=6379), give the address "
            'that it prints, "auto" where it runs on this machine, or none for a new one of this machine'
        ) from error


def _silence_stdout(ray: ModuleType) -> Any:
    """Log what nodes complain of; Ray prints it to stdout, where results go. Returns what prints it."""
    worker = ray._private.worker
    printing = worker.print_to_stdstream

    def print_or_log(data: Mapping[str, Any], **options: Any) -> None:
        if data.get("pid") == "raylet":
            logger.debug("Ray: %s", "\n".join(data["lines"]))
        else:
            printing(data, **options)

    worker.print_to_stdstream = print_or_log
    return printing


def _check_reachable(address: str) -> None:
    """See that something answers there: Ray itself would try for minutes. Raises OSError, ValueError."""
    if address in _WORDS:
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        raise ValueError("an address is host:port")
    socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


@dataclass(frozen=True)
class WorkerResources:
    """What a worker needs of the cluster.

    Attributes:
        gpus: 1 or 0.
        node: its id; None = any that has room.
    """

    cpus: int
    gpus: int = 0
    node: str | None = None


class Placement:
    """Where workers are wanted: one per GPU; or so many on CPUs; or one per node, with all its CPUs.

    Args:
        nodes: of `ray.nodes()`.
        workers: on CPUs, as many as that; None = on GPUs, else one per node.
        num_gpus: None = all that there are, also of nodes that join later; 0 = none.

    Raises:
        ConfigError: GPUs are asked for and there are none.
    """

    def __init__(self, nodes: Iterable[Mapping[str, Any]], workers: int | None, num_gpus: int | None) -> None:
        there = [_resources(node) for node in nodes if node["Alive"]]
        gpus = [(cpus, gpus) for cpus, gpus in there if gpus]
        if num_gpus and not gpus:
            raise ConfigError(f"num_gpus={num_gpus}: the Ray cluster has none; leave it out to use CPUs")
        self._workers, self._num_gpus = workers, num_gpus
        self._shared: WorkerResources | None = None
        if workers is not None:
            self._shared = WorkerResources(_cpus_of_each([cpus for cpus, _ in there], workers))
        elif gpus and num_gpus != 0:
            self._shared = WorkerResources(min(cpus // count for cpus, count in gpus), 1)

    def wanted(self, nodes: Iterable[Mapping[str, Any]]) -> Counter[WorkerResources]:
        """On the nodes that there are now."""
        there = {node["NodeID"]: _resources(node) for node in nodes if node["Alive"]}
        if self._shared is None:
            return Counter(WorkerResources(cpus, node=node) for node, (cpus, _) in there.items() if cpus)
        if not self._shared.gpus:
            return Counter({self._shared: self._workers or 0})
        return Counter({self._shared: self._num_gpus or sum(gpus for _, gpus in there.values())})


def _resources(node: Mapping[str, Any]) -> tuple[int, int]:
    """CPUs and GPUs."""
    return int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))


def _cpus_of_each(nodes: Iterable[int], workers: int) -> int:
    """The most that so many workers can have, each on one node; 1 where there are too few."""
    nodes = list(nodes)
    for cpus in range(max(nodes, default=1), 1, -1):
        if sum(node // cpus for node in nodes) >= workers:
            return cpus
    return 1
