"""A folder of one run in a directory that other runs and machines may share."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slide2vec.files import open_locked
from slide2vec.files.locks import try_lock

__all__ = ["is_in_memory", "private_folder", "removed_again"]

_PREFIX = "slide2vec-stage"
#: File systems that have no disk.
_MEMORY = {"tmpfs", "ramfs"}


@contextmanager
def private_folder(directory: Path) -> Iterator[Path]:
    """A new folder in a directory, removed when the block ends; those of dead runs are removed first.

    A run holds a lock on the file beside its folder, which the operating system releases however the run
    ends. Not all network file systems show one machine the locks of another, so that only folders of
    this machine, by its name, are taken for dead.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    for lock in directory.glob(f"{_PREFIX}-{host}-*.lock"):
        _remove_if_dead(lock)
    lock, descriptor = _locked(directory, f"{_PREFIX}-{host}")
    folder = lock.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def removed_again(directory: Path) -> Iterator[None]:
    """What is made of a directory in the block, and of those above it, goes when it ends, if it is empty."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for each in missing:
                each.rmdir()


def is_in_memory(directory: Path) -> bool:
    """Whether what is written there takes memory. False where the system does not say."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    kinds = {Path(fields[1]): fields[2] for fields in map(str.split, mounts)}
    where = directory.resolve()
    return next((kinds[each] for each in (where, *where.parents) if each in kinds), "") in _MEMORY


def _locked(directory: Path, prefix: str) -> tuple[Path, int]:
    """A new lock file, held: another run may take it for a dead one's until it is."""
    while True:
        lock = directory / f"{prefix}-{secrets.token_hex(6)}.lock"
        descriptor = open_locked(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if _hold(descriptor) is not False and lock.exists():
            return lock, descriptor
        os.close(descriptor)


def _remove_if_dead(lock: Path) -> None:
    try:
        descriptor = open_locked(lock, os.O_RDWR)
    except OSError:  # gone meanwhile, or of another user
        return
    try:
        if _hold(descriptor):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool | None:
    """Whether this process now holds a lock file; None where the file system has no locks."""
    try:
        return try_lock(descriptor)
    except OSError:
        return None
