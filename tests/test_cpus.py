"""How many CPUs a job has, and how they are shared; no test depends on the machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slide2vec import cpus
from slide2vec.config import ExecutionOptions
from slide2vec.cpus import Budget, cgroup_cpus, find_cpus, job_cpus, share
from slide2vec.errors import ConfigError


def decided(
    machine: int = 100, affinity: int | None = None, quota: int | None = None, **environ: str
) -> tuple[int, str]:
    found = cpus._decide(environ, machine=machine, affinity=affinity, quota=quota)
    return found.count, found.decided_by


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "12"}, (6, "SLURM_CPUS_PER_TASK")),
        ({"SLURM_CPUS_ON_NODE": "12", "SLURM_JOB_CPUS_PER_NODE": "16"}, (12, "SLURM_CPUS_ON_NODE")),
        ({"SLURM_JOB_CPUS_PER_NODE": "16(x2),8"}, (16, "SLURM_JOB_CPUS_PER_NODE")),
        ({"SLURM_JOB_CPUS_PER_NODE": "16(x2),8", "SLURM_NODEID": "2"}, (8, "SLURM_JOB_CPUS_PER_NODE")),
        (
            {"SLURM_CPUS_ON_NODE": "12", "SLURM_NTASKS_PER_NODE": "4"},
            (3, "SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE"),
        ),
        (
            {"SLURM_CPUS_ON_NODE": "12", "SLURM_TASKS_PER_NODE": "2(x3),1"},
            (6, "SLURM_CPUS_ON_NODE / SLURM_TASKS_PER_NODE"),
        ),
        (
            {"SLURM_CPUS_ON_NODE": "12", "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"},
            (12, "SLURM_CPUS_ON_NODE"),
        ),
        (
            {"SLURM_CPUS_ON_NODE": "12", "SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "3"},
            (4, "SLURM_CPUS_ON_NODE / SLURM_STEP_TASKS_PER_NODE"),
        ),
        (
            {"SLURM_CPUS_ON_NODE": "2", "SLURM_TASKS_PER_NODE": "4"},
            (1, "SLURM_CPUS_ON_NODE / SLURM_TASKS_PER_NODE"),
        ),
        ({"SLURM_CPUS_PER_TASK": "", "SLURM_CPUS_ON_NODE": "nonsense"}, (64, "no more than 64")),
    ],
)
def test_slurm(environ: dict[str, str], expected: tuple[int, str]) -> None:
    count, by = decided(**environ)
    assert count == expected[0] and by.startswith(expected[1])


def test_a_batch_script_has_its_node_for_itself_until_srun() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "12", "SLURM_NTASKS_PER_NODE": "4"}
    assert decided(**job) == (12, "SLURM_CPUS_ON_NODE")
    assert decided(**job, SLURM_STEP_ID="0")[0] == 3


def test_the_least_decides() -> None:
    assert decided(machine=8) == (8, "all of the machine")
    assert decided(machine=8, affinity=8, quota=8) == (8, "all of the machine")
    assert decided(machine=8, affinity=4, quota=6) == (4, "CPU affinity")
    assert decided(machine=8, affinity=4, quota=2, SLURM_CPUS_PER_TASK="6") == (2, "cgroup quota")
    assert decided(machine=96, affinity=80, SLURM_CPUS_PER_TASK="70")[0] == 64


def test_the_variable_overrides() -> None:
    everything = {"machine": 4, "affinity": 2, "quota": 1}
    assert decided(**everything, SLIDE2VEC_CPUS="70", SLURM_CPUS_PER_TASK="2") == (70, "SLIDE2VEC_CPUS")


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5", "²"])
def test_the_variable_has_to_be_a_positive_integer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SLIDE2VEC_CPUS", value)
    with pytest.raises(ConfigError, match=r"SLIDE2VEC_CPUS is .* number of CPUs"):
        job_cpus()


def test_affinity_of_this_process_counts() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from slide2vec.cpus import *; print(job_cpus())"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "SLIDE2VEC_CPUS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    assert done.stdout.strip() == "1"


def control_groups(folder: Path, membership: str, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(membership)
    return cgroup_cpus(folder / "cgroup", folder / "root")


V1 = "5:cpuset:/\n4:cpu,cpuacct:/slurm/job_7/step_0\n3:memory:/slurm\n0::/ignored\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "800000 100000\n"}, 4),
        ("0::/a/b\n", {"c/cpu.max": "100000 100000\n"}, None),
        ("0::/../../other\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/outside\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            V1,
            {
                "cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("2:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, membership: str, files: dict[str, str], expected: int | None) -> None:
    assert control_groups(tmp_path, membership, files) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_cpus(tmp_path / "absent", tmp_path) is None


def test_here() -> None:
    assert find_cpus().count >= 1 and find_cpus().decided_by


def test_budget_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_CPUS", "6")
    assert ExecutionOptions().budget("cpu") == Budget(6, 6, 6)
    assert ExecutionOptions().budget("cuda") == Budget(6, 6, 1)
    assert ExecutionOptions(num_workers=2, num_preprocessing_workers=3).budget("cpu") == Budget(2, 3, 6)
    assert Budget.of("cpu", cpus=4) == Budget(4, 4, 4)
    assert Budget.of("cpu", cpus=4, gflops=0.16) == Budget(4, 4, 1)
    assert Budget.of("cpu", cpus=4, gflops=12) == Budget(4, 4, 4)


@pytest.mark.parametrize(
    ("count", "workers", "expected"), [(5, 3, (2, 2, 1)), (8, 2, (4, 4)), (2, 4, (1, 1, 1, 1)), (1, 1, (1,))]
)
def test_share(count: int, workers: int, expected: tuple[int, ...]) -> None:
    assert share(count, workers) == expected
