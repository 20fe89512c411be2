"""Embeddings as the original slide2vec writes them: arrays of NumPy."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.formats import FeatureFile, as_array
from slide2vec.files.arrays import native, read_npz

__all__ = ["read", "write"]


def write(file: BinaryIO, content: FeatureFile) -> None:
    arrays = {content.name: as_array(content)}
    if content.coords is not None and content.values.ndim == 2:
        arrays["tile_index"] = np.arange(len(content.coords), dtype=np.int64)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # A ZipInfo has a constant date; force_zip64, because the size is not known beforehand.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read(path: Path, names: tuple[str, ...], most: int | None) -> NDArray[Any] | None:
    found = read_npz(path, names, most=most)
    return next((native(found[name]) for name in names if name in found), None)
