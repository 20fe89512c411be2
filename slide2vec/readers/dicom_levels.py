"""The levels of a DICOM slide: the instances of its series, each checked before it is believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slide2vec.geometry import is_plausible_spacing
from slide2vec.readers.dicom_frames import FrameTable, frame_table
from slide2vec.readers.dicom_head import (
    DicomHead,
    dicom_float,
    dicom_integer,
    dicom_item,
    dicom_text,
    partly_read,
    uid_name,
)
from slide2vec.readers.spacing import SpacingCandidate

__all__ = ["DicomLevel", "dicom_claims", "dicom_levels", "doubted"]

_IMPLICIT = "1.2.840.10008.1.2"
#: Transfer syntaxes whose frames are not compressed.
_NATIVE = frozenset({_IMPLICIT, "1.2.840.10008.1.2.1"})
#: Those whose data set cannot be read in place (PS3.5, A.3, A.5).
_NOT_IN_PLACE = {"1.2.840.10008.1.2.2": "in big endian", "1.2.840.10008.1.2.1.99": "deflated as a whole"}
_PHOTOMETRICS: Mapping[int, tuple[str, ...]] = {
    1: ("MONOCHROME2",),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}

_FRAMES, _PHOTOMETRIC, _PLANAR = 0x00280008, 0x00280004, 0x00280006
#: Total pixel matrix columns and rows, columns, rows.
_SIDES = (0x00480006, 0x00480007, 0x00280011, 0x00280010)
#: Samples per pixel, bits allocated, bits stored, pixel representation.
_SAMPLES = (0x00280002, 0x00280100, 0x00280101, 0x00280103)
_ORGANIZATION, _CONCATENATION, _FIRST_FRAME = 0x00209311, 0x00209161, 0x00209228
_FOCAL_PLANES, _OPTICAL_PATHS = 0x00480303, 0x00480302
_VOLUME_WIDTH, _VOLUME_HEIGHT = 0x00480001, 0x00480002
_SHARED_GROUPS, _MEASURES, _PIXEL_SPACING = 0x52009229, 0x00289110, 0x00280030

#: How much is read to find the functional groups: enough for all but those with huge colour profiles.
_HEADER_BYTES = (1 << 20, 64 << 20)
_BUFFER = 1 << 16
#: Of one frame, decoded; bounds what is allocated for a claim.
_MOST_FRAME_PX = 1 << 26
#: A compressed frame of more bytes than its pixels by such a factor and amount is a wrong claim.
_MOST_TIMES_RAW, _FRAME_OVERHEAD = 4, 1 << 20
#: Two spacings of one file that differ by more are reported.
_DOUBTED = 0.05
#: A level that an uncommon number of places is claimed for is believed up to so many empty ones per frame.
_EMPTY_PER_FRAME, _FEW_PLACES = 256, 1 << 16
#: Levels whose sides differ by more from one proportion, and by more than a tile, show different things.
_PROPORTION = 0.1


@dataclass(frozen=True, kw_only=True)
class DicomLevel:
    """A pyramid level, of one file or of the parts of a concatenation.

    Attributes:
        width, height: in px.
        tile: (width, height) of its frames in px.
        syntax: UID of the transfer syntax.
        photometric: as DICOM calls it: RGB, YBR_FULL_422, MONOCHROME2, ….
        samples: 1 or 3 per pixel, 8 bits each.
        planar: channels of uncompressed frames are stored apart.
        spacing_um: (row, column) µm/px; None where the file gives none.
        volume_mm: (width, height) of what was imaged, 0 where the file does not say.
        files: its files.
        file: (n,) int16 of each place of the level, row-major: in which of them its frame is.
        offsets, counts: (n,) int64 position and bytes of each place's frame; 0 bytes = left out.
    """

    width: int
    height: int
    tile: tuple[int, int]
    syntax: str
    photometric: str
    samples: int
    planar: bool
    spacing_um: tuple[float, float] | None
    volume_mm: tuple[float, float]
    files: tuple[Path, ...]
    file: NDArray[np.int16] = field(repr=False, compare=False)
    offsets: NDArray[np.int64] = field(repr=False, compare=False)
    counts: NDArray[np.int64] = field(repr=False, compare=False)


def dicom_levels(heads: Sequence[DicomHead], named: Path) -> tuple[DicomLevel, ...]:
    """The levels of a series, largest first; labels and overviews are none.

    Args:
        heads: of its files.
        named: the file that was asked for, for messages.

    Raises:
        OSError: a file cannot be read.
        ValueError: they are no slide, or not one that can be read, with the reason.
    """
    _refuse_no_slide(heads, named)
    parts: dict[str, list[_Instance]] = {}
    for head in heads:
        if head.is_level:
            with _naming(head.path, named):
                instance = _instance(head.path)
            parts.setdefault(instance.concatenation or str(head.path), []).append(instance)
    levels = []
    for group in parts.values():
        with _naming(group[0].path, named):
            levels.append(_level(group))
    levels.sort(key=lambda level: level.width * level.height, reverse=True)
    _refuse_several(levels)
    return tuple(levels)


def dicom_claims(level: DicomLevel) -> Iterator[SpacingCandidate]:
    """What a level claims its µm/px to be, the most trustworthy first."""
    if level.spacing_um is not None:
        row, column = level.spacing_um
        yield "PixelSpacing", column, row
    if level.volume_mm[0] > 0:
        yield "ImagedVolumeWidth", level.volume_mm[0] * 1000 / level.width


def doubted(claims: Sequence[SpacingCandidate]) -> str | None:
    """A warning where the size of the imaged volume contradicts the spacing, or None."""
    plausible = [claim[:2] for claim in claims if is_plausible_spacing(claim[1])]
    if len(plausible) < 2 or abs(plausible[0][1] - plausible[1][1]) <= _DOUBTED * plausible[0][1]:
        return None
    (source, used), (other, unused) = plausible
    return f"has {used:.4g} µm/px by {source}, which is used, and {unused:.4g} by {other}"


def _refuse_no_slide(heads: Sequence[DicomHead], named: Path) -> None:
    (head,) = (head for head in heads if head.path.name == named.name)
    if not head.sop_class:
        raise ValueError("its DICOM header cannot be read: it is damaged, or deflated as a whole")
    if not head.is_whole_slide:
        raise ValueError(f"it is a DICOM file, but no whole-slide image ({uid_name(head.sop_class)})")
    if not any(head.is_level for head in heads):
        raise ValueError(
            f"it is the {head.flavour.lower() or 'unnamed'} picture of a DICOM slide, and no level of that "
            "slide (same SeriesInstanceUID, ImageType VOLUME) lies beside it; put all files of the series "
            "into one folder"
        )


@contextmanager
def _naming(path: Path, named: Path) -> Iterator[None]:
    """Errors inside name the file where it is not the one asked for."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({path.name})" if path.name != named.name else str(error)) from error


