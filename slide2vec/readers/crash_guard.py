"""Crash guard: a native library first opens a file in a child process, which may die of it.

OpenSlide, libvips, cuCIM and ASAP have been seen to end the process on damaged files. Each file that one of
them is to read is therefore opened once in another process, which reads a few regions, too. That process
is kept for all slides; it is a new one, never a fork, and ends with the one that it serves.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from slide2vec.errors import BackendError
from slide2vec.readers.probe import Probe
from slide2vec.readers.reader import SlideReader

__all__ = ["check_in_child"]

logger = logging.getLogger(__name__)

#: Opening the largest slides takes a second; on a slow network drive more.
SECONDS = 45.0
#: Resident memory of the process, libraries included (150 MB), while it opens a file.
BYTES = 1 << 30
#: Time between two looks at the memory.
_LOOK_SECONDS = 0.02
#: Side of the regions that are read, level px.
_SIDE = 256

_LENGTH = struct.Struct("<Q")
#: Set in the child process.
_serving = threading.Event()
_SERVE = "from slide2vec.readers.crash_guard import serve; serve()"


def check_in_child(reader: type[SlideReader], probe: Probe) -> None:
    """Have a reader open a file and read some of it in a child process, before it does so here.

    What it raises there it will raise here, too, so only its death matters.

    Args:
        reader: called with the probe; importable by its name.

    Raises:
        BackendError: the process died, hung or grew beyond all reason.
    """
    if _serving.is_set():
        return
    wrong = _process.run(reader.__module__, reader.__name__, probe)
    if wrong:
        raise BackendError(
            f"{reader.backend} {wrong} while opening it, in a process of its own: the file is damaged, or of "
            f"a kind that {reader.backend} cannot open"
        )


class _Process:
    """The process that tries files, one at a time; started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def run(self, module: str, reader: str, probe: Probe) -> str | None:
        """What became of it; None when all is well."""
        message = pickle.dumps((module, reader, probe), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            try:
                child = self._running()
            except OSError as error:
                logger.warning(
                    "%s is opened without a trial: no child process can be started (%s)", probe.path, error
                )
                return None
            try:
                _send(child, message)
                wrong = _await_reply(child)
            except OSError as error:
                wrong = f"crashed ({error})"
            if wrong:
                self._stop()
            return wrong

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # a fork of ours may not talk to it, too
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            paths = os.pathsep.join(path for path in sys.path if path)
            self._child = subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # cuCIM would open a context of 520 MB on every GPU that it sees, and decodes on the CPU here
                env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is for the process that it serves
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """End the process. May be called twice."""
        with self._lock:
            self._stop()


_process = _Process()
atexit.register(_process.close)


def _send(child: subprocess.Popen[bytes], message: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(_LENGTH.pack(len(message)) + message)
    child.stdin.flush()


def _await_reply(child: subprocess.Popen[bytes]) -> str | None:
    """None once it has replied, else what it did in its place."""
    assert child.stdout is not None
    end = time.monotonic() + SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if selector.select(_LOOK_SECONDS):
                if os.read(child.stdout.fileno(), 1):
                    return None
                return _death(child.wait())
            if _resident(child.pid) > BYTES:
                return f"took more than {BYTES >> 20} MB of memory"
    return f"hung (it took more than {SECONDS:.0f} s)"


def _death(code: int) -> str:
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"ended its process with {code}"


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where that cannot be known."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGESIZE")


# In the child process ----------------------------------------------------------------------


def serve() -> None:
    """Try the files that are asked for, until the pipe is closed."""
    import resource

    _serving.set()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # libraries may print
    while head := sys.stdin.buffer.read(_LENGTH.size):
        message = sys.stdin.buffer.read(_LENGTH.unpack(head)[0])
        module, reader, probe = pickle.loads(message)  # from the process that started this one
        with contextlib.suppress(Exception):  # the parent raises it again
            _touch(module, reader, probe)
        os.write(replies, b".")


def _touch(module: str, reader: str, probe: Probe) -> None:
    """Open a file, and read the middle and a corner of its first and last level."""
    from importlib import import_module

    with getattr(import_module(module), reader)(probe) as opened:
        for level in {0, len(opened.level_dimensions) - 1}:
            width, height = opened.level_dimensions[level]
            size = min(_SIDE, width), min(_SIDE, height)
            for corner in ((0, 0), ((width - size[0]) // 2, (height - size[1]) // 2)):
                with contextlib.suppress(Exception):
                    location = tuple(round(at * opened.downsamples[level]) for at in corner)
                    opened.read_region(location, level, size)
