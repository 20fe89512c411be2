"""Embeddings in a safetensors file, with coordinates and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.formats import FeatureFile
from slide2vec.files.arrays import check_most

if TYPE_CHECKING:
    import torch

__all__ = ["read", "write"]

#: torch dtype -> what a safetensors header calls it.
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def write(file: BinaryIO, content: FeatureFile) -> None:
    """As the format is defined. The library orders the metadata by chance and copies the arrays."""
    import torch

    arrays: list[tuple[str, str, NDArray[Any]]] = []
    if content.coords is not None:
        arrays.append(("coords", "I64", content.coords))  # first: the wider type keeps all aligned
    dtype = str(content.values.dtype).removeprefix("torch.")
    # As bytes, because NumPy has no bfloat16.
    flat = content.values.reshape(-1).view(torch.uint8).numpy()
    arrays.append((content.name, _SAFETENSORS[dtype], flat))
    header: dict[str, Any] = {"__metadata__": dict(content.metadata)}
    start = 0
    for name, code, array in arrays:
        shape = content.values.shape if name == content.name else array.shape
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, _, array in arrays:
        file.write(np.ascontiguousarray(array).data)


def read(path: Path, names: tuple[str, ...], most: int | None) -> torch.Tensor | None:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        name = next((name for name in names if name in known), None)
        if name is None:
            return None
        check_most(tuple(file.get_slice(name).get_shape()), most)
        found: torch.Tensor = file.get_tensor(name)
        return found.clone(memory_format=torch.contiguous_format)  # off the map of the file
