"""Read features files, ours and others', without trusting them.

Nothing in a file is executed, nothing outside it is opened, and no array is allocated that is larger
than the file could hold.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.records import FORMATS
from slide2vec.errors import ArtifactError
from slide2vec.files import as_os_errors, as_path, local
from slide2vec.files.arrays import check_bytes, read_npz

if TYPE_CHECKING:
    import torch

__all__ = ["load_coords", "load_embeddings", "load_tile_size"]

#: The array of embeddings by the names it may have, the first found counts.
_VALUES = ("features", "latents")
#: Of a file that PyTorch before 1.6 wrote: magic number, version, system, the tensor, names of storages.
_LEGACY_PICKLES = 5
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
    if path.suffix in (".pt", ".npz"):
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
        if not _has(file, "coords"):
            return None
        attributes = _dataset(file, "coords", copy.stat().st_size).attrs
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
    if path.suffix not in _READERS:
        raise ArtifactError(
            f"embeddings file {path}: {path.suffix or 'no suffix'!r} is none of {', '.join(FORMATS)}"
        )
    if not _is_file(path):
        raise ArtifactError(f"embeddings file {path} does not exist; is its slide finished?")
    return path, _READERS[path.suffix]


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


def _check_most(shape: tuple[int, ...], most: int | None) -> None:
    if most is not None and math.prod(shape) > most:
        raise ArtifactError(f"announces shape {shape}, more than the {most:,} numbers of its sidecar")


def _read_pt(path: Path, names: tuple[str, ...], most: int | None) -> torch.Tensor:
    import torch

    size = path.stat().st_size
    if zipped := _starts_with(path, b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            if any(info.file_size != info.compress_size for info in archive.infolist()):
                raise ArtifactError("is compressed, which torch.save never does")
            for info in archive.infolist():
                if info.filename.endswith("data.pkl"):
                    _check_pickle(io.BytesIO(archive.read(info)))
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
    # Mapped: what a damaged file says of the length of its data is held against the file's own.
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(found, torch.Tensor):
        raise ArtifactError(f"holds a {type(found).__name__}, not one tensor")
    if found.layout is not torch.strided or found.device.type != "cpu":
        raise ArtifactError(f"holds a {found.layout} tensor on {found.device}, not a plain one")
    check_bytes(tuple(found.shape), found.itemsize, size, compressed=False)
    _check_most(tuple(found.shape), most)
    return found.detach().clone(memory_format=torch.contiguous_format)


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse what makes something else than tensors: `bytearray(2**31)` is a few bytes of pickle, and one of
    the things that PyTorch calls even with weights_only.

    Raises:
        ArtifactError, ValueError: naming it, or it is no pickle of ours.
    """
    texts = ["", ""]
    for code, argument, _ in pickletools.genops(file):
        if "UNICODE" in code.name:
            texts = [texts[1], str(argument)]
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            module, name = texts if argument is None else str(argument).split(" ", 1)
            if module.partition(".")[0] != "torch" and (module, name) != ("collections", "OrderedDict"):
                raise ArtifactError(f"asks for {module}.{name}, which a tensor does not need")


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _read_npz(path: Path, names: tuple[str, ...], most: int | None) -> NDArray[Any] | None:
    found = read_npz(path, names, most=most)
    return next((_native(found[name]) for name in names if name in found), None)


def _read_safetensors(path: Path, names: tuple[str, ...], most: int | None) -> torch.Tensor | None:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        name = next((name for name in names if name in known), None)
        if name is None:
            return None
        _check_most(tuple(file.get_slice(name).get_shape()), most)
        found: torch.Tensor = file.get_tensor(name)
        return found.clone(memory_format=torch.contiguous_format)  # off the map of the file


def _read_h5(path: Path, names: tuple[str, ...], most: int | None) -> NDArray[Any] | None:
    import h5py

    size = path.stat().st_size
    # Not locked: network file systems refuse it, and nobody writes into a file that is in place.
    with h5py.File(path, "r", locking=False) as file:
        name = next((name for name in names if _has(file, name)), None)
        if name is None:
            return None
        dataset = _dataset(file, name, size)
        _check_most(dataset.shape, most)
        found: NDArray[Any] = dataset[()]
        if name == "features" and found.ndim == 3 and len(found) == 1 and _has(file, "coords"):
            # As loaders of CLAM-like files allow. One region of a hierarchical model has one coordinate.
            found = found[0] if len(_dataset(file, "coords", size)) == found.shape[1] else found
    return _native(found)


def _has(file: Any, name: str) -> bool:
    """Whether the root has a link of that name; `name in file` would follow it, even to other files."""
    return bool(file.id.links.exists(name.encode()))


def _dataset(file: Any, name: str, file_bytes: int) -> Any:
    """A dataset whose data is in this file, all of it."""
    import h5py

    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ArtifactError(f"keeps {name} behind a link, which may lead to other files")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ArtifactError(f"has a group instead of an array {name}")
    layout = dataset.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
        raise ArtifactError(f"keeps {name} in other files")
    filters = [layout.get_filter(index)[0] for index in range(layout.get_nfilters())]
    if not set(filters) <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_LZF}:
        raise ArtifactError(f"compresses {name} with filters {filters}; gzip, lzf and shuffle are known")
    if dataset.shape is None or dataset.dtype.kind not in "fiu":
        raise ArtifactError(f"has {dataset.dtype} for {name}, not numbers")
    itemsize = dataset.dtype.itemsize
    check_bytes(dataset.shape, itemsize, file_bytes, compressed=bool(filters))
    check_bytes(dataset.chunks or (), itemsize, file_bytes, compressed=True)
    stored = dataset.id.get_storage_size()
    if stored > file_bytes or (not filters and stored < dataset.size * itemsize):
        raise ArtifactError(f"has {stored:,} bytes for {name} of shape {dataset.shape}: not all was written")
    return dataset


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """In the byte order of this machine, contiguous; PyTorch takes no other."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)


_READERS: dict[str, _Read] = {
    ".pt": _read_pt,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".h5": _read_h5,
}
