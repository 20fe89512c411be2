"""Opening what users and other programs name: plain files only, and never waiting for a pipe."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from slide2vec.files.remote import as_os_errors, is_remote

__all__ = ["open_locked", "open_plain", "plain_stat"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain_stat(path: Path) -> os.stat_result:
    """`stat` of a plain file, through links; of a remote file what its store says.

    Raises:
        OSError: there is none, or it is a directory, a pipe, a device or a socket.
    """
    with as_os_errors(path), _as_os_errors(path):
        found = path.stat()
    _refuse_others(path, found.st_mode)
    return found


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """A plain file (or a remote one), opened for reading in binary.

    A pipe is refused, not waited for, a device is not opened at all.

    Raises:
        OSError: as `plain_stat`, or it may not be read.
    """
    if is_remote(path):
        with as_os_errors(path), path.open("rb") as remote:
            yield remote
        return
    plain_stat(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _refuse_others(path, os.fstat(descriptor).st_mode)  # replaced since
        yield file


def open_locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644) -> int:
    """The descriptor of a lock file. A link in its place is not followed: it could lead to any file.

    Raises:
        OSError: it cannot be opened, or something else is in its place.
    """
    extra = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | extra, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        message = f"its lock {path.name} is a link, which is not followed: remove it"
        raise OSError(errno.ELOOP, message) from error
    try:
        _refuse_others(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_others(path: Path, mode: int) -> None:
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is not None:
        error = IsADirectoryError if kind == "a directory" else OSError
        raise error(f"{path} is {kind}, not a file")


@contextmanager
def _as_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # NUL in a path
        raise OSError(f"{str(path)!r} is no path: {error}") from error
