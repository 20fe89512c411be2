"""One run at a time writes into an output directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slide2vec.cohort.lease import lease_holder, leased, signature
from slide2vec.errors import OutputError, OutputLockedError
from slide2vec.files import is_remote

__all__ = ["LOCK_NAME", "holder", "output_lock"]

logger = logging.getLogger(__name__)

LOCK_NAME = ".slide2vec.lock"


@contextmanager
def output_lock(output_dir: Path) -> Iterator[None]:
    """Hold an output directory; the operating system releases it when the process ends, however it ends.

    One behind a URL is held as well as can be: see `leased`.

    Raises:
        OutputLockedError: another process holds it.
        OutputError: the directory cannot be made or written to.
    """
    path = output_dir / LOCK_NAME
    if is_remote(path):
        with leased(path):
            yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError.of(output_dir, error) from error
    try:
        _acquire(descriptor, output_dir)
        _sign(descriptor, output_dir)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, output_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        by = _read(descriptor)
        who = f"process {by['pid']} on {by['host']}, since {by['started']}" if by else "another process"
        raise OutputLockedError(
            f"{who} is writing into {output_dir}: wait until it is done, stop it, or choose another "
            "output directory (`slide2vec status` shows how far it is)"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): do not run twice into it", output_dir, error.strerror)


def _sign(descriptor: int, output_dir: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signature()).encode(), 0)
    except OSError as error:
        raise OutputError.of(output_dir / LOCK_NAME, error) from error


def holder(output_dir: Path) -> Mapping[str, Any] | None:
    """Who writes into an output directory now (host, pid, started); None when nobody does."""
    if is_remote(output_dir):
        return lease_holder(output_dir / LOCK_NAME)
    try:
        descriptor = os.open(output_dir / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor) or {"host": "unknown", "pid": 0, "started": "unknown"}
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        by = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return by if isinstance(by, dict) and by.keys() >= {"host", "pid", "started"} else None
