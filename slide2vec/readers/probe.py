"""Look at a slide file before any library opens it: its tags only, no pixels.

Some libraries crash on files they cannot read, or read them wrongly; what is found here decides
which may have a file.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from slide2vec.errors import SlideOpenError
from slide2vec.files import is_remote
from slide2vec.readers.dicomhead import dicom_files, dicom_series, is_dicom
from slide2vec.readers.dicomlevels import DicomLevel, dicom_levels
from slide2vec.readers.spacing import Claim, objective_claim, settle_spacing
from slide2vec.slides import Slide

__all__ = ["Probe", "TiffLevel", "probe"]

logger = logging.getLogger(__name__)

Kind = Literal["tiff", "dicom", "mrxs", "unrecognised"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NOT_SLIDES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF",
    b"PK\3\4": "a zip archive",
}
#: Sides of a pixel that differ by more are not square.
_SQUARE = 0.01
#: A spacing that differs by more from the size of the imaged volume is doubted.
_IMAGED = 0.05
_UNIT_MM = {"nm": 1e-6, "µm": 1e-3, "um": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3}


@dataclass(frozen=True, kw_only=True)
class TiffLevel:
    """One pyramid level of a TIFF file.

    Attributes:
        page: index of its directory in the file.
        width, height: in px.
        tile: (width, height) of its tiles in px, None when it is stored in strips.
        compression, photometric: their TIFF names ("JPEG", "YCBCR", …).
        predictor: 1 for none.
        planar: channels are stored apart.
        samples, bits: channels per pixel, bits per channel.
        offsets, counts: (n,) int64 position and bytes of each tile, row-major; 0 bytes = left out.
        jpeg_tables: what JPEG tiles share.
    """

    page: int
    width: int
    height: int
    tile: tuple[int, int] | None
    compression: str
    predictor: int
    photometric: str
    planar: bool
    samples: int
    bits: int
    offsets: NDArray[np.int64] = field(repr=False, compare=False)
    counts: NDArray[np.int64] = field(repr=False, compare=False)
    jpeg_tables: bytes | None = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file is, as far as its tags tell.

    Attributes:
        path: the file, or the copy of it that is opened.
        origin: the file, for messages.
        name: the slide's sample_id, for messages.
        kind: container: "tiff", "dicom", "mrxs", or "unrecognised" (OpenSlide may know it).
        vendor: of a TIFF: aperio, hamamatsu, philips, leica, ventana, trestle, ome or generic; else "".
        levels: of a TIFF, level 0 first; else empty.
        dicom_levels: of a DICOM slide, level 0 first; else empty.
        spacing_um, spacing_source: as in SlideReader.
    """

    path: Path
    origin: Path
    name: str
    kind: Kind
    vendor: str = ""
    levels: tuple[TiffLevel, ...] = ()
    dicom_levels: tuple[DicomLevel, ...] = ()
    spacing_um: float | None = None
    spacing_source: str = "not read from the tags"


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
    kind = _kind(path, _head(opened, path, name), name)
    if kind == "dicom":
        return _probe_dicom(opened, path, name)
    if kind != "tiff":
        return Probe(path=opened, origin=path, name=name, kind=kind)
    try:
        with tifffile.TiffFile(opened) as tiff:
            return replace(_probe_tiff(path, name, list(tiff.pages), opened.stat().st_size), path=opened)
    except (tifffile.TiffFileError, OSError, ValueError, LookupError, TypeError, struct.error) as error:
        raise SlideOpenError(
            f"slide {name}: {path} is a malformed or truncated TIFF ({error}); copy it again from its source"
        ) from error


def _head(opened: Path, path: Path, name: str) -> bytes:
    try:
        with opened.open("rb") as file:
            head = file.read(256)
    except FileNotFoundError:
        raise SlideOpenError(f"slide {name}: there is no file {path}") from None
    except IsADirectoryError:
        files = "any file of its series" if dicom_files(opened) else "the slide file itself"
        raise SlideOpenError(f"slide {name}: {path} is a directory; give {files}") from None
    except OSError as error:
        raise SlideOpenError(f"slide {name}: {path} cannot be opened: {error}") from error
    if not head:
        raise SlideOpenError(f"slide {name}: {path} is empty (0 bytes); copy it again from its source")
    return head


def _kind(path: Path, head: bytes, name: str) -> Kind:
    if is_dicom(head):  # first: what comes before may be the header of a TIFF that has the same pixels
        return "dicom"
    if head[:4] in _TIFF_MAGIC:
        return "tiff"
    if path.suffix.lower() == ".mrxs":
        return "mrxs"
    for magic, what in _NOT_SLIDES.items():
        if head.startswith(magic):
            raise SlideOpenError(
                f"slide {name}: {path} is {what}, not a slide; convert it to a tiled TIFF with its µm/px"
            )
    return "unrecognised"


def _probe_dicom(opened: Path, path: Path, name: str) -> Probe:
    try:
        levels = dicom_levels(dicom_series(opened), opened)
    except (OSError, ValueError) as error:
        raise SlideOpenError(f"slide {name}: {path} cannot be read as a slide: {error}") from error
    spacing_um, source = settle_spacing(_dicom_claims(levels[0], path, name))
    return Probe(
        path=opened,
        origin=path,
        name=name,
        kind="dicom",
        dicom_levels=levels,
        spacing_um=spacing_um,
        spacing_source=source,
    )


