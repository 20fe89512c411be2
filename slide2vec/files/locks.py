"""Locks on open files, which the operating system releases when the process ends, however it ends."""

from __future__ import annotations

import fcntl

__all__ = ["try_lock", "wait_for_lock"]


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file, unless another process has it; returns whether it is locked now.

    Args:
        descriptor: from `slide2vec.files.open_locked`; closing it releases the lock.
        shared: others may hold it as well, if they share it, too.

    Raises:
        OSError: it cannot be locked: some network file systems have no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file once no other process has it.

    Raises:
        OSError: it cannot be locked.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX)