def _refuse_several(levels: Sequence[DicomLevel]) -> None:
    """Raise where the series shows more than one picture."""
    base = levels[0]
    for larger, level in pairwise(levels):
        names = f"{larger.files[0].name} and {level.files[0].name}"
        if (larger.width, larger.height) == (level.width, level.height):
            raise ValueError(
                f"its series has two images of {level.width}x{level.height} px, {names}: several focal "
                "planes, channels or scans; put the files of the one that you want into a folder of their own"
            )
    for level in levels[1:]:
        expected = base.height * level.width / base.width
        if abs(level.height - expected) > max(level.tile[1], _PROPORTION * expected):
            raise ValueError(
                f"its series shows different pictures, {base.files[0].name} ({base.width}x{base.height} px) "
                f"and {level.files[0].name} ({level.width}x{level.height}): give each a folder of its own"
            )


# one file --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Instance:
    """A file: its own fields, and what it says of its level."""

    path: Path
    concatenation: str
    first: int
    table: FrameTable
    says: dict[str, Any]


def _instance(path: Path) -> _Instance:
    with path.open("rb", buffering=_BUFFER) as file:
        header, end = _header(file)
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        if syntax in _NOT_IN_PLACE:
            raise ValueError(
                f"it is stored {_NOT_IN_PLACE[syntax]} (transfer syntax {syntax}), which cannot be read; "
                "convert it with dcmconv or gdcmconv to explicit VR little endian"
            )
        says = _says(header, syntax)
        file.seek(end)
        sparse = dicom_text(header, _ORGANIZATION) != "TILED_FULL"
        frames = int(dicom_text(header, _FRAMES) or 1)
        table = frame_table(
            file,
            frames,
            explicit=syntax != _IMPLICIT,
            frame_bytes=_frame_bytes(says) if syntax in _NATIVE else None,
            positions=sparse and (frames > 1 or says["tile"] != (says["width"], says["height"])),
        )
    planes = max(table.planes, *(dicom_integer(header, tag) for tag in (_FOCAL_PLANES, _OPTICAL_PATHS)))
    if planes > 1:
        raise ValueError(
            f"it has {planes} focal planes or optical paths, and one is needed: export the one that you want"
        )
    return _Instance(
        path=path,
        concatenation=dicom_text(header, _CONCATENATION),
        first=dicom_integer(header, _FIRST_FRAME),
        table=table,
        says=says,
    )


def _header(file: BinaryIO) -> tuple[Any, int]:
    for limit in _HEADER_BYTES:
        file.seek(0)
        found = partly_read(file.read(limit), _SHARED_GROUPS)
        if found is not None:
            return found
    raise ValueError("its DICOM header is truncated or damaged")


