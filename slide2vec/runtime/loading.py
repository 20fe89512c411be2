"""The runtimes by name: which can be used here, and an engine out of its folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch

from slide2vec.choices import RUNTIMES
from slide2vec.errors import EngineError
from slide2vec.runtime.record import EngineRecord, read_record

if TYPE_CHECKING:
    from slide2vec.runtime.base import Engine

__all__ = ["RuntimeModule", "load_engine", "not_here", "runtimes_for"]


class RuntimeModule(Protocol):
    """What the module of a runtime has (`CompiledRuntime.home`)."""

    def unavailable(self, runtime: str, precision: str, device: torch.device | None) -> str | None:
        """Why its engines cannot run in a precision, None when they can."""
        ...

    def load(self, record: EngineRecord, file: Path, device: torch.device) -> Engine:
        """An engine out of its file.

        Raises:
            EngineError: the file cannot be read, or the device cannot run it.
            ExtraMissingError: the runtime is not installed.
        """
        ...


def _home(runtime: str) -> RuntimeModule:
    return cast(RuntimeModule, import_module(RUNTIMES[runtime].home))


def runtimes_for(device: torch.device) -> tuple[str, ...]:
    """Runtimes of compiled engines that exist for a device, the preferred one first."""
    return tuple(name for name, each in RUNTIMES.items() if device.type in each.devices)


def not_here(runtime: str, precision: str, device: torch.device | None = None) -> str | None:
    """Why no engine of a runtime can run here, None when it can; None as a device is the current one."""
    return _home(runtime).unavailable(runtime, precision, device)


def load_engine(directory: Path, device: torch.device) -> Engine:
    """The engine in a folder, ready to run.

    Raises:
        EngineError: its record or file cannot be read, or the device cannot run it.
        ExtraMissingError: the runtime is not installed.
    """
    record = read_record(directory)
    if record.runtime not in runtimes_for(device):
        raise EngineError(f"{directory}: an engine of {record.runtime} does not run on {device}")
    return _home(record.runtime).load(record, directory / record.file, device)
