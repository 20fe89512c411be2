"""What goes into a features file, and which module (`*_format.py`) writes and reads each format."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from numpy.typing import NDArray

from slide2vec.choices import OUTPUT_FORMATS, OutputFormat
from slide2vec.errors import ArtifactError
from slide2vec.labels import split_class_name
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = [
    "FeatureFile",
    "FormatModule",
    "as_array",
    "coords_attributes",
    "format_module",
    "write_feature_file",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFile:
    """What goes into a features file, whatever its format.

    Attributes:
        name: of the array, "features" or "latents".
        values: any shape, float16, bfloat16, float32 or float64.
        coords: (N, 2) int64, x and y of the tiles (or regions) in level-0 px; None where there are none. In
            files for other tools they may be in µm, float32.
        metadata: metadata of a safetensors file.
        values_attributes, coords_attributes, file_attributes: of the two datasets of an h5 file, and of the
            file itself.
    """

    name: str
    values: torch.Tensor
    coords: NDArray[Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    values_attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    coords_attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    file_attributes: Mapping[str, str | int | float] = field(default_factory=dict)


class FormatModule(Protocol):
    """What the module of a format has (`EmbeddingFormat.home`)."""

    def write(self, file: BinaryIO, content: FeatureFile) -> None:
        """Write it all; the same bytes for the same content.

        Raises:
            ArtifactError: the format has no such dtype.
        """
        ...

    def read(self, path: Path, names: tuple[str, ...], most: int | None) -> Any:
        """The first array that there is of these names, a tensor or NumPy's; None where there is none.

        Args:
            most: numbers that it may have.

        Raises:
            ArtifactError: it is not to be trusted; others as the parser likes.
        """
        ...


def format_module(name: str) -> FormatModule:
    """The module that writes and reads a format."""
    return cast(FormatModule, import_module(OUTPUT_FORMATS[name].home))


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
        "name": split_class_name(tiling.sample_id)[1],
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
        format_module(file_format).write(file, content)


@contextmanager
def _recording(path: Path) -> Iterator[BinaryIO]:
    with path.open("w+b") as raw:
        file = _RecordingFile(raw)
        try:
            yield file  # type: ignore[misc]  # RawIOBase is all that is needed of a BinaryIO
        finally:
            file.close()  # else its destructor would flush what is closed by then, and Python 3.13 says so
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


def as_array(content: FeatureFile) -> NDArray[Any]:
    """The values for NumPy.

    Raises:
        ArtifactError: it has no such dtype.
    """
    try:
        return content.values.numpy()
    except TypeError:
        raise ArtifactError(
            f"{content.values.dtype} cannot be stored as npz or h5: convert it to float32 or float16, or "
            "write pt or safetensors"
        ) from None