def _says(header: Any, syntax: str) -> dict[str, Any]:
    """What a file says of its level, see `DicomLevel`."""
    width, height, columns, rows = (dicom_integer(header, tag) for tag in _SIDES)
    if not 0 < columns * rows <= _MOST_FRAME_PX or not width or not height:
        raise ValueError(f"it claims {width}x{height} px in frames of {columns}x{rows}, which cannot be")
    samples, allocated, stored, signed = (dicom_integer(header, tag) for tag in _SAMPLES)
    photometric = dicom_text(header, _PHOTOMETRIC)
    if (allocated, stored, signed) != (8, 8, 0) or photometric not in _PHOTOMETRICS.get(samples, ()):
        sign = "signed " if signed else ""
        raise ValueError(
            f"its pixels are {photometric} of {samples} channels with {stored} {sign}bits in {allocated}, "
            "and 8-bit RGB, YBR or MONOCHROME2 is read; export it as 8-bit RGB, if it is a brightfield scan"
        )
    return {
        "width": width,
        "height": height,
        "tile": (columns, rows),
        "syntax": syntax,
        "photometric": photometric,
        "samples": samples,
        "planar": dicom_integer(header, _PLANAR) == 1,
        "spacing_um": _spacing(header),
        "volume_mm": (dicom_float(header, _VOLUME_WIDTH), dicom_float(header, _VOLUME_HEIGHT)),
    }


def _spacing(header: Any) -> tuple[float, float] | None:
    """(row, column) µm/px that the shared functional groups give."""
    groups = dicom_item(header, _SHARED_GROUPS)
    measures = None if groups is None else dicom_item(groups, _MEASURES)
    if measures is None:
        return None
    try:
        row, column = (float(value) * 1000 for value in dicom_text(measures, _PIXEL_SPACING).split("\\"))
    except ValueError:
        return None
    return row, column


def _frame_bytes(says: dict[str, Any]) -> int:
    columns, rows = says["tile"]
    # YBR_FULL_422 has two samples per pixel where it is not compressed (PS3.3, C.7.6.3.1.2).
    return int(columns * rows * (2 if says["photometric"] == "YBR_FULL_422" else says["samples"]))


# levels ----------------------------------------------------------------------------------------


def _level(parts: list[_Instance]) -> DicomLevel:
    """The level that a file, or the parts of a concatenation, hold."""
    parts.sort(key=lambda part: part.first)
    says, tables = parts[0].says, [part.table for part in parts]
    if any(part.says != says for part in parts):
        raise ValueError("the parts of its concatenation contradict each other")
    (width, height), (columns, rows) = (says["width"], says["height"]), says["tile"]
    largest = max(int(table.counts.max()) for table in tables)
    if largest > _MOST_TIMES_RAW * 3 * columns * rows + _FRAME_OVERHEAD:
        raise ValueError(f"it claims a frame of {largest} bytes for {columns}x{rows} px")
    across, down = -(-width // columns), -(-height // rows)
    frames = sum(len(table.offsets) for table in tables)
    if across * down > max(_FEW_PLACES, _EMPTY_PER_FRAME * frames):
        raise ValueError(f"it claims {width}x{height} px, and has only {frames} frames of {columns}x{rows}")
    places = (
        _full(parts, across * down)
        if tables[0].corners is None
        else _sparse(tables, across, down, columns, rows)
    )
    file = np.zeros(across * down, np.int16)
    offsets, counts = np.zeros((2, across * down), np.int64)
    file[places] = np.repeat(np.arange(len(parts)), [len(table.offsets) for table in tables])
    offsets[places] = np.concatenate([table.offsets for table in tables])
    counts[places] = np.concatenate([table.counts for table in tables])
    paths = tuple(part.path for part in parts)
    return DicomLevel(**says, files=paths, file=file, offsets=offsets, counts=counts)


def _full(parts: Sequence[_Instance], places: int) -> NDArray[np.int64]:
    found = [part.first + np.arange(len(part.table.offsets)) for part in parts]
    places_of_frames = np.concatenate(found)
    if not np.array_equal(places_of_frames, np.arange(places)):
        missing = " (a part of its concatenation is missing)" if parts[0].concatenation else ""
        raise ValueError(f"it has {len(places_of_frames)} frames where its size needs {places}{missing}")
    return places_of_frames


def _sparse(
    tables: Iterable[FrameTable], across: int, down: int, columns: int, rows: int
) -> NDArray[np.int64]:
    corners = np.concatenate([table.corners for table in tables if table.corners is not None])
    x, y = corners[:, 0], corners[:, 1]
    outside = (x < 0) | (y < 0) | (x >= across * columns) | (y >= down * rows)
    if outside.any() or (x % columns).any() or (y % rows).any():
        raise ValueError("its frames do not lie side by side, on a grid of their own size")
    places: NDArray[np.int64] = y // rows * across + x // columns
    if len(np.unique(places)) != len(places):
        raise ValueError("it has several frames at one place: several focal planes or optical paths")
    return places
