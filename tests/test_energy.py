"""Energy: counters of a processor and of GPUs that are made up, and those that cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slide2vec import energy
from slide2vec.energy import EnergyMeter
from slide2vec.progress import (
    RunFinished,
    RunStarted,
    RunSummary,
    activate_progress_reporter,
    active_reporter,
    metered,
)

WH = 3_600_000_000  # microjoules


class Zones:
    """Counters as Linux shows those of processors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, zone: str, name: str, microjoules: int, wraps_at: int = 262_143_328_850) -> None:
        folder = self.folder / zone
        folder.mkdir(exist_ok=True)
        for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", wraps_at)):
            (folder / "written").write_text(f"{value}\n")
            (folder / "written").replace(folder / file)  # somebody may be reading it


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zones:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return Zones(tmp_path)


class Gpus:
    """NVML and PyTorch with GPUs of our own; NVML counts them the other way round."""

    class NVMLError(Exception):
        """Not one of the errors that Python has."""

    def __init__(self) -> None:
        self.millijoules: dict[str, int] = {"GPU-a": 1000, "GPU-b": 5_000_000}
        self.is_supported = True

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.is_supported:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    made = Gpus()
    monkeypatch.setitem(sys.modules, "pynvml", made)  # type: ignore[arg-type]
    uuids = {"cuda:0": "b", "cuda:1": "a", "cuda:2": "MIG"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device])
    )
    return made


def test_packages_and_memory_count_and_parts_of_them_do_not(zones: Zones) -> None:
    counted = {"intel-rapl:0": "package-0", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1"}
    others = {"intel-rapl:0:0": "core", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0"}
    for zone, name in (counted | others).items():
        zones.set(zone, name, 1000)
    meter = EnergyMeter(["cpu"])
    for zone, name in (counted | others).items():
        zones.set(zone, name, 1000 + 2 * WH)
    found = meter.stop()
    assert found.watt_hours == 6.0 and found.measured_by == "RAPL (package-0, dram, package-1)"


def test_a_counter_wraps_while_it_is_watched(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "EVERY_S", 1e6)  # we look, in its place
    zones.set("intel-rapl:0", "package-0", 9 * WH, wraps_at=10 * WH)
    meter = EnergyMeter(["cpu"])
    for now in (2, 8, 1):  # 3, then 6, then 3 Wh more
        zones.set("intel-rapl:0", "package-0", now * WH, wraps_at=10 * WH)
        for source in meter._sources:
            source.look()
    assert meter.stop().watt_hours == 12.0


def test_counters_are_looked_at_meanwhile(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "EVERY_S", 0.001)
    zones.set("intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(["cpu"])
    (source,) = meter._sources
    (counter,) = source.counters
    zones.set("intel-rapl:0", "package-0", 5)
    for _ in range(1000):
        if counter.microjoules != 5:
            meter._thread.join(0.01)
    assert counter.microjoules == 5
    assert meter._thread.is_alive()
    meter.stop()
    assert not meter._thread.is_alive()


@pytest.mark.parametrize("what", ["nobody", "none", "nonsense"])
def test_what_cannot_be_read_is_not_measured(
    zones: Zones, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what != "none":
        zones.set("intel-rapl:0", "package-0", 0)
        zones.set("intel-rapl:1", "package-1", 0)
        (zones.folder / "intel-rapl:1/energy_uj").write_text("?")
    if what == "nobody":  # by root only; tests may run as root
        real = Path.read_text

        def refused(self: Path, *args: Any, **options: Any) -> str:
            if self.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **options)

        monkeypatch.setattr(Path, "read_text", refused)
    found = EnergyMeter(["cpu"]).stop()
    assert found.watt_hours is None and found.measured_by == ""


def test_a_counter_that_goes_away_is_not_measured(zones: Zones) -> None:
    zones.set("intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(["cpu"])
    (zones.folder / "intel-rapl:0/energy_uj").unlink()
    assert meter.stop().watt_hours is None


def test_only_the_gpus_used_count(zones: Zones, gpus: Gpus) -> None:
    zones.set("intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(["cuda:1", "cpu"])
    gpus.millijoules["GPU-a"] += 2 * WH // 1000
    gpus.millijoules["GPU-b"] += 7 * WH // 1000
    zones.set("intel-rapl:0", "package-0", WH)
    found = meter.stop()
    assert found.watt_hours == 3.0 and found.measured_by == "NVML (1 GPU), RAPL (package-0)"
    both = EnergyMeter(["cuda:0", "cuda:1", "cuda:0"])
    for name in gpus.millijoules:
        gpus.millijoules[name] += WH // 1000
    found = both.stop()
    assert found.watt_hours == 2.0 and found.measured_by == "NVML (2 GPUs), RAPL (package-0)"


def test_what_is_missing_is_said(zones: Zones, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnergyMeter(["cuda:0"]).stop().measured_by == "NVML (1 GPU), CPU not measured"
    zones.set("intel-rapl:0", "package-0", 0)
    assert EnergyMeter(["cuda:2"]).stop().measured_by == "RAPL (package-0), GPU not measured"
    gpus.is_supported = False
    assert EnergyMeter(["cuda:0"]).stop().measured_by == "RAPL (package-0), GPU not measured"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(["cuda:0"]).stop().measured_by == "RAPL (package-0), GPU not measured"
    assert EnergyMeter([]).stop().measured_by == "", "of other machines"


def test_a_counter_of_a_gpu_that_is_reset_is_not_measured(zones: Zones, gpus: Gpus) -> None:
    meter = EnergyMeter(["cuda:0"])
    gpus.millijoules["GPU-b"] = 0
    assert meter.stop().watt_hours is None


def test_a_run_is_measured_from_its_start_to_its_end(zones: Zones) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.events: list[Any] = []

        def emit(self, event: Any) -> None:
            self.events.append(event)

        def close(self) -> None:
            pass

    zones.set("intel-rapl:0", "package-0", 0)
    recorder = Recorder()
    with activate_progress_reporter(recorder), metered(lambda: ("cpu",)):
        zones.set("intel-rapl:0", "package-0", 5 * WH)
        active_reporter().emit(RunStarted(1, "scattering"))
        zones.set("intel-rapl:0", "package-0", 7 * WH)
        active_reporter().emit(RunFinished(RunSummary(1, 0, 10, 1.0, (), "encode")))
    assert recorder.events[0] == RunStarted(1, "scattering")
    summary = recorder.events[1].summary
    assert (summary.watt_hours, summary.measured_by, summary.tiles) == (2.0, "RAPL (package-0)", 10)
