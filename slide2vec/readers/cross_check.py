"""Cross-check: some compressed tiles of a slide, decoded independently of what reads it.

Of TIFFs that is tifffile, which finds tiles and their colours by its own code: its pixels were measured to be
those of cuCIM, libvips and OpenSlide wherever these are right. Of DICOM, and of containers that one library
only reads, there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from slide2vec.errors import Contradiction, SlideReadError
from slide2vec.readers.probe import TiffLevel
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.reader import SlideReader

__all__ = ["compare_with_second_decoder"]

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

#: Tiles that are compared, spread over those to be read.
COUNT = 4
#: Grey levels by which pixels may differ, by compression; 0 of all others. (Of JPEG, WebP, Aperio's JPEG
#: 2000 and all that is lossless no difference was measured; decoders of these may each round in their way.)
MOST_DIFFERENCE = {
    "APERIO_JP2000_YCBC": 2,
    "APERIO_JP2000_RGB": 2,
    "JPEG2000": 2,
    "JPEG_2000_LOSSY": 2,
    "JPEGXL": 2,
    "JPEGXR": 2,
}
#: A tile or strip of more px would cost more than this is worth: 50 MB of RGB.
_MOST_PIXELS = 1 << 24
#: Whose directories are the slide's levels, tile by tile, without overlap or offset.
_VENDORS = ("aperio", "generic", "ome", "philips")


def compare_with_second_decoder(reader: SlideReader, level: int, centres: NDArray[Any]) -> None:
    """Compare some compressed tiles with what an independent decoder makes of them, where there is one.

    A tile that one of them cannot decode is no contradiction: the reader reports damage as it reads.

    Args:
        level: that will be read.
        centres: (n, 2), x and y in level-0 px, of tiles that will be read; where there are none, places of
            the whole slide are taken.

    Raises:
        Contradiction: the pixels differ by more than they may.
    """
    spec = _comparable(reader, level)
    if spec is None or not isinstance(reader, PyramidReader):
        logger.debug("there is no second decoder for what %s reads", reader.backend)
        return
    if not len(centres):
        centres = (np.arange(COUNT)[:, None] + 0.5) / COUNT * reader.dimensions
    chosen = np.unique(np.linspace(0, len(centres) - 1, COUNT).astype(int))
    with tifffile.TiffFile(reader.path) as tiff:
        pages = [_page(tiff, spec, number) for number in spec.planes or (spec.page,)]
        for x, y in centres[chosen].tolist():
            _compare(reader, level, spec, pages, (x, y))


def _comparable(reader: SlideReader, level: int) -> TiffLevel | None:
    """What is to be decoded; None where tifffile gives no RGB pixels of it, or other ones by its design."""
    if not isinstance(reader, PyramidReader) or reader.probe.vendor not in _VENDORS:
        return None
    if level >= len(reader.probe.levels):
        return None
    spec = reader.probe.levels[level]
    plain = spec.photometric in ("RGB", "MINISBLACK") or (
        spec.photometric == "YCBCR" and spec.compression == "JPEG"
    )
    return spec if plain and spec.samples in (1, 3) else None


def _page(tiff: Any, spec: TiffLevel, number: int) -> Any:
    page = tiff.pages[number]
    return page if spec.subifd is None else page.pages[spec.subifd]


def _compare(
    reader: PyramidReader, level: int, spec: TiffLevel, pages: Sequence[Any], centre: tuple[float, float]
) -> None:
    width, height = reader.level_dimensions[level]
    page = pages[0]
    tile_w, tile_h = (page.tilewidth, page.tilelength) if page.is_tiled else (width, page.rowsperstrip)
    if tile_w * tile_h > _MOST_PIXELS:
        return
    column, row = (
        min(int(at / reader.downsamples[level]), side - 1) // tile
        for at, side, tile in zip(centre, (width, height), (tile_w, tile_h), strict=True)
    )
    x, y = column * tile_w, row * tile_h
    try:
        expected = _decoded(pages, row * -(-spec.width // tile_w) + column)
        if expected is None:
            return
        expected = expected[: height - y, : width - x]
        pixels = reader._read_box(level, x, y, expected.shape[1], expected.shape[0])
    except (SlideReadError, ValueError, RuntimeError, IndexError, TypeError) as error:
        logger.debug("a tile is not compared: %s", error)
        return
    if pixels.shape != expected.shape:
        raise Contradiction(f"it gives pixels of shape {pixels.shape}, tifffile of {expected.shape}")
    difference = int(np.abs(pixels.astype(np.int16) - expected).max())
    if difference > MOST_DIFFERENCE.get(spec.compression, 0):
        at = (round(x * reader.downsamples[level]), round(y * reader.downsamples[level]))
        raise Contradiction(
            f"it gives other pixels than tifffile for a {spec.compression} tile, level {level} at {at} "
            f"(level-0 px): {difference} grey levels apart"
        )


def _decoded(pages: Sequence[Any], index: int) -> Pixels | None:
    """(h, w, 3) pixels of a compressed tile or strip by tifffile; None of one that the file leaves out."""
    page = pages[0]
    planes = [(page, index) for page in pages]
    if len(pages) == 1 and page.planarconfig == 2 and page.samplesperpixel > 1:
        stride = len(page.dataoffsets) // page.samplesperpixel
        planes = [(page, index + stride * plane) for plane in range(page.samplesperpixel)]
    decoded = [plane for plane in map(_segment, *zip(*planes, strict=True)) if plane is not None]
    if len(decoded) < len(planes):
        return None
    pixels = np.concatenate(decoded, axis=-1)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _segment(page: Any, index: int) -> Pixels | None:
    size = page.databytecounts[index]
    if not size:
        return None
    file = page.parent.filehandle
    file.seek(page.dataoffsets[index])
    data = file.read(size)
    pixels, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
    return None if pixels is None else np.asarray(pixels[0], np.uint8)
