"""Zarr: `tile_embeddings/<slide>.zarr` and the like, in the folders of a run.

A group (format 2, which zarr-python 2 and 3 read) with `features`, of tiles and regions `coords` (N, 2) int64
in level-0 px, and the sidecar as its attributes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.places import Kind
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import atomic_folder, is_remote
from slide2vec.frames import needing
from slide2vec.layouts.item import Item

__all__ = ["DTYPE", "EMPTY", "KINDS", "TOGETHER", "write"]

KINDS: Sequence[Kind] = ("tile", "hierarchical", "slide", "patient")
DTYPE: Dtype | None = None
EMPTY = True
TOGETHER = False

#: Of a chunk: a file each, so that a slide is a few of them, and part of one can be read.
_CHUNK_BYTES = 16 * 2**20


def write(items: Sequence[Item]) -> Path:
    """See `LayoutModule`."""
    with needing("zarr", "Zarr"):
        import zarr
    (item,) = items
    path = item.output / f"{item.kind}_embeddings" / f"{item.name}.zarr"
    if is_remote(path):
        raise ConfigError(f"{path} is behind a URL: Zarr is written to local storage")
    if path.exists() and not _is_ours(path):
        raise ArtifactError(f"slide {item.name}: {path} is there already, and is none of ours: remove it")
    arrays = {"features": item.values.numpy()}
    if item.tiling is not None and item.kind in ("tile", "hierarchical"):
        recorded = item.tiling.recorded
        arrays["coords"] = np.stack([recorded.x, recorded.y], axis=1)
    with atomic_folder(path) as folder:
        group = zarr.open_group(str(folder), mode="w", zarr_format=2)
        for name, values in arrays.items():
            group.create_array(name, data=values, chunks=_chunks(values), compressors=None)
        group.attrs.update(_attributes(item))
    return path


def _is_ours(path: Path) -> bool:
    try:
        return "artifact_type" in json.loads((path / ".zattrs").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _chunks(values: NDArray[Any]) -> tuple[int, ...]:
    row = values[:1].nbytes
    rows = min(len(values), _CHUNK_BYTES // row) if row else 1
    return (max(1, rows), *(max(1, side) for side in values.shape[1:]))


def _attributes(item: Item) -> dict[str, Any]:
    """The sidecar, of this file; with what coordinates are of, where there are some."""
    dtype = str(item.values.dtype).removeprefix("torch.")
    about = {**item.metadata, "format": "zarr", "feature_dtype": dtype}
    about.pop("file_size_bytes", None)
    if item.tiling is not None:
        about["base_spacing_um"] = item.tiling.geometry.base_spacing_um
        about["level0_width"], about["level0_height"] = item.tiling.dimensions
    return about
