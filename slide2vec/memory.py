"""The memory that this job may take, and which encoders fit into that of their devices together."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from slide2vec.cpus import control_groups

__all__ = ["SHARE", "Need", "free_bytes", "free_ram", "limit_bytes", "together"]

_Name = TypeVar("_Name", bound=Hashable)

#: Of free memory, that encoders may take: the rest is for tiles that are read, decoded and prepared, and for
#: what is finished and not yet written.
SHARE = 0.7
#: By version of control groups: the limit, what is in use, and what of that is files (which give way).
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True)
class Need:
    """Bytes that an encoder takes on its device."""

    device: str
    bytes: float


def free_ram(
    membership: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
) -> int:
    """Bytes of RAM that this process may still take: what the machine has available (half of all where it
    does not say), or less where a limit on its control group, or one above it, leaves less.

    Formats: "Memory Resource Controller" and "Control Group v2" of the Linux kernel's documentation.

    Args:
        membership, root: see `slide2vec.cpus.control_groups`.
        meminfo: with a line "MemAvailable: … kB".
    """
    left = [_available(meminfo)]
    for version, folder in control_groups("memory", membership, root):
        limit, used, files = _FILES[version]
        try:
            bound, taken = ((folder / name).read_text().strip() for name in (limit, used))
            given_way = re.search(rf"^{files} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:
            continue
        if bound.isdigit() and taken.isdigit():  # "max": none
            left.append(int(bound) - int(taken) + (int(given_way[1]) if given_way else 0))
    return max(0, min(left))


def _available(meminfo: Path) -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_bytes(device: str) -> int:
    """Bytes of a device's memory that this process may still take, what PyTorch holds and does not use
    included."""
    if not device.startswith("cuda"):
        return free_ram()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def limit_bytes(device: str, gigabytes: float | None, held: int = 0, workers: int = 1) -> float:
    """Bytes that encoders on a device may take: those asked for, or `SHARE` of what is free.

    Args:
        held: bytes that some of them take already.
        workers: that share the device, each with all of the encoders.
    """
    return (1e9 * gigabytes if gigabytes else SHARE * (free_bytes(device) + held)) / workers


def together(needs: Mapping[_Name, Need], limits: Mapping[str, float]) -> list[list[_Name]]:
    """Names that fit into the memory of their devices together, in as few groups as are found: the largest
    first, each into the first group that has room. One that fits nowhere has a group of its own.

    Args:
        needs: by name; groups, and the names of each, come in this order.
        limits: bytes, by device.
    """
    groups: list[list[_Name]] = []
    for name in sorted(needs, key=lambda name: -needs[name].bytes):
        room = (group for group in groups if _fit([*group, name], needs, limits))
        group = next(room, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    order = {name: number for number, name in enumerate(needs)}
    return sorted(
        (sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]]
    )


def _fit(names: Collection[_Name], needs: Mapping[_Name, Need], limits: Mapping[str, float]) -> bool:
    taken = dict.fromkeys(limits, 0.0)
    for name in names:
        taken[needs[name].device] += needs[name].bytes
    return all(taken[device] <= limit for device, limit in limits.items())
