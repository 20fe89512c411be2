"""Which files a slide is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slide2vec.readers.dicom_head import dicom_head, dicom_series

__all__ = ["SlideFiles", "bytes_of", "folder_of", "slide_files"]

#: A slide's files, each with its place in the folder that a copy of the slide goes to; the first is the one
#: to open.
SlideFiles = list[tuple[Path, Path]]

#: Of Hamamatsu: text files that name any number of pictures, which is not followed here.
_INDEXES = frozenset({".vms", ".vmu"})
#: Slides of several files that lie beside the one that is named.
_SIDE_BY_SIDE = _INDEXES | {".dcm"}


def slide_files(path: Path) -> SlideFiles | None:
    """The files of a slide, found as OpenSlide finds them; None where they are not known.

    MRXS: the file and all in the folder of its stem. DICOM: the files beside it with its
    SeriesInstanceUID. All else but Hamamatsu's VMS and VMU: the file itself.

    Raises:
        OSError: they cannot be listed or read.
    """
    if path.suffix.lower() in _INDEXES:
        return None
    folder = folder_of(path)
    if folder is not None:
        return [(path, Path(path.name)), *_below(folder, Path(path.stem))]
    if dicom_head(path) is None:
        return [(path, Path(path.name))]
    others = [head.path for head in dicom_series(path) if head.path.name != path.name]
    return [(path, Path(path.name)), *((other, Path(other.name)) for other in others)]


def folder_of(path: Path) -> Path | None:
    """The folder beside a slide that holds the rest of it and nothing else; only MRXS has one."""
    return path.with_suffix("") if path.suffix.lower() == ".mrxs" else None


def bytes_of(path: Path) -> int:
    """The length of a slide, all its files, without a look into any of them: what lies beside it counts where
    the rest of such slides does. A directory counts as a whole.

    Raises:
        OSError: it is not there.
    """
    if path.is_dir():
        return _all_in(path)
    if path.suffix.lower() in _SIDE_BY_SIDE:
        path.stat()
        return _all_in(path.parent)
    folder = folder_of(path)
    return path.stat().st_size + (0 if folder is None else _all_in(folder))


def _all_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _below(folder: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _below(item, place / item.name)
        else:
            yield item, place / item.name
