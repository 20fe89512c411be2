"""A features file in each of the four formats; the same bytes for the same content."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slide2vec.choices import OutputFormat
from slide2vec.errors import ArtifactError
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = ["FeatureFile", "coords_attributes", "write_feature_file"]

#: torch dtype -> what a safetensors header calls it.
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFile:
    """What goes into a features file, whatever its format.

    Attributes:
        name: of the array, "features" or "latents".
        values: any shape, float16, bfloat16, float32 or float64.
        coords: (N, 2) int64, x and y of the tiles (or regions) in level-0 px; None where there are none.
        metadata: metadata of a safetensors file.
        values_attributes, coords_attributes: attributes of the two datasets of an h5 file.
    """

    name: str
    values: torch.Tensor
    coords: NDArray[np.int64] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    values_attributes: Mapping[str, str] = field(default_factory=dict)
    coords_attributes: Mapping[str, str | int | float] = field(default_factory=dict)


def coords_attributes(tiling: Tiling) -> dict[str, str | int | float]:
    """Attributes of `coords` in an h5 file: TRIDENT's, CLAM's where they are true, and ours.

    Both have a `patch_size`. TRIDENT's is the side at the target magnification, CLAM's that at
    `patch_level`: we write TRIDENT's, and `patch_level` only where both are one, so that CLAM, which
    cannot resize what it reads, refuses to read other tiles than were embedded.
    """
    geometry = tiling.geometry
    size = geometry.requested_tile_size_px
    # Nominal magnifications (40x, 20x) are off by some percent; TRIDENT computes sizes from their
    # ratio. These give tile_size_lv0.
    target = 10.0 / geometry.requested_spacing_um
    found: dict[str, str | int | float] = {
        "name": tiling.sample_id,
        "patch_size": size,
        "patch_size_level0": geometry.tile_size_lv0,
        "level0_magnification": _rounded(target * geometry.tile_size_lv0 / size),
        "target_magnification": _rounded(target),
        "overlap": size - max(1, round(size * (1.0 - geometry.overlap))),
        "level0_width": tiling.dimensions[0],
        "level0_height": tiling.dimensions[1],
        "spacing_um": geometry.requested_spacing_um,
        "base_spacing_um": geometry.base_spacing_um,
        "tile_size_lv0": geometry.tile_size_lv0,
    }
    if geometry.read_tile_size_px == size:
        downsample = tiling.downsamples[geometry.read_level]
        found |= {"patch_level": geometry.read_level, "downsample": downsample}
    return found


def _rounded(magnification: float) -> int | float:
    """40.0 as 40, as TRIDENT writes it."""
    whole = round(magnification)
    return whole if math.isclose(magnification, whole, rel_tol=1e-9) else magnification


def write_feature_file(path: Path, content: FeatureFile, file_format: OutputFormat) -> None:
    """Write a features file.

    Raises:
        ArtifactError: the format has no such dtype.
        OSError: the file cannot be written; whatever the format's library makes of that.
    """
    with _recording(path) as file:
        _WRITERS[file_format](file, content)


@contextmanager
def _recording(path: Path) -> Iterator[BinaryIO]:
    with path.open("w+b") as raw:
        file = _RecordingFile(raw)
        try:
            yield file  # type: ignore[misc]  # RawIOBase is all that is needed of a BinaryIO
        finally:
            if file.error is not None:
                raise file.error


class _RecordingFile(io.RawIOBase):
    """Takes every write, and keeps the first OSError for the caller to raise.

    On a full disk PyTorch raises a RuntimeError (or dies in a destructor) and HDF5 leaves its file
    open, each in its own words; neither sees it, and what went wrong is raised after them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def _try(self, call: Callable[[], int | None], otherwise: int) -> int:
        if self.error is None:
            try:
                done = call()
                return otherwise if done is None else done
            except OSError as error:
                self.error = error
        return otherwise

    def write(self, data: Any) -> int:
        return self._try(lambda: self._file.write(data), memoryview(data).nbytes)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._try(lambda: self._file.seek(offset, whence), 0)

    def tell(self) -> int:
        return self._try(self._file.tell, 0)

    def truncate(self, size: int | None = None) -> int:
        return self._try(lambda: self._file.truncate(size), 0)

    def readinto(self, buffer: Any) -> int:
        return self._try(lambda: self._file.readinto(buffer), 0)  # type: ignore[attr-defined]

    def flush(self) -> None:
        self._try(lambda: self._file.flush(), 0)

    def readable(self) -> bool:
        return True

    writable = seekable = readable


def _write_pt(file: BinaryIO, content: FeatureFile) -> None:
    import torch

    values = content.values
    if values.untyped_storage().nbytes() != values.nbytes:
        values = values.clone()  # a view would store the whole tensor behind it
    torch.save(values, file)


def _write_npz(file: BinaryIO, content: FeatureFile) -> None:
    arrays = {content.name: _as_array(content)}
    if content.coords is not None and content.values.ndim == 2:
        arrays["tile_index"] = np.arange(len(content.coords), dtype=np.int64)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # A ZipInfo has a constant date; force_zip64, because the size is not known beforehand.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_safetensors(file: BinaryIO, content: FeatureFile) -> None:
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


def _write_h5(file: BinaryIO, content: FeatureFile) -> None:
    import h5py

    with h5py.File(file, "w") as target:
        values = target.create_dataset(content.name, data=_as_array(content), track_times=False)
        values.attrs.update(content.values_attributes)
        if content.coords is not None:
            coords = target.create_dataset("coords", data=content.coords, track_times=False)
            coords.attrs.update(content.coords_attributes)


def _as_array(content: FeatureFile) -> NDArray[Any]:
    try:
        return content.values.numpy()
    except TypeError:
        raise ArtifactError(
            f"{content.values.dtype} cannot be stored as npz or h5: convert it to float32 or float16, or "
            "write pt or safetensors"
        ) from None


_WRITERS: dict[OutputFormat, Callable[[BinaryIO, FeatureFile], None]] = {
    "pt": _write_pt,
    "npz": _write_npz,
    "safetensors": _write_safetensors,
    "h5": _write_h5,
}
