"""Arrays in .npz files from untrusted sources: bounded before they are read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ArtifactError
from slide2vec.files.atomic import READING_ARRAYS
from slide2vec.files.plain import plain_stat

__all__ = ["SMALL_BYTES", "check_bytes", "check_most", "check_sums", "native", "read_npz"]

#: A compressed array may be this many times as large as its file. Embeddings compress to half, with many
#: zeros to a tenth, coordinates to a twentieth; deflate could reach 1,032.
MAX_EXPANSION = 64
#: Smaller arrays are read whatever their compression: a slide of equal tiles is no attack.
SMALL_BYTES = 64 * 2**20
#: npy headers of plain arrays have 128 bytes.
_MOST_HEADER = 10_000
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_bytes(shape: Sequence[int], itemsize: int, file_bytes: int, *, compressed: bool) -> None:
    """Refuse an array that its file cannot hold, before it is allocated.

    Raises:
        ValueError: saying what it announces.
    """
    size = math.prod(shape) * itemsize
    limit = max(MAX_EXPANSION * file_bytes, SMALL_BYTES) if compressed else file_bytes
    if size > limit:
        raise ValueError(f"announces {size:,} bytes of shape {tuple(shape)}; the file has {file_bytes:,}")


def check_sums(path: Path) -> None:
    """Hold the content of a ZIP file (a .pt of PyTorch, which does not look) against its checksums: 1.2 GB/s.

    Raises:
        ValueError: one differs.
        zipfile.BadZipFile, …: it is damaged otherwise.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"is damaged: the checksum of {damaged} differs")


def read_npz(path: Path, names: Sequence[str], *, most: int | None = None) -> dict[str, NDArray[Any]]:
    """Those arrays of an .npz file that it has, of numbers.

    Args:
        most: elements that one of them may have, as a record says.

    Raises:
        OSError: it is no plain file, or cannot be read.
        ValueError: an array is not of numbers, or announces more than the file or the record allows.
        zipfile.BadZipFile, zlib.error, EOFError, …: it is damaged.
    """
    file_bytes = plain_stat(path).st_size
    found: dict[str, NDArray[Any]] = {}
    with READING_ARRAYS, zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name in names:
            if (info := members.get(f"{name}.npy")) is not None:
                with archive.open(info) as file:
                    _check(name, file, info, file_bytes, most)
                with archive.open(info) as file:
                    found[name] = np.lib.format.read_array(
                        file, allow_pickle=False, max_header_size=_MOST_HEADER
                    )
    return found


def _check(name: str, file: Any, info: zipfile.ZipInfo, file_bytes: int, most: int | None) -> None:
    """Raises ValueError where the header of an array announces what is not to be read."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"holds an array of npy version {version}; 1.0 and 2.0 are known")
    shape, _, dtype = _HEADERS[version](file, max_header_size=_MOST_HEADER)
    if dtype.kind not in "fiu":
        raise ValueError(f"holds {dtype}, not numbers")
    compressed = info.compress_type != zipfile.ZIP_STORED
    check_bytes(shape, dtype.itemsize, file_bytes, compressed=compressed)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"announces more data of shape {shape} than it has")
    if most is not None and math.prod(shape) > most:
        raise ValueError(f"announces {name} of shape {shape}, more than the {most:,} numbers of its record")


def check_most(shape: tuple[int, ...], most: int | None) -> None:
    """Raises ArtifactError for more numbers than there may be."""
    if most is not None and math.prod(shape) > most:
        raise ArtifactError(f"announces shape {shape}, more than the {most:,} numbers of its sidecar")


def native(array: NDArray[Any]) -> NDArray[Any]:
    """In the byte order of this machine, contiguous; PyTorch takes no other."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
