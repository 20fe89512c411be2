"""Read features files, ours and others', without trusting them.

Nothing in a file is executed, nothing outside it is opened, and no array is allocated that is larger
than the file could hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.formats import format_module
from slide2vec.artifacts.h5_format import dataset_in, has_link
from slide2vec.artifacts.records import FORMATS
from slide2vec.choices import OUTPUT_FORMATS
from slide2vec.errors import ArtifactError
from slide2vec.files import as_os_errors, as_path, local

if TYPE_CHECKING:
    import torch

__all__ = ["load_coords", "load_embeddings", "load_tile_size"]

#: The array of embeddings by the names it may have, the first found counts.
_VALUES = ("features", "latents")
#: Pixels that no slide reaches along a side.
MOST_PX = 2**31


def load_embeddings(path: str | Path, *, most: int | None = None) -> torch.Tensor:
    """The embeddings (or latents) in a .pt, .npz, .safetensors or .h5 file, on the CPU.

    Also reads what the original slide2vec, CLAM and TRIDENT write. A stray first axis of h5 files,
    (1, N, D) for N coordinates, is dropped.

    Args:
        most: numbers that there may be, as a sidecar says.

    Returns:
        1-D, 2-D or 3-D; float16, bfloat16, float32 or float64, as stored.

    Raises:
        ArtifactError: the file is missing, damaged, of an unknown format, or not to be trusted.
    """
    import torch

    path, read = _reader(path)
    with _refusing(path), local(path) as file:
        found = read(file, _VALUES, most)
        if found is None:
            raise ArtifactError(f"holds no array called {' or '.join(_VALUES)}")
        values = found if isinstance(found, torch.Tensor) else torch.from_numpy(found)
        if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ArtifactError(f"holds {values.dtype}, not floats")
        if not 1 <= values.ndim <= 3:
            raise ArtifactError(f"holds an array of {values.ndim} dimensions; embeddings have 1 to 3")
        return values


def load_coords(path: str | Path) -> NDArray[np.int64] | None:
    """The tiles' coordinates in a .safetensors or .h5 file: (N, 2) int64, x and y in level-0 px.

    None where the file holds none (.pt and .npz never do: see the run's `tiles/`).

    Raises:
        ArtifactError: as for `load_embeddings`, or they are no (N, 2) integers.
    """
    path, read = _reader(path)
    if not OUTPUT_FORMATS[path.suffix[1:]].has_coords:
        return None
    with _refusing(path), local(path) as file:
        found = read(file, ("coords",), None)
        if found is None:
            return None
        coords = np.asarray(found)
        if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
            raise ArtifactError(f"coords are {coords.dtype} of shape {coords.shape}, not (N, 2) integers")
        return _plausible(coords)


def _plausible(coords: NDArray[Any]) -> NDArray[np.int64]:
    """Raises ArtifactError for places that no slide has; how large theirs is, the file need not say."""
    outside = ((coords < 0) | (coords >= MOST_PX)).any(1)
    if outside.any():
        first = int(outside.argmax())
        raise ArtifactError(
            f"coords of {outside.sum()} of {len(coords)} tiles are on no slide: those of tile {first} are "
            f"{coords[first].tolist()}, and level-0 px go from 0 to {MOST_PX - 1}"
        )
    return coords.astype(np.int64)


def load_tile_size(path: str | Path) -> int | None:
    """Side of a tile in level-0 px, as the attributes of `coords` in an .h5 file say; None where they do not.

    `patch_size_level0` (ours and TRIDENT's), else `patch_size` at `patch_level` times its `downsample`
    (CLAM's).

    Raises:
        ArtifactError: as for `load_embeddings`.
    """
    path = as_path(path)
    if path.suffix != ".h5":
        return None
    import h5py

    with _refusing(path), local(path) as copy, h5py.File(copy, "r", locking=False) as file:
        if not has_link(file, "coords"):
            return None
        attributes = dataset_in(file, "coords", copy.stat().st_size).attrs
        known = {
            name: _number(attributes, name) for name in ("patch_size_level0", "patch_size", "downsample")
        }
    if known["patch_size_level0"]:
        return round(known["patch_size_level0"])
    if known["patch_size"] and known["downsample"]:
        return round(known["patch_size"] * known["downsample"])
    return None


def _number(attributes: Any, name: str) -> float | None:
    """A positive number, or the first of a pair (CLAM has x and y); None for anything else."""
    if name not in attributes:
        return None
    identity = attributes.get_id(name)
    if identity.dtype.kind not in "iuf" or math.prod(identity.shape) not in (1, 2):
        return None
    value = float(np.ravel(attributes[name])[0])
    return value if 0 < value < 2**31 else None


_Read = Callable[[Path, tuple[str, ...], int | None], Any]


def _reader(path: str | Path) -> tuple[Path, _Read]:
    path = as_path(path)
    if path.suffix[1:] not in FORMATS:
        raise ArtifactError(
            f"embeddings file {path}: {path.suffix or 'no suffix'!r} is none of {', '.join(FORMATS)}"
        )
    if not _is_file(path):
        raise ArtifactError(f"embeddings file {path} does not exist; is its slide finished?")
    return path, format_module(path.suffix[1:]).read


def _is_file(path: Path) -> bool:
    try:
        with as_os_errors(path):
            return path.is_file()
    except OSError as error:
        raise ArtifactError(f"embeddings file {path} cannot be reached: {error}") from error


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    # The parsers of four formats raise what they like over a damaged file, down to SystemError.
    except Exception as error:
        what = str(error) if isinstance(error, ArtifactError) else f"cannot be read ({_brief(error)})"
        raise ArtifactError(
            f"embeddings file {path} {what}; if it is one of ours, delete it and embed its slide again"
        ) from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
