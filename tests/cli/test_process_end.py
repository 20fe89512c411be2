"""How the process of a command ends: everything that Python does at its end, but for taking PyTorch apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = """
import atexit, os, sys, threading, time
from types import SimpleNamespace
from slide2vec import __main__ as process

def at_once(code, end=os._exit):
    os.write(2, b"at once")
    end(code)

def command():
    def late():
        time.sleep(0.2)
        print("thread")
    atexit.register(print, "exit handler")
    threading.Thread(target=late).start()
    print("x" * {long})
    raise SystemExit({code})

{before}
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: {cuda}))
os._exit, process.command = at_once, command
process.main()
"""


def _ended(
    code: str = "3",
    *,
    cuda: bool = False,
    before: str = "",
    stdout: Any = subprocess.PIPE,
    long: int = 100_000,
):
    script = CODE.format(code=code, cuda=cuda, before=before, long=long)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_threads_and_exit_handlers_and_output_are_waited_for() -> None:
    ran = _ended()
    assert (ran.returncode, ran.stderr) == (3, "at once")
    assert ran.stdout.splitlines() == ["x" * 100_000, "thread", "exit handler"]


@pytest.mark.parametrize(("given", "code"), [("None", 0), ("0", 0), ("130", 130)])
def test_codes(given: str, code: int) -> None:
    assert _ended(given).returncode == code


@pytest.mark.parametrize(
    "how", [{"cuda": True}, {"before": "sys.setprofile(lambda *event: None)"}, {"code": "'a text'"}]
)
def test_python_ends_it_as_usual(how: dict) -> None:
    """With CUDA, whose profilers write then; when profiled; with a text for stderr in place of a code."""
    ran = _ended(**how)
    assert ran.returncode == (1 if "code" in how else 3)
    assert ran.stdout.splitlines()[1:] == ["thread", "exit handler"] and "at once" not in ran.stderr


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is of Python 3.12")
def test_a_profiler_that_monitors_writes_its_profile() -> None:
    ran = _ended(before="sys.monitoring.use_tool_id(sys.monitoring.PROFILER_ID, 'test')")
    assert ran.returncode == 3 and "at once" not in ran.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_streams_that_are_closed(closed: str) -> None:
    ran = _ended("0", before=f"sys.{closed} = None")
    assert (ran.returncode, ran.stderr) == (0, "at once")


def test_an_interrupt_while_threads_are_waited_for() -> None:
    ran = _ended(before="def interrupted(): raise KeyboardInterrupt\nthreading._shutdown = interrupted")
    assert ran.returncode == 3 and "at once" not in ran.stderr and "__main__.py" not in ran.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_told_of() -> None:
    with Path("/dev/full").open("w") as full:
        ran = _ended("0", stdout=full, long=10)
    assert ran.returncode == 120 and "No space left" in ran.stderr and "at once" not in ran.stderr
