"""Which files are DICOM, and which of them make up one slide: only their first bytes are read."""

from __future__ import annotations

import io
import logging
import stat
import struct
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "WHOLE_SLIDE",
    "DicomHead",
    "dicom_files",
    "dicom_float",
    "dicom_head",
    "dicom_integer",
    "dicom_item",
    "dicom_series",
    "dicom_text",
    "is_dicom",
    "partly_read",
    "uid_name",
]

logger = logging.getLogger(__name__)

#: Where "DICM" stands (PS3.10, 7.1); what comes before is anything, another format's header too.
MAGIC_AT, MAGIC = 128, b"DICM"
#: pydicom's validation is switched off for the whole process.
_reading = threading.Lock()
#: How much of a file is read for its head: enough for nearly all, and for those with large private groups.
_HEAD_BYTES = (65_536, 4 << 20)
#: SOP class of VL whole slide microscopy images (PS3.4, B.5).
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_SOP_CLASS, _IMAGE_TYPE, _SERIES = 0x00080016, 0x00080008, 0x0020000E


@dataclass(frozen=True)
class DicomHead:
    """What is known of a DICOM file without reading much of it.

    Attributes:
        path: the file.
        series: its SeriesInstanceUID, which all files of a slide share; "" where it has none.
        sop_class: UID of what it is (a whole-slide image, a CT image, …).
        flavour: of a whole-slide image: "VOLUME" for a level, "LABEL", "OVERVIEW", "THUMBNAIL", ….
    """

    path: Path
    series: str
    sop_class: str
    flavour: str

    @property
    def is_whole_slide(self) -> bool:
        """It is a picture of a slide: a level, its label, …."""
        return self.sop_class == WHOLE_SLIDE

    @property
    def is_level(self) -> bool:
        """It is a level of a slide, or a part of one."""
        return self.is_whole_slide and self.flavour == "VOLUME"


def is_dicom(head: bytes) -> bool:
    """Whether a file with these first bytes (132 are needed) is DICOM, whatever else they look like."""
    return head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def dicom_series(path: Path) -> list[DicomHead]:
    """The files of a DICOM slide, by name: those beside one of them that have its series; that one alone
    where it names no series.

    Raises:
        OSError: the folder or the file cannot be read.
        ValueError: `path` is not DICOM.
    """
    named = dicom_head(path)
    if named is None:
        raise ValueError(f"{path} is not DICOM")
    if not named.series:
        return [named]
    return [head for head in dicom_files(path.parent) if head.series == named.series]


def dicom_files(folder: Path) -> list[DicomHead]:
    """The DICOM files of a folder, whatever their names are, by name.

    Raises:
        OSError: the folder cannot be read.
    """
    return [head for head in map(_neighbour, sorted(folder.iterdir())) if head is not None]


def _neighbour(path: Path) -> DicomHead | None:
    try:
        return dicom_head(path)
    except OSError as error:
        logger.info("%s is not looked at for parts of a DICOM slide: %s", path, error)
        return None


def dicom_head(path: Path) -> DicomHead | None:
    """The head of a file; None of one that is not DICOM, and of a folder, pipe or device.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size < MAGIC_AT + len(MAGIC):
        return None
    return _head(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=65_536)
def _head(path: Path, inode: int, size: int, mtime_ns: int) -> DicomHead | None:
    """Kept, so that opening every slide of a folder does not read all of its files each time."""
    with path.open("rb", buffering=0) as file:
        if not is_dicom(file.read(MAGIC_AT + len(MAGIC))):
            return None
        for limit in _HEAD_BYTES:
            file.seek(0)
            found = partly_read(file.read(limit), _SERIES, (_SOP_CLASS, _IMAGE_TYPE, _SERIES))
            if found is not None or size <= limit:
                break
    if found is None:
        return DicomHead(path, "", "", "")
    series, sop_class, image_type = (dicom_text(found[0], tag) for tag in (_SERIES, _SOP_CLASS, _IMAGE_TYPE))
    return DicomHead(path, series, sop_class, "".join(image_type.split("\\")[2:3]).strip())


def partly_read(data: bytes, last: int, tags: tuple[int, ...] | None = None) -> tuple[Any, int] | None:
    """A pydicom data set of the elements up to the tag `last`, and the byte where they end; None where the
    data end before that, or are no data set.

    Args:
        data: the first bytes of a file, its preamble included.
        tags: the elements that are wanted, if not all.
    """
    from pydicom.config import disable_value_validation
    from pydicom.filereader import read_partial

    buffer = io.BytesIO(data)
    passed: list[int] = []

    def stop(tag: int, vr: str | None, length: int) -> bool:
        passed.extend([tag] if tag > last else [])
        return tag > last

    try:
        with _reading, disable_value_validation():  # which warns of what is not used, too
            found = read_partial(buffer, stop_when=stop, specific_tags=list(tags) if tags else None)
    except Exception:  # pydicom raises anything on damaged data: EOFError, struct.error, KeyError, …
        return None
    return (found, buffer.tell()) if passed else None


def dicom_text(found: Any, tag: int) -> str:
    """The text of an element of a data set; "" where there is none."""
    return _stored(found, tag).decode("ascii", "replace").strip("\0 ")


def dicom_integer(found: Any, tag: int) -> int:
    """The number of an element of two or four bytes; 0 where there is none."""
    value = _stored(found, tag)
    return int.from_bytes(value, "little") if len(value) in (2, 4) else 0


def dicom_float(found: Any, tag: int) -> float:
    """The number of an element in single precision; 0 where there is none."""
    value = _stored(found, tag)
    return float(struct.unpack("<f", value)[0]) if len(value) == 4 else 0.0


def dicom_item(found: Any, tag: int) -> Any | None:
    """The first item of a sequence, a data set; None where there is none."""
    try:
        items = found[tag].value
        return items[0] if items else None
    except Exception:  # as in `partly_read`
        return None


def _stored(found: Any, tag: int) -> bytes:
    """The bytes of an element: asking pydicom for its value would warn of what it dislikes."""
    try:
        value = found.get_item(tag).value
    except Exception:  # there is none, or it is damaged: as in `partly_read`
        return b""
    return value if isinstance(value, bytes) else b""


def uid_name(uid: str) -> str:
    """What DICOM calls an UID; the UID itself where it is not registered."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    return str(UID(uid, IGNORE).name)
