"""Look at a slide file before any library opens it: its tags only, no pixels.

Some libraries crash on files they cannot read, or read them wrongly; what is found here decides
which may have a file.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile

from slide2vec.choices import BACKENDS
from slide2vec.errors import SlideOpenError
from slide2vec.files import is_remote, open_plain
from slide2vec.readers.dicom_head import dicom_series, is_dicom
from slide2vec.readers.dicom_levels import DicomLevel, dicom_claims, dicom_levels, doubted
from slide2vec.readers.refusal import COPY_AGAIN, Refusal
from slide2vec.readers.spacing import SpacingCandidate, choose_spacing
from slide2vec.readers.tiff_bounds import Directory, check_bounds
from slide2vec.readers.tiff_images import find_slide, vendor_of
from slide2vec.readers.tiff_levels import TiffLevel
from slide2vec.readers.tiff_pixels import refuse_contradictions
from slide2vec.readers.tiff_spacing import tiff_claims
from slide2vec.readers.unsupported import unsupported_reason
from slide2vec.slides import Slide

__all__ = ["Probe", "TiffLevel", "probe"]

logger = logging.getLogger(__name__)

Kind = Literal["tiff", "dicom", "mrxs", "unrecognised"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: What tifffile raises on tags that make no sense.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file is, as far as its tags say.

    Attributes:
        path: the file, or the copy of it that is opened.
        origin: the file, for messages.
        name: the slide's sample_id, for messages.
        kind: container: "tiff", "dicom", "mrxs", or "unrecognised" (OpenSlide may know it).
        vendor: of a TIFF: aperio, hamamatsu, philips, leica, ventana, trestle, ome or generic; else "".
        levels: of a TIFF, level 0 first; else empty.
        dicom_levels: of a DICOM slide, level 0 first; else empty.
        planning: the first so many levels are those that OpenSlide, cuCIM and HS2P see. Levels and grids are
            chosen among them, so that coordinates are HS2P's; the others are only there to be read.
        spacing_um, spacing_source: as in SlideReader.
        claims: what the tags say of the spacing, the most trustworthy first.
        directories: all those of a TIFF, whatever they hold.
        refused: why no reader of ours may have the file; "" where they may.
    """

    path: Path
    origin: Path
    name: str
    kind: Kind
    vendor: str = ""
    levels: tuple[TiffLevel, ...] = ()
    dicom_levels: tuple[DicomLevel, ...] = ()
    planning: int = 0
    spacing_um: float | None = None
    spacing_source: str = "not read from the tags"
    claims: tuple[SpacingCandidate, ...] = ()
    directories: tuple[Directory, ...] = ()
    refused: str = ""


def probe(slide: Slide, copy: Path | None = None) -> Probe:
    """Inspect a slide's file, in a copy where there is one.

    Raises:
        SlideOpenError: there is no such file, it is a directory, empty, truncated or no slide.
    """
    path, name = slide.image_path, slide.sample_id
    if copy is None and is_remote(path):
        raise SlideOpenError(
            f"slide {name}: {path} is on remote storage and is copied before it can be read: give "
            "ExecutionOptions(stage_dir=…) (--stage-dir), a folder on a local disk"
        )
    opened = copy or path
    head = _head(opened, path, name)
    kind = _kind(path, head)
    if kind != "dicom" and (why := unsupported_reason(path, opened, head)):
        if BACKENDS.theirs:
            return Probe(path=opened, origin=path, name=name, kind="unrecognised", refused=why)
        raise SlideOpenError(f"slide {name}: {path} {why}")
    if kind == "dicom":
        return _probe_dicom(opened, path, name)
    if kind != "tiff":
        return Probe(path=opened, origin=path, name=name, kind=kind)
    try:
        directories = tuple(check_bounds(opened))
        with tifffile.TiffFile(opened) as tiff:
            found = _probe_tiff(path, name, list(tiff.pages), opened.stat().st_size)
        return replace(found, path=opened, directories=directories)
    except Refusal as error:
        raise SlideOpenError(f"slide {name}: {path} cannot be read: {error}") from error
    except (tifffile.TiffFileError, OSError) as error:
        raise SlideOpenError(
            f"slide {name}: {path} is a malformed or truncated TIFF ({error}); {COPY_AGAIN}"
        ) from error
    except _MALFORMED as error:
        raise SlideOpenError(
            f"slide {name}: {path} is a malformed TIFF: one of its tags has a value that makes no sense "
            f"({type(error).__name__}: {error}); {COPY_AGAIN}"
        ) from error


