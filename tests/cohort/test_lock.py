"""The lock of an output directory, between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slide2vec.cohort.lock import LOCK_NAME, holder, output_lock
from slide2vec.errors import OutputError, OutputLockedError

HOLD = """
import sys, time
from pathlib import Path
from slide2vec.cohort.lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_second_run_is_told_who_holds_it(other: subprocess.Popen[str], tmp_path: Path) -> None:
    try:
        found = holder(tmp_path)
        assert found is not None and found["pid"] == other.pid
        told = f"process {other.pid} on .* is writing into {tmp_path}"
        with pytest.raises(OutputLockedError, match=told), output_lock(tmp_path):
            raise AssertionError("not reached")
    finally:
        other.kill()
        other.wait()


def test_killed_run_leaves_no_lock(other: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert holder(tmp_path) is None
    with output_lock(tmp_path):
        assert holder(tmp_path) is not None
    assert holder(tmp_path) is None


def test_the_lock_file_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_bytes(b"\xff{}[" * 3000)
    assert holder(tmp_path) is None
    with output_lock(tmp_path):
        assert holder(tmp_path) is not None


def test_no_directory(tmp_path: Path) -> None:
    assert holder(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"), output_lock(tmp_path / "file"):
        raise AssertionError("not reached")
