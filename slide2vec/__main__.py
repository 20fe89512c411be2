"""The process of the `slide2vec` command, which is also `python -m slide2vec`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any

from slide2vec.cli import main as command

__all__ = ["main"]


def main() -> None:
    """`slide2vec.cli.main`, and the end of the process."""
    try:
        command()
    except SystemExit as end:
        _end_without_collection(end.code or 0)
        raise


def _end_without_collection(code: Any) -> None:
    """End as `multiprocessing` ends processes that it forked: threads are joined, exit handlers called, and
    output is flushed. Else Python takes PyTorch apart object by object, which lasts about a second.

    Returns where there is no PyTorch or more to be done: output cannot be written, Python is traced or
    profiled, or CUDA is used, whose profilers write when a process ends as usual.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.cuda.is_initialized() or not isinstance(code, int) or _is_watched():
        return
    try:
        _flush()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        _flush()
    except (OSError, ValueError, KeyboardInterrupt):
        return
    os._exit(code)


def _is_watched() -> bool:
    """By a debugger, a profiler or a measure of coverage."""
    monitoring = getattr(sys, "monitoring", None)  # of Python 3.12
    tools = [] if monitoring is None else [monitoring.get_tool(number) for number in range(6)]
    return any((sys.gettrace(), sys.getprofile(), *tools))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed by who started the process
            stream.flush()


if __name__ == "__main__":
    main()
