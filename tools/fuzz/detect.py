"""Whether what a slide file holds tells that pixels are wrong: found from its bytes alone."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator

from tools.fuzz.strict import CODECS, DICOM_CODECS, fault
from tools.fuzz.tiffmap import Directory, Tiff, read_tiff

__all__ = ["Box", "evidence"]

#: (x, y, width, height) in px of a level.
Box = tuple[int, int, int, int]


def evidence(data: bytes, size: tuple[int, int], boxes: Iterable[Box]) -> str | None:
    """What in the file tells that the compressed tiles under the boxes are damaged; None for nothing.

    Args:
        data: the damaged file.
        size: (width, height) of the level that was read.
        boxes: where its pixels are not the right ones.
    """
    try:
        if data[128:132] == b"DICM":
            return _dicom_evidence(data, size, list(boxes))
        return _tiff_evidence(read_tiff(data), size, list(boxes))
    except (ValueError, struct.error, OverflowError) as error:
        return f"its structure: {error}"


def _under(boxes: Iterable[Box], across: int, tile: tuple[int, int]) -> set[int]:
    """Numbers of the tiles under boxes."""
    return {
        row * across + column
        for x, y, width, height in boxes
        for row in range(y // tile[1], (y + height - 1) // tile[1] + 1)
        for column in range(x // tile[0], (x + width - 1) // tile[0] + 1)
    }


def _tiff_evidence(tiff: Tiff, size: tuple[int, int], boxes: list[Box]) -> str | None:
    of_size = (each for each in tiff.directories if _size(tiff, each) == size)
    directory = next(of_size, None)
    if directory is None:
        return None
    return next(_tile_faults(tiff, directory, size, boxes), None)


def _size(tiff: Tiff, directory: Directory) -> tuple[int, int]:
    return tiff.values(directory, 256, (0,))[0], tiff.values(directory, 257, (0,))[0]


def _tile_faults(tiff: Tiff, directory: Directory, size: tuple[int, int], boxes: list[Box]) -> Iterator[str]:
    def first(tag: int, default: int) -> int:
        return tiff.values(directory, tag, (default,))[0]

    width, height = size
    samples, planes = first(277, 1), first(277, 1) if first(284, 1) == 2 else 1
    tiled = 322 in directory.entries
    tile = (first(322, 0), first(323, 0)) if tiled else (width, min(first(278, height), height))
    if min(tile) < 1:
        yield f"tiles of {tile} px"
        return
    across, down = -(-width // tile[0]), -(-height // tile[1])
    offsets = tiff.values(directory, 324 if tiled else 273)
    counts = tiff.values(directory, 325 if tiled else 279)
    if not len(offsets) == len(counts) == across * down * planes:
        yield f"{len(offsets)} offsets and {len(counts)} counts of {across * down * planes} tiles"
        return
    codec = CODECS.get(first(259, 1), "another")
    for number in sorted(_under(boxes, across, tile)):
        rows = tile[1] if tiled else min(tile[1], height - number // across * tile[1])
        for plane in range(planes):
            at = number + plane * across * down
            data = tiff.data[offsets[at] : offsets[at] + counts[at]]
            if counts[at] == 0:
                continue  # left out, as sparse files do
            if len(data) < counts[at]:
                yield f"tile {at} lies beyond the file"
            elif wrong := fault(
                codec, data, (rows, tile[0], samples // planes), tiff.content(directory, 347)
            ):
                yield f"tile {at}: {wrong}"


def _dicom_evidence(data: bytes, size: tuple[int, int], boxes: list[Box]) -> str | None:
    import pydicom
    from pydicom.encaps import generate_frames

    try:
        file = pydicom.dcmread(io.BytesIO(data), force=True)
        if (file.TotalPixelMatrixColumns, file.TotalPixelMatrixRows) != size:
            return None
        tile = (file.Columns, file.Rows)
        count, samples = int(file.NumberOfFrames), file.SamplesPerPixel
        codec = DICOM_CODECS.get(
            str(file.file_meta.TransferSyntaxUID).removeprefix("1.2.840.10008.1.2"), "another"
        )
        if codec == "native":
            length = tile[0] * tile[1] * samples
            frames = [file.PixelData[at * length : (at + 1) * length] for at in range(count)]
        else:
            frames = list(generate_frames(file.PixelData, number_of_frames=count))
    except Exception as error:  # pydicom raises what it likes over a damaged file
        return f"its structure: {type(error).__name__}: {error}"
    across, down = -(-size[0] // tile[0]), -(-size[1] // tile[1])
    full = file.get("DimensionOrganizationType") == "TILED_FULL"
    if len(frames) != count or (full and count != across * down):
        return f"{len(frames)} frames, {count} announced, {across * down} needed"
    numbers = sorted(_under(boxes, across, tile)) if full else range(count)
    for number in numbers:
        wrong = fault(
            codec,
            frames[number].rstrip(b"\0") if codec == "JPEG" else frames[number],
            (tile[1], tile[0], samples),
        )
        if wrong:
            return f"frame {number}: {wrong}"
    return None
