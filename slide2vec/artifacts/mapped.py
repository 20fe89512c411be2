"""Embeddings as tensors over the mapped file: what is used of them is read, when it is used."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slide2vec.artifacts.h5_format import dataset_in, has_link
from slide2vec.artifacts.reading import load_embeddings
from slide2vec.errors import ArtifactError
from slide2vec.files import as_path, is_remote

if TYPE_CHECKING:
    import torch

__all__ = ["map_embeddings"]

_SAFETENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
#: Bytes of the header of a safetensors file, at most.
_MOST_HEADER = 2**24


def map_embeddings(path: str | Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The embeddings in a file that a run wrote, mapped into memory where its format allows that (pt,
    safetensors and h5 as slide2vec writes them, on local storage), else loaded.

    Writing into the tensor changes nothing in the file.

    Args:
        shape: as the sidecar says.

    Raises:
        ArtifactError: the file cannot be read, is not to be trusted, or has another shape.
    """
    path = as_path(path)
    try:
        found = None if is_remote(path) or 0 in shape else _mapped(path)
    except (OSError, ValueError, KeyError, struct.error, RuntimeError):
        found = None  # whatever is wrong, loading says
    found = load_embeddings(path, most=math.prod(shape)) if found is None else found
    if tuple(found.shape) != shape:
        raise ArtifactError(
            f"embeddings file {path} has shape {tuple(found.shape)}, its sidecar says {shape}: embed it again"
        )
    return found


def _mapped(path: Path) -> torch.Tensor | None:
    import torch

    if path.suffix == ".pt":
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return found if isinstance(found, torch.Tensor) and found.is_floating_point() else None
    find = {".safetensors": _in_safetensors, ".h5": _in_h5}.get(path.suffix)
    place = find(path) if find else None
    if place is None:
        return None
    offset, dtype, shape = place
    if offset % np.dtype(dtype).itemsize:  # PyTorch reckons with aligned numbers
        return None
    return torch.from_numpy(np.memmap(path, dtype, "c", offset, shape))


def _in_safetensors(path: Path) -> tuple[int, Any, tuple[int, ...]] | None:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MOST_HEADER:
            return None
        about = json.loads(file.read(length))["features"]
    dtype = _SAFETENSORS.get(about["dtype"])
    return None if dtype is None else (8 + length + about["data_offsets"][0], dtype, tuple(about["shape"]))


def _in_h5(path: Path) -> tuple[int, Any, tuple[int, ...]] | None:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        if not has_link(file, "features"):
            return None
        dataset = dataset_in(file, "features", path.stat().st_size)
        offset = dataset.id.get_offset()
        if offset is None or dataset.dtype.kind != "f" or not dataset.dtype.isnative:
            return None
        return offset, dataset.dtype, dataset.shape
