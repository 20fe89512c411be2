"""Where workers are wanted on a Ray cluster, without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from slide2vec import ExecutionOptions
from slide2vec.errors import ConfigError
from slide2vec.scale.ray_cluster import Placement, WorkerResources


def node(name: str, cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    """As `ray.nodes()` has it."""
    resources = {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9}
    return {"NodeID": name, "Alive": alive, "Resources": {k: v for k, v in resources.items() if v}}


CPUS = [node("head", 0), node("a", 4), node("b", 8), node("gone", 8, alive=False)]
GPUS = [node("head", 8), node("a", 64, 8), node("b", 24, 4), node("gone", 8, 8, alive=False)]


def test_one_worker_per_node_has_all_its_cpus() -> None:
    places = Placement(CPUS, None, None)
    assert places.wanted(CPUS) == Counter([WorkerResources(4, node="a"), WorkerResources(8, node="b")])
    assert places.wanted([*CPUS[:2], node("late", 2)]) == Counter(
        [WorkerResources(4, node="a"), WorkerResources(2, node="late")]
    ), "nodes come and go"


def test_one_worker_per_gpu_has_its_share_of_the_cpus() -> None:
    places = Placement(GPUS, None, None)
    assert places.wanted(GPUS) == {WorkerResources(6, 1): 12}, "of the node with fewest CPUs per GPU"
    assert places.wanted([*GPUS, node("late", 128, 8)]) == {WorkerResources(6, 1): 20}
    assert Placement(GPUS, None, 3).wanted(GPUS) == {WorkerResources(6, 1): 3}


def test_gpus_can_be_left_alone() -> None:
    assert Placement(GPUS, None, 0).wanted(GPUS) == Counter(
        [WorkerResources(8, node="head"), WorkerResources(64, node="a"), WorkerResources(24, node="b")]
    )
    assert Placement(GPUS, 2, None).wanted(GPUS) == {WorkerResources(32): 2}


@pytest.mark.parametrize(("workers", "cpus"), [(1, 8), (2, 4), (3, 4), (4, 2), (6, 2), (12, 1), (50, 1)])
def test_so_many_workers_have_as_many_cpus_as_fit(workers: int, cpus: int) -> None:
    assert Placement(CPUS, workers, None).wanted(CPUS) == {WorkerResources(cpus): workers}


def test_gpus_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match="num_gpus=2: the Ray cluster has none"):
        Placement(CPUS, None, 2)


def test_options_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match='ray_address=auto is for executor="ray"'):
        ExecutionOptions(ray_address="auto")
    with pytest.raises(ConfigError, match=r'devices=cuda:0 with executor="ray": say num_gpus='):
        ExecutionOptions(executor="ray", devices=("cuda:0",))