def _head(opened: Path, path: Path, name: str) -> bytes:
    try:
        with open_plain(opened) as file:
            head = file.read(256)
    except FileNotFoundError:
        raise SlideOpenError(f"slide {name}: there is no file {path}") from None
    except IsADirectoryError:
        files = "the slide file itself, of a DICOM slide any file of its series"
        raise SlideOpenError(f"slide {name}: {path} is a directory; give {files}") from None
    except OSError as error:
        raise SlideOpenError(f"slide {name}: {path} cannot be opened: {error}") from error
    if not head:
        raise SlideOpenError(f"slide {name}: {path} is empty (0 bytes); copy it again from its source")
    return head


def _kind(path: Path, head: bytes) -> Kind:
    if is_dicom(head):  # first: what comes before may be the header of a TIFF that has the same pixels
        return "dicom"
    if head[:4] in _TIFF_MAGIC:
        return "tiff"
    return "mrxs" if path.suffix.lower() == ".mrxs" else "unrecognised"


def _probe_dicom(opened: Path, path: Path, name: str) -> Probe:
    try:
        levels = dicom_levels(dicom_series(opened), opened)
    except (OSError, ValueError) as error:
        raise SlideOpenError(f"slide {name}: {path} cannot be read: {error}") from error
    claims = tuple(dicom_claims(levels[0]))
    if doubt := doubted(claims):
        logger.warning("slide %s: %s %s", name, path, doubt)
    spacing_um, source = choose_spacing(claims)
    return Probe(
        path=opened,
        origin=path,
        name=name,
        kind="dicom",
        dicom_levels=levels,
        spacing_um=spacing_um,
        spacing_source=source,
        claims=claims,
    )


def _probe_tiff(path: Path, name: str, pages: list[Any], size: int) -> Probe:
    if not pages:
        raise Refusal("it is a truncated TIFF: it holds no image directory")
    for page in pages:
        _refuse_impossible(page)
        _refuse_truncated(page, size)
    vendor = vendor_of(pages)
    found = find_slide(vendor, pages, path.name)
    levels, planning = found.levels
    refuse_contradictions(levels, found.page)
    claims = tuple(tiff_claims(vendor, found.page, found.ome))
    spacing_um, source = choose_spacing(claims)
    return Probe(
        path=path,
        origin=path,
        name=name,
        kind="tiff",
        vendor=vendor,
        levels=levels,
        planning=planning,
        spacing_um=spacing_um,
        spacing_source=source,
        claims=claims,
    )


def _refuse_impossible(page: Any) -> None:
    sides = {"ImageWidth": page.imagewidth, "ImageLength": page.imagelength}
    if page.is_tiled:
        sides |= {"TileWidth": page.tilewidth, "TileLength": page.tilelength}
    for name, side in sides.items():
        if side < 1:
            raise Refusal(f"{name} of directory {page.index} is {side}: the file is damaged; {COPY_AGAIN}")
    counts = len(page.dataoffsets), len(page.databytecounts)
    if not all(counts) or counts[0] != counts[1]:
        raise Refusal(
            f"directory {page.index} has {counts[0]} offsets and {counts[1]} byte counts of tiles or strips: "
            f"the file is damaged; {COPY_AGAIN}"
        )


def _refuse_truncated(page: Any, size: int) -> None:
    end = int((np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)).max())
    if end > size:
        raise Refusal(
            f"it is truncated: it has {size} bytes and directory {page.index} points to byte {end}; "
            f"{COPY_AGAIN}"
        )
