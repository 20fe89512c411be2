"""A slide as a pyramid of small pictures, each cut from its file when it is asked for.

Addressed as in Microsoft's Deep Zoom: level `last` is the slide at full size, every level below it half as
large, level 0 one pixel; a picture has 256 px a side, and a column and a row. No pictures overlap.
"""

from __future__ import annotations

from math import ceil, floor, log2

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.readers import SlideReader
from slide2vec.tiling.previews import thumbnail_level

__all__ = ["PICTURE_SIDE", "DeepZoom"]

#: Of a picture, px.
PICTURE_SIDE = 256
#: What is read of a slide at once, px a side; more, of slides without coarse levels, is read in parts.
MOST_READ_PX = 4096


class DeepZoom:
    """The pictures of an opened slide.

    Attributes:
        last: number of the finest level.
    """

    def __init__(self, reader: SlideReader) -> None:
        self._reader = reader
        self.last = ceil(log2(max(*reader.dimensions, 1)))

    def size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level, px."""
        scale = 2 ** (self.last - level)
        width, height = self._reader.dimensions
        return -(-width // scale), -(-height // scale)

    def picture(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB, h and w 256 or, at the right and lower edge, less. At level `last` the slide's
        own pixels; elsewhere their means, from the coarsest of the file's levels that is fine enough.

        Raises:
            ConfigError: there is no such picture.
            SlideReadError: pixels cannot be decoded.
        """
        if not 0 <= level <= self.last:
            raise ConfigError(f"the slide has levels 0 to {self.last} of deep zoom, not {level}")
        width, height = self.size(level)
        left, top = column * PICTURE_SIDE, row * PICTURE_SIDE
        if not (0 <= left < width and 0 <= top < height):
            raise ConfigError(
                f"level {level} of deep zoom has {width} x {height} px: no picture in column {column}, "
                f"row {row}"
            )
        size = min(PICTURE_SIDE, width - left), min(PICTURE_SIDE, height - top)
        return self._cut(level, (left, top), size)

    def descriptor(self) -> str:
        """The XML of a .dzi file, for other viewers."""
        width, height = self._reader.dimensions
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
            f'Format="jpg" Overlap="0" TileSize="{PICTURE_SIDE}">'
            f'<Size Width="{width}" Height="{height}"/></Image>\n'
        )

    def _cut(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """A part of a level, by its corner and size in px of it."""
        reader, scale = self._reader, 2 ** (self.last - level)
        source = thumbnail_level(reader, scale)
        downsample = reader.downsamples[source]
        first = [floor(at * scale / downsample) for at in corner]
        ends = [
            min(ceil((at + side) * scale / downsample), whole)
            for at, side, whole in zip(corner, size, reader.level_dimensions[source], strict=True)
        ]
        reach = max(1, ends[0] - first[0]), max(1, ends[1] - first[1])
        if max(reach) > MOST_READ_PX:
            pixels = self._of_finer(level + 1, corner, size)
        else:
            pixels = reader.read_region(
                (_lv0(first[0], downsample), _lv0(first[1], downsample)), source, reach
            )
        if pixels.shape[1::-1] == size:
            return pixels
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)

    def _of_finer(self, finer: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """The same part of the next finer level, in four."""
        width, height = self.size(finer)
        left, top = 2 * corner[0], 2 * corner[1]
        right, bottom = min(left + 2 * size[0], width), min(top + 2 * size[1], height)
        found = np.empty((bottom - top, right - left, 3), np.uint8)
        for y in range(top, bottom, size[1]):
            for x in range(left, right, size[0]):
                part = self._cut(finer, (x, y), (min(size[0], right - x), min(size[1], bottom - y)))
                found[y - top : y - top + part.shape[0], x - left : x - left + part.shape[1]] = part
        return found


def _lv0(at: int, downsample: float) -> int:
    """Where in level 0 a pixel of a level begins, so that readers find just that pixel again."""
    found = ceil(at * downsample)
    return found if floor(found / downsample) >= at else found + 1
