"""A worker in a Ray actor."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from slide2vec.cohort.lock import LOCK_NAME
from slide2vec.errors import ConfigError
from slide2vec.scale.messages import Command, Job, Report, StartJob
from slide2vec.scale.worker import serve

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RayWorker"]

#: Seconds in which more reports may come to go with the first.
GATHER_S = 0.05


class RayWorker:
    """Serves whoever calls it; the methods are called in several threads.

    Commands and reports travel pickled: what is unpickled is nobody's but the receiver's, while arrays that
    Ray unpickles cannot be written to, and keep all that came with them in its object store.

    Args:
        folder: the working directory of the process that started it, which relative paths start from.
    """

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # not on this machine, and not needed where all paths are absolute
            os.chdir(folder)
        logging.getLogger("slide2vec").addHandler(logging.NullHandler())
        self._commands: SimpleQueue[bytes] = SimpleQueue()
        self._reports: SimpleQueue[Report] = SimpleQueue()
        self._early: dict[int, bytes] = {}
        self._sending, self._next = threading.Lock(), 0
        arguments = (self._command, self._reports.put, _as_array)
        threading.Thread(target=serve, args=arguments, name="serve", daemon=True).start()

    def send(self, number: int, command: bytes) -> None:
        """Take a command; the calls may come in another order than that of their numbers 0, 1, 2 …"""
        with self._sending:
            self._early[number] = command
            while self._next in self._early:
                self._commands.put(self._early.pop(self._next))
                self._next += 1

    def receive(self, seconds: float) -> bytes:
        """What there is to report since the last call, pickled: [Report, …]; waits for something so long."""
        reports: list[Report] = []
        with suppress(Empty):
            while True:
                reports.append(self._reports.get(timeout=GATHER_S if reports else seconds))
        return pickle.dumps(reports)

    def _command(self) -> Command:
        command: Command = pickle.loads(self._commands.get())
        if isinstance(command, StartJob):
            _check_shared(command.job)
        return command


def _check_shared(job: Job) -> None:
    """Raises ConfigError where the output directory is another one than that of the coordinator, which has
    locked its own."""
    part = next(iter(job.parts.values()))
    folder = part.execution.output_dir
    if part.place is None or folder is None or "://" in str(folder) or (Path(folder) / LOCK_NAME).exists():
        return
    raise ConfigError(
        f"output_dir {folder} on node {os.uname().nodename} is not that of the run: the nodes of a Ray "
        "cluster write into one directory, on storage that all of them mount at the same path"
    )


def _as_array(values: Tensor) -> Any:
    return values.detach().cpu().numpy()
