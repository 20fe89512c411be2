"""The CPUs of this job, and how one process shares them among the stations of its stream."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from slide2vec.errors import ConfigError

__all__ = [
    "MAX_CPUS",
    "VARIABLE",
    "Budget",
    "JobCpus",
    "cgroup_cpus",
    "control_groups",
    "find_cpus",
    "job_cpus",
    "share",
]

#: Says how many CPUs a process has, whatever else would decide it. Workers get their share through it.
VARIABLE = "SLIDE2VEC_CPUS"
#: More are not taken without being asked for: the reading of one process does not get faster with them.
MAX_CPUS = 64
#: Encoders with less work per tile are slower in several threads than in one: wavelet scattering (0.16) gives
#: 249 tiles/s in one, 198 in two; a ViT-S (12) gains from the second.
SMALL_GFLOPS = 1.0
#: "2(x3)" of "2(x3),1": so many, on so many nodes.
_PER_NODE = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class JobCpus:
    """How many CPUs this process may use, 1 or more, and what decided it, in words."""

    count: int
    decided_by: str


@dataclass(frozen=True)
class Budget:
    """How many threads each station of a stream gets.

    Readers, planners and the encoder each have as many threads as there are CPUs, since a station mostly
    waits while the slowest one works: set apart, CPUs of the faster ones would idle. Only an encoder of small
    operations has one thread, which is faster than several (benchmarks.budget). A reading thread reads one
    block at a time, whatever the reader; so `num_cucim_workers`, threads within a reading thread, is no part
    of it.

    Attributes:
        reading_threads: that read, cut and resize tiles.
        planning_threads: slides segmented and tiled at once.
        encoder_threads: of PyTorch or OpenVINO on the CPU; 1 for a small encoder, or where a GPU encodes.
    """

    reading_threads: int
    planning_threads: int
    encoder_threads: int

    @classmethod
    def of(
        cls,
        device_type: str,
        *,
        num_workers: int | None = None,
        num_preprocessing_workers: int | None = None,
        gflops: float | None = None,
        cpus: int | None = None,
    ) -> Self:
        """The budget of a process whose encoder runs on a device.

        Args:
            device_type: "cpu", "cuda" or "mps".
            num_workers, num_preprocessing_workers: reading and planning threads; None = the CPUs.
            gflops: the encoder's work per tile; None = a lot.
            cpus: None = this job's.

        Raises:
            ConfigError: SLIDE2VEC_CPUS is no positive integer.
        """
        cpus = cpus or job_cpus()
        small = gflops is not None and gflops < SMALL_GFLOPS
        return cls(
            reading_threads=num_workers or cpus,
            planning_threads=num_preprocessing_workers or cpus,
            encoder_threads=cpus if device_type == "cpu" and not small else 1,
        )


def share(cpus: int, workers: int) -> tuple[int, ...]:
    """The CPUs of each of several processes on one machine, at least 1: 5 among 3 are 2, 2 and 1."""
    each, more = divmod(cpus, workers)
    return tuple(max(1, each + (number < more)) for number in range(workers))


def job_cpus() -> int:
    """CPUs that this process may use: `find_cpus().count`."""
    return find_cpus().count


def find_cpus() -> JobCpus:
    """CPUs that this process may use.

    SLIDE2VEC_CPUS says it; else it is the least of the machine's, SLURM's figure, the affinity, the cgroup
    quota and 64.

    Raises:
        ConfigError: SLIDE2VEC_CPUS is no positive integer.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return _decide(
        os.environ,
        machine=os.cpu_count() or 1,
        affinity=len(affinity(0)) if affinity else None,
        quota=cgroup_cpus(),
    )


