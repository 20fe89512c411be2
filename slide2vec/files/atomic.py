"""Files that appear whole or not at all, here or behind a URL; arrays read in one thread at a time."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slide2vec.errors import OutputError
from slide2vec.files.remote import as_os_errors, is_remote, upload

__all__ = ["READING_ARRAYS", "atomic_folder", "atomic_path", "remove", "remove_partial"]

#: Held while headers of NumPy's arrays are read. NumPy parses them with `ast`, whose counter of nesting is
#: shared by all threads (in Python 3.11, at least): where a garbage collection lets in another thread that
#: parses, too, it ends in "SystemError: AST constructor recursion depth mismatch", and a good slide fails.
READING_ARRAYS = threading.RLock()

#: Of the folder that holds a file while it is written.
_SUFFIX = ".partial"
#: Process ids are given again, in containers by the next run.
_TOKEN = secrets.token_hex(4)


def _own_suffix() -> str:
    """Of those of this process."""
    return f".{_TOKEN}-{os.getpid()}{_SUFFIX}"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name with the suffix of `path`; renamed to it when the block ends, removed if the
    block fails. Folders are made as needed. What is there after a power cut is whole, too.

    For a URL it is a file in the folder for temporary files (TMPDIR), uploaded when the block ends.

    Raises:
        OutputError: for any OSError on the way: the file cannot be written.
    """
    try:
        with _temporary_for_upload(path) if is_remote(path) else _temporary_beside(path) as temporary:
            yield temporary
    except OutputError:
        raise
    except OSError as error:
        raise OutputError.of(path, error) from error


@contextmanager
def _temporary_for_upload(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slide2vec-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        upload(temporary, path)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem[:64]}.", suffix=_own_suffix()))
    temporary = folder / path.name
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder's temporary name beside `path`, for the block to make; renamed to `path` when the block ends,
    removed if the block fails. A folder that is there is moved aside first: between the two there is none.

    Raises:
        OutputError: for any OSError on the way: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem[:64]}.", suffix=_own_suffix()))
        try:
            yield holder / path.name
            for file in filter(Path.is_file, (holder / path.name).rglob("*")):
                _flush(file)
            if path.exists():
                path.replace(holder / "former")
            (holder / path.name).replace(path)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError.of(path, error) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        if is_remote(path):
            _remove_remote(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.of(path, error) from error


def _remove_remote(path: Any) -> None:
    with suppress(FileNotFoundError), as_os_errors(path):
        path.fs.rm_file(path.path)


def remove_partial(directory: Path) -> None:
    """Remove what killed processes left half-written in a directory, and in the folders in it (while no other
    process writes there)."""
    if is_remote(directory):  # what is half-written is on the machine that writes it
        return
    for folder in (*directory.glob(f".*{_SUFFIX}"), *directory.glob(f"*/.*{_SUFFIX}")):
        if not folder.name.endswith(_own_suffix()):  # threads may be at it
            shutil.rmtree(folder, ignore_errors=True)
