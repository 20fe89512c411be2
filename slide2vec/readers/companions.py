"""Which files a slide is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slide2vec.readers.dicomhead import dicom_head, dicom_series

__all__ = ["SlideFiles", "files_of"]

#: A slide's files, each with its place in the folder that a copy of the slide goes to; the first is the one
#: to open.
SlideFiles = list[tuple[Path, Path]]

#: Of Hamamatsu: text files that name any number of pictures, which is not followed here.
_INDEXES = {".vms", ".vmu"}


def files_of(path: Path) -> SlideFiles | None:
    """The files of a slide, found as OpenSlide finds them; None where they are not known.

    MRXS: the file and all in the folder of its stem. DICOM: the files beside it with its
    SeriesInstanceUID. All else but Hamamatsu's VMS and VMU: the file itself.

    Raises:
        OSError: they cannot be listed or read.
    """
    suffix = path.suffix.lower()
    if suffix in _INDEXES:
        return None
    if suffix == ".mrxs":
        return [(path, Path(path.name)), *_below(path.with_suffix(""), Path(path.stem))]
    if dicom_head(path) is None:
        return [(path, Path(path.name))]
    others = [head.path for head in dicom_series(path) if head.path.name != path.name]
    return [(path, Path(path.name)), *((other, Path(other.name)) for other in others)]


def _below(folder: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _below(item, place / item.name)
        else:
            yield item, place / item.name
