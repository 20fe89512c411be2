"""Run one case in a process of its own, which may crash, hang or grow."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["LIMIT_BYTES", "LIMIT_S", "in_child"]

LIMIT_S = 60.0
LIMIT_BYTES = 2 * 2**30
_POLL_S = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


def in_child(task: Callable[[], dict[str, Any]], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """What `task` returns (JSON), with `seconds` and `rss` (bytes, the peak), run in a forked child.

    The parent must have no threads. Where the child does not come back, `outcome` is "crash", "hang" or
    "memory".
    """
    receive, send = os.pipe()
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            _work(task, send, errors.fileno())
        os.close(send)
        killed, said = _watch(pid, receive, started + limit_s)
        os.close(receive)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has started, too
        _, status, usage = os.wait4(pid, 0)
        errors.seek(0)
        told = errors.read()[-2000:].decode(errors="replace")
    result: dict[str, Any] = json.loads(said) if said.endswith(b"\n") else {}
    if killed or not result:
        reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        result = {"outcome": killed or "crash", "message": f"{reason}: {told}"}
    rss = usage.ru_maxrss * 1024
    if rss > LIMIT_BYTES:
        result["outcome"] = "memory"
    return {**result, "seconds": round(time.monotonic() - started, 3), "rss": rss}


def _work(task: Callable[[], dict[str, Any]], send: int, errors: int) -> None:
    try:
        os.setsid()
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        try:
            result = task()
        except BaseException:
            result = {"outcome": "harness", "message": traceback.format_exc()[-2000:]}
        data = json.dumps(result).encode() + b"\n"
        while data:
            data = data[os.write(send, data) :]
        os.close(send)
        # Threads of native libraries may still run: no clean-up, as nothing is worth it.
        sys.stdout.flush()
    finally:
        os._exit(0)


def _watch(pid: int, receive: int, end: float) -> tuple[str | None, bytes]:
    """("hang" or "memory", or None where it has ended by itself; what it has written)."""
    said = b""
    while True:
        ready, _, _ = select.select([receive], [], [], _POLL_S)
        if ready:
            part = os.read(receive, 1 << 16)
            if not part:
                return None, said
            said += part
            continue
        if time.monotonic() > end:
            return "hang", said
        if sum(_resident(each) for each in _family(pid)) > LIMIT_BYTES:
            return "memory", said


def _family(pid: int) -> Iterator[int]:
    """A process and what it has started."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
