"""Processes forked from one that has imported PyTorch, for which a Python of their own takes 4 s of CPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

__all__ = ["CONTEXT", "fork_workers"]

#: As `multiprocessing.get_context("spawn")`: nothing of the tests' process is in the new one.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["slide2vec.model", "slide2vec.pipeline", "slide2vec.scale.local_worker", "slide2vec.stream", "timm"]
)


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """Have `LocalPool` fork its workers."""
    named = SimpleNamespace(**{**vars(subprocess), "Popen": _ForkedWorker})
    patch.setattr("slide2vec.scale.local_pool.subprocess", named)


class _ForkedWorker:
    """A `subprocess.Popen` of `slide2vec.scale.local_worker`, as far as `LocalPool` uses one."""

    def __init__(
        self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str], **rest: Any
    ) -> None:
        (descriptor,) = pass_fds
        with Connection(os.dup(descriptor)) as theirs:
            self._process = CONTEXT.Process(target=_work, args=(theirs, Path(command[-1]), dict(env)))
            self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a worker", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _work(theirs: Connection[Any, Any], folder: Path, environment: Mapping[str, str]) -> None:
    from slide2vec.scale import local_worker

    os.environ.clear()
    os.environ.update(environment)
    with theirs:
        descriptor = os.dup(theirs.fileno())
    local_worker.main(descriptor, folder)