def _dicom_claims(level: DicomLevel, path: Path, name: str) -> Iterator[Claim]:
    """µm/px between columns; refused where rows lie otherwise, doubted where the imaged volume does."""
    imaged = level.volume_mm[0] * 1000 / level.width
    if level.spacing_um is not None:
        row, column = level.spacing_um
        if abs(row - column) > _SQUARE * max(row, column):
            raise SlideOpenError(
                f"slide {name}: {path} has pixels of {column:.6g} x {row:.6g} µm (PixelSpacing), and only "
                "square ones are read: resample it"
            )
        if imaged and abs(imaged - column) > _IMAGED * column:
            logger.warning(
                "slide %s: %s has %.4g µm/px by PixelSpacing, which is used, and %.4g by ImagedVolumeWidth",
                name,
                path,
                column,
                imaged,
            )
        yield "PixelSpacing", column
    elif imaged:
        yield "ImagedVolumeWidth", imaged


def _probe_tiff(path: Path, name: str, pages: list[Any], size: int) -> Probe:
    if not pages:
        raise SlideOpenError(f"slide {name}: {path} is a truncated TIFF: it holds no image directory")
    _refuse_truncated(path, name, pages, size)
    vendor = _vendor(pages[0])
    spacing_um, source = settle_spacing(_claims(vendor, pages[0]))
    return Probe(
        path=path,
        origin=path,
        name=name,
        kind="tiff",
        vendor=vendor,
        levels=tuple(_levels(vendor, pages)),
        spacing_um=spacing_um,
        spacing_source=source,
    )


def _refuse_truncated(path: Path, name: str, pages: list[Any], size: int) -> None:
    for page in pages:
        if not page.dataoffsets or not page.databytecounts:
            continue
        end = int((_int64(page.dataoffsets) + _int64(page.databytecounts)).max())
        if end > size:
            raise SlideOpenError(
                f"slide {name}: {path} is truncated: it has {size} bytes and directory {page.index} points "
                f"to byte {end}; copy it again from its source"
            )


def _int64(values: Any) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def _vendor(page: Any) -> str:
    text = page.description
    software = str(page.software)
    if text.startswith("Aperio"):
        return "aperio"
    if page.is_ndpi:
        return "hamamatsu"
    if software.startswith("Philips") or "DPUfsImport" in text:
        return "philips"
    if page.is_scn or "leica-microsystems.com/scn" in text:
        return "leica"
    if page.is_bif or "<iScan" in str(page.tags.valueof("XMP", b"")):
        return "ventana"
    if software.startswith("MedScan"):
        return "trestle"
    return "ome" if page.is_ome else "generic"


def _levels(vendor: str, pages: list[Any]) -> Iterator[TiffLevel]:
    """Level 0 and the tiled, ever smaller copies of it; label and macro pictures are not levels."""
    base = last = pages[0]
    yield _level(base)
    if not base.is_tiled:
        return
    for page in pages[1:]:
        reduced = vendor == "aperio" or page.subfiletype & 1
        same = (page.samplesperpixel, page.bitspersample) == (base.samplesperpixel, base.bitspersample)
        if page.is_tiled and reduced and same and page.imagewidth < last.imagewidth:
            last = page
            yield _level(page)


def _level(page: Any) -> TiffLevel:
    return TiffLevel(
        page=page.index,
        width=page.imagewidth,
        height=page.imagelength,
        tile=(page.tilewidth, page.tilelength) if page.is_tiled else None,
        compression=getattr(page.compression, "name", str(page.compression)),
        predictor=int(page.predictor),
        photometric=getattr(page.photometric, "name", str(page.photometric)),
        planar=int(page.planarconfig) == 2 and page.samplesperpixel > 1,
        samples=page.samplesperpixel,
        bits=page.bitspersample,
        offsets=_int64(page.dataoffsets),
        counts=_int64(page.databytecounts),
        jpeg_tables=page.jpegtables,
    )


def _claims(vendor: str, page: Any) -> Iterator[Claim]:
    """What the tags of level 0 claim its µm/px to be, the most trustworthy first."""
    text = page.description
    if vendor == "aperio":
        yield from (("mpp", value) for value in _numbers(r"\bMPP *= *([-+.\deE]+)", text))
    if vendor == "philips":
        pattern = r'DICOM_PIXEL_SPACING"[^>]*>\s*(?:"|&quot;)?([-+.\deE]+)'
        yield from (("DICOM_PIXEL_SPACING", value * 1000) for value in _numbers(pattern, text))
    if vendor == "ome":
        yield from _ome_claims(text)
    yield from _resolution_claims(page)
    if vendor == "aperio":
        yield from (objective_claim(value) for value in _numbers(r"\bAppMag *= *([-+.\deE]+)", text))
    if vendor == "hamamatsu":
        lens = page.tags.valueof(65421)
        yield from [objective_claim(float(lens))] if lens else []


def _numbers(pattern: str, text: str) -> Iterator[float]:
    """The number that the first match of `pattern` captures, if there is one."""
    found = re.search(pattern, text)
    if found:
        try:
            yield float(found[1])
        except ValueError:
            return


def _ome_claims(xml: str) -> Iterator[Claim]:
    unit = re.search(r'PhysicalSizeXUnit="([^"]*)"', xml)
    factor = _UNIT_MM.get(unit[1].replace("μ", "µ") if unit else "µm")
    if factor is not None:
        yield from (
            ("PhysicalSizeX", value * factor * 1e3) for value in _numbers(r'PhysicalSizeX="([^"]*)"', xml)
        )


def _resolution_claims(page: Any) -> Iterator[Claim]:
    """XResolution in pixels per inch (unit 2) or centimetre (3)."""
    um = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof("ResolutionUnit", 0)))
    pixels, per = page.tags.valueof("XResolution", (0, 0))
    if um and pixels and per:
        yield "resolution", um * per / pixels
