"""Workers on this machine, one process per device."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.cpus import VARIABLE, job_cpus, share
from slide2vec.scale.messages import Command, JobFinished, JobStarted, Load, Lost, Ready, Report, StartJob
from slide2vec.scale.shared_tensors import load_features, spool_folder

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.config import ExecutionOptions

__all__ = ["LocalPool", "start_local"]

WAIT_S = 1.0
#: Processes that may end before they begin a job, one after the other; then their device is given up.
ATTEMPTS = 3
#: Seconds that a process has to end by itself.
ENDING_S = 5.0


@dataclass(eq=False)
class _Process:
    name: str
    device: str
    cpus: int
    connection: Connection[Any, Any]
    process: subprocess.Popen[bytes]
    attempt: int
    begun: bool = False
    ready: bool = False


class LocalPool:
    """See `WorkerPool`.

    Args:
        devices: of the workers: "cuda:1", "cpu"; one process each.
        loader: called in each as `loader(device=…)`.
        cpus: that each may use, in the order of the devices.
    """

    keeps_last_words = True  # its socket holds them

    def __init__(self, devices: Sequence[str], loader: Callable[..., Any], cpus: Sequence[int]) -> None:
        self._loader, self._folder = loader, spool_folder()
        self._processes: dict[str, _Process] = {}
        self._started = 0
        self._end = weakref.finalize(self, _end, self._processes, self._folder)
        for device, count in zip(devices, cpus, strict=True):
            self._start(device, count)

    @property
    def size(self) -> int:
        """See `WorkerPool`."""
        return len(self._processes)

    @property
    def ready(self) -> Sequence[str]:
        """See `WorkerPool`."""
        return [process.name for process in self._processes.values() if process.ready]

    def _start(self, device: str, cpus: int, attempt: int = 1) -> None:
        self._started += 1
        name = f"{device} #{self._started}"
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "slide2vec.scale.local_worker", str(theirs.fileno())]
            process = subprocess.Popen(
                [*command, str(self._folder)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | _environment(device, cpus, os.environ),
            )
        made = _Process(name, device, cpus, Connection(ours.detach()), process, attempt)
        self._processes[name] = made
        self.send(name, Load(self._loader, "cuda:0" if device.startswith("cuda") else device))

    def send(self, worker: str, command: Command) -> None:
        """See `WorkerPool`."""
        process = self._processes.get(worker)
        if process is None:
            return
        if isinstance(command, StartJob):
            process.ready = False
        with suppress(OSError):  # it is lost: `receive` reports that
            process.connection.send_bytes(pickle.dumps(command))

    def receive(self) -> Sequence[tuple[str, Report]]:
        """See `WorkerPool`."""
        by_connection = {process.connection: process for process in self._processes.values()}
        reports: list[tuple[str, Report]] = []
        for connection in wait(list(by_connection), WAIT_S):
            process = by_connection[connection]  # type: ignore[index]
            try:
                report = pickle.loads(process.connection.recv_bytes())
            except (EOFError, OSError):
                report = Lost(self._on_exit(process))
            process.begun = process.begun or isinstance(report, JobStarted)
            process.ready = process.ready or isinstance(report, Ready | JobFinished)
            reports.append((process.name, report))
        return reports

    def _on_exit(self, process: _Process) -> str:
        """How a process ended; another takes its place, unless its device is given up."""
        del self._processes[process.name]
        process.connection.close()
        reason = _ending(process.process)
        attempt = 1 if process.begun else process.attempt + 1
        if attempt <= ATTEMPTS:
            self._start(process.device, process.cpus, attempt)
        return reason

    def load_features(self, features: Any) -> Tensor:
        """See `WorkerPool`."""
        return load_features(features)

    def close(self) -> None:
        """See `WorkerPool`."""
        self._end()


def _environment(device: str, cpus: int, ours: Mapping[str, str]) -> dict[str, str]:
    """What pins a worker to its device and its CPUs, and lets it import what this process does."""
    made = {
        VARIABLE: str(cpus),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }
    if device.startswith("cuda"):
        visible = [each.strip() for each in ours.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        number = int(device.partition(":")[2] or 0)
        made["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return made


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return "it no longer answered"
    if status >= 0:
        return f"it ended with status {status}"
    name = signal.Signals(-status).name
    return f"it was killed ({name}{', by a lack of memory perhaps' if name == 'SIGKILL' else ''})"


def _end(processes: Mapping[str, _Process], folder: Path) -> None:
    """Closing its socket ends a worker."""
    for each in processes.values():
        each.connection.close()
    for each in processes.values():
        _ending(each.process)
    shutil.rmtree(folder, ignore_errors=True)


def start_local(loader: Callable[..., Any], devices: Sequence[str], execution: ExecutionOptions) -> LocalPool:
    """A process for each device, which share the CPUs of the job."""
    return LocalPool(devices, loader, share(job_cpus(), len(devices)))
