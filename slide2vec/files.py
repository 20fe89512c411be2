"""Files that appear whole or not at all; arrays read in one thread at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slide2vec.errors import OutputError

__all__ = ["READING_ARRAYS", "atomic_path", "remove_partial"]

#: Held while headers of NumPy's arrays are read. NumPy parses them with `ast`, whose counter of nesting is
#: shared by all threads (in Python 3.11, at least): where a garbage collection lets in another thread that
#: parses, too, it ends in "SystemError: AST constructor recursion depth mismatch", and a good slide fails.
READING_ARRAYS = threading.RLock()

#: Of the folder that holds a file while it is written.
_SUFFIX = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name with the suffix of `path`; renamed to it when the block ends, removed if the
    block fails. Folders are made as needed. What is there after a power cut is whole, too.

    Raises:
        OutputError: for any OSError on the way: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem[:64]}.", suffix=_SUFFIX))
        temporary = folder / path.name
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            folder.rmdir()
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


def remove_partial(directory: Path) -> None:
    """Remove what killed processes left half-written in a directory (while nobody writes there)."""
    for folder in directory.glob(f".*{_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)
