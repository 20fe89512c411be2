"""Embeddings as CLAM and TRIDENT read them: HDF5, with coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from slide2vec.artifacts.formats import FeatureFile, as_array
from slide2vec.errors import ArtifactError
from slide2vec.files.arrays import check_bytes, check_most, native

__all__ = ["dataset_in", "has_link", "read", "write"]


def write(file: BinaryIO, content: FeatureFile) -> None:
    import h5py

    with h5py.File(file, "w") as target:
        target.attrs.update(content.file_attributes)
        values = target.create_dataset(content.name, data=as_array(content), track_times=False)
        values.attrs.update(content.values_attributes)
        if content.coords is not None:
            coords = target.create_dataset("coords", data=content.coords, track_times=False)
            coords.attrs.update(content.coords_attributes)


def read(path: Path, names: tuple[str, ...], most: int | None) -> NDArray[Any] | None:
    import h5py

    size = path.stat().st_size
    # Not locked: network file systems refuse it, and nobody writes into a file that is in place.
    with h5py.File(path, "r", locking=False) as file:
        name = next((name for name in names if has_link(file, name)), None)
        if name is None:
            return None
        dataset = dataset_in(file, name, size)
        check_most(dataset.shape, most)
        found: NDArray[Any] = dataset[()]
        if name == "features" and found.ndim == 3 and len(found) == 1 and has_link(file, "coords"):
            # As loaders of CLAM-like files allow. One region of a hierarchical model has one coordinate.
            found = found[0] if len(dataset_in(file, "coords", size)) == found.shape[1] else found
    return native(found)


def has_link(file: Any, name: str) -> bool:
    """Whether the root has a link of that name; `name in file` would follow it, even to other files."""
    return bool(file.id.links.exists(name.encode()))


def dataset_in(file: Any, name: str, file_bytes: int) -> Any:
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