def _decide(environ: Mapping[str, str], *, machine: int, affinity: int | None, quota: int | None) -> JobCpus:
    """The least of what applies; of equal ones the first."""
    if VARIABLE in environ:
        return JobCpus(_asked(environ[VARIABLE]), VARIABLE)
    found = [JobCpus(machine, "all of the machine")]
    if (slurm := _slurm_cpus(environ)) is not None:
        found.append(slurm)
    if affinity is not None:
        found.append(JobCpus(affinity, "CPU affinity"))
    if quota is not None:
        found.append(JobCpus(quota, "cgroup quota"))
    found.append(JobCpus(MAX_CPUS, f"no more than {MAX_CPUS} unless {VARIABLE} says so"))
    least = min(found, key=lambda each: each.count)
    return JobCpus(max(1, least.count), least.decided_by)


def _asked(value: str) -> int:
    if not (value.strip().isascii() and value.strip().isdigit() and int(value) > 0):
        raise ConfigError(
            f"the environment variable {VARIABLE} is {value!r}: give the number of CPUs to use, such as 8, "
            "or unset it"
        )
    return int(value)


# SLURM ----------------------------------------------------------------------------------------


def _slurm_cpus(environ: Mapping[str, str]) -> JobCpus | None:
    """CPUs of one task: as SLURM says, or those of this node divided by its tasks; None without SLURM.

    The variables are those of the manual pages of sbatch and srun, "OUTPUT ENVIRONMENT VARIABLES".
    """
    if (cpus := _on_this_node("SLURM_CPUS_PER_TASK", environ)) is not None:
        return JobCpus(cpus, "SLURM_CPUS_PER_TASK")
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE"):
        if (cpus := _on_this_node(name, environ)) is not None:
            counted_by, tasks = _slurm_tasks(environ)
            return JobCpus(max(1, cpus // tasks), name + (f" / {counted_by}" if tasks > 1 else ""))
    return None


def _slurm_tasks(environ: Mapping[str, str]) -> tuple[str, int]:
    """The variable that says how many tasks share this node, and how many.

    A batch script (a job, but no step) is alone there until it calls srun, however many tasks were asked for.
    """
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        return "", 1
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if (tasks := _on_this_node(name, environ)) is not None:
            return name, tasks
    return "", 1


def _on_this_node(name: str, environ: Mapping[str, str]) -> int | None:
    """A figure such as "2(x3),1": 2 on each of the first three nodes, 1 on the next; None without one."""
    per_node = [
        int(count)
        for part in environ.get(name, "").split(",")
        if (found := _PER_NODE.fullmatch(part.strip()))
        for count in [found[1]] * int(found[2] or 1)
    ]
    number = environ.get("SLURM_NODEID", "")
    index = int(number) if number.isdigit() else 0
    if not per_node:
        return None
    return per_node[min(index, len(per_node) - 1)] or None


# cgroups --------------------------------------------------------------------------------------


def cgroup_cpus(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Whole CPUs of the least quota on this process's control group and those above it; None without one.

    Formats: "Control Group v2" and "CFS Bandwidth Control" of the Linux kernel's documentation.

    Args:
        membership, root: see `control_groups`.
    """
    read = {1: _quota_v1, 2: _quota_v2}
    found = (read[version](folder) for version, folder in control_groups("cpu", membership, root))
    return min((quota for quota in found if quota is not None), default=None)


def control_groups(
    controller: str, membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of this process's control groups that have a controller, and of those above
    them; a folder may not be there.

    Args:
        membership: lines "number:controllers:/group", the controllers of version 2 empty.
        root: where control groups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mounts, version = [root, root / "unified"], 2
        elif controller in controllers.split(","):
            mounts, version = [root / controller, root / controllers], 1
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        if ".." in inside.parts:  # outside of what a container sees, whose own group is the mount itself
            inside = PurePosixPath()
        for mount in mounts:
            for folder in (inside, *inside.parents):
                yield version, mount / folder


def _quota_v2(folder: Path) -> int | None:
    """Of cpu.max: "quota period" in µs, or "max period"."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return _whole(quota, period)


def _quota_v1(folder: Path) -> int | None:
    """Of cpu.cfs_quota_us, -1 without one, and cpu.cfs_period_us."""
    try:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return _whole(quota, period)


def _whole(quota: str, period: str) -> int | None:
    """CPUs, rounded down but 1 at least: a thread more than the quota has them all wait."""
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return max(1, int(quota) // int(period))
