"""Tile embeddings from one process to another on the same machine, without pickling them."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SharedTensor", "load_features", "spool_folder", "store"]


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in a file.

    Attributes:
        dtype: of PyTorch, "float32".
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


def spool_folder() -> Path:
    """A new folder for such files, in shared memory where there is some."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="slide2vec-", dir=shared if usable else None))


def store(values: Tensor, folder: Path) -> SharedTensor:
    """Write a tensor into a folder; into the one for temporary files where it has no room.

    Raises:
        OSError: neither has.
    """
    values = values.detach().cpu().contiguous()
    try:
        path = _write(values, folder)
    except OSError:
        if folder.parent == Path(tempfile.gettempdir()):
            raise
        path = _write(values, Path(tempfile.gettempdir()))
    return SharedTensor(path, tuple(values.shape), str(values.dtype).removeprefix("torch."))


def _write(values: Tensor, folder: Path) -> Path:
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="slide2vec-", suffix=".features")
    try:
        with os.fdopen(descriptor, "wb") as file:
            size = values.numel() * values.element_size()
            if size and shutil.disk_usage(folder).free < size:
                raise OSError(f"{folder} has no room for {size:,} bytes")
            values.numpy().tofile(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def load_features(stored: SharedTensor) -> Tensor:
    """The tensor, mapped where it lies; its file has no name any more, and goes with the tensor."""
    import torch

    count = 1
    for side in stored.shape:
        count *= side
    dtype = getattr(torch, stored.dtype)
    values = (
        torch.from_file(str(stored.path), shared=True, size=count, dtype=dtype)
        if count
        else torch.empty(0, dtype=dtype)
    )
    stored.path.unlink(missing_ok=True)
    return values.reshape(stored.shape)
