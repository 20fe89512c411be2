"""Electricity of a run: what the counters of its GPUs and of this machine's processors add meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Energy", "EnergyMeter"]

logger = logging.getLogger(__name__)

#: Where Linux has the counters of processors, of Intel and AMD (its documentation: power/powercap).
POWERCAP = Path("/sys/class/powercap")
#: Seconds between two looks at a counter. The smallest that wrap do so after 65,532 J: 131 s of 500 W.
EVERY_S = 20.0
MICROJOULES_PER_WH = 3_600_000_000


@dataclass(frozen=True)
class Energy:
    """What was measured.

    Attributes:
        watt_hours: None: nothing could be measured.
        measured_by: by what, and what is left out: "NVML (1 GPU), CPU not measured"; "" where nothing was.
    """

    watt_hours: float | None = None
    measured_by: str = ""


class EnergyMeter:
    """Measures from when it is made until `stop`, all that happens on this machine's processors and on the
    GPUs named: other processes there count, too.

    GPUs need nvidia-ml-py (extra cuda); processors need counters that may be read (by root only on most
    machines). What cannot be measured is logged, and is no error.

    Args:
        devices: that the run uses, as PyTorch names them; without any, nothing is measured.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        gpus = sorted({name for name in devices if not name.startswith("cpu")})
        self._gpus = _Source("GPU", _gpu_counters, gpus) if gpus else None
        self._cpu = _Source("CPU", _processor_counters) if devices else None
        self._sources = [source for source in (self._gpus, self._cpu) if source is not None]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
        if any(source.counters for source in self._sources):
            self._thread.start()

    def _watch(self) -> None:
        """Look at counters before they wrap a second time."""
        while not self._done.wait(EVERY_S):
            for source in self._sources:
                source.look()

    def stop(self) -> Energy:
        """What was used since the start."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        for source in self._sources:
            source.look()
        measured = [source for source in self._sources if source.counters]
        if not measured:
            return Energy()
        used = sum(counter.microjoules for source in measured for counter in source.counters)
        missing = [f"{source.what} not measured" for source in self._sources if source not in measured]
        by = [source.in_words for source in measured]
        return Energy(used / MICROJOULES_PER_WH, ", ".join(by + missing))


class _Counter:
    """One that grows.

    Args:
        read: gives microjoules.
        wraps_at: microjoules at which it begins again with 0; 0: never.
    """

    def __init__(self, name: str, read: Callable[[], int], wraps_at: int = 0) -> None:
        self.name, self._read, self._wraps_at = name, read, wraps_at
        self._last, self.microjoules = read(), 0

    def look(self) -> None:
        """Raises OSError where it has been reset."""
        now = self._read()
        if now < self._last and not self._wraps_at:
            raise OSError(f"the counter of {self.name} was reset")
        self.microjoules += now - self._last + (self._wraps_at if now < self._last else 0)
        self._last = now


class _Source:
    """Counters of one kind, all of which can be read, or none."""

    def __init__(self, what: str, find: Callable[..., Iterator[_Counter]], *of: Any) -> None:
        self.what = what
        self.counters: list[_Counter] = []
        try:
            self.counters = list(find(*of))
        except Exception as error:  # a driver's error of any class must not cost a run
            self._give_up(error)

    @property
    def in_words(self) -> str:
        names = list(dict.fromkeys(counter.name for counter in self.counters))
        if self.what == "CPU":
            return f"RAPL ({', '.join(names)})"
        return f"NVML ({len(names)} GPU{'' if len(names) == 1 else 's'})"

    def look(self) -> None:
        try:
            for counter in self.counters:
                counter.look()
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.counters = []
        logger.info("the energy of the %s is not measured: %s: %s", self.what, type(error).__name__, error)


def _processor_counters() -> Iterator[_Counter]:
    """Of packages (sockets), and of memory where that has a counter. "core" and "uncore" are parts of a
    package, which is a part of "psys"."""
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            wraps_at = int((zone / "max_energy_range_uj").read_text())
            yield _Counter(name, lambda path=zone / "energy_uj": int(path.read_text()), wraps_at)  # type: ignore[misc]


def _gpu_counters(devices: Sequence[str]) -> Iterator[_Counter]:
    """By the ids of GPUs: NVML counts others than PyTorch where CUDA_VISIBLE_DEVICES says so."""
    import pynvml as nvml
    import torch

    nvml.nvmlInit()
    for device in devices:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        yield _Counter(device, lambda gpu=handle: 1000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)))  # type: ignore[misc]
