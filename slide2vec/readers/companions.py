"""Which files a slide is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["SlideFiles", "files_of"]

#: A slide's files, each with its place in the folder that a copy of the slide goes to; the first is the one
#: to open.
SlideFiles = list[tuple[Path, Path]]

#: Of Hamamatsu: text files that name any number of pictures, which is not followed here.
_INDEXES = {".vms", ".vmu"}
#: Where a DICOM file's SeriesInstanceUID is looked for: only small groups of tags come before it.
_DICOM_HEAD_BYTES = 65_536
#: Tag (0020,000E) with its value representation, in the encoding of whole-slide images (explicit, little
#: endian); two bytes of length and the value follow (DICOM PS3.5, 7.1.2).
_SERIES_TAG = b"\x20\x00\x0e\x00UI"


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
    head = _head(path)
    if head[128:132] != b"DICM":
        return [(path, Path(path.name))]
    series = _series(head)
    return None if series is None else [(path, Path(path.name)), *_of_series(path, series)]


def _below(folder: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _below(item, place / item.name)
        else:
            yield item, place / item.name


def _of_series(path: Path, series: bytes) -> Iterator[tuple[Path, Path]]:
    for item in path.parent.iterdir():
        if item.name != path.name and item.is_file() and _series(_head(item)) == series:
            yield item, Path(item.name)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return bytes(file.read(_DICOM_HEAD_BYTES))


def _series(head: bytes) -> bytes | None:
    """The SeriesInstanceUID of a DICOM file."""
    at = head.find(_SERIES_TAG)
    if head[128:132] != b"DICM" or at < 0:
        return None
    value = at + len(_SERIES_TAG) + 2
    return head[value : value + int.from_bytes(head[value - 2 : value], "little")].rstrip(b"\0 ")
