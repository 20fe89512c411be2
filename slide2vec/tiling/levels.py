"""Whole levels of a slide, read block by block so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.readers import SlideReader
from slide2vec.readers.pyramid import to_level0

__all__ = ["BLOCK_PX", "read_blocks", "read_level", "reduced_size"]

#: Side of a block, px of the level: 50 MB of pixels. Most levels that are read whole are smaller.
BLOCK_PX = 4096


def reduced_size(dimensions: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) of a level reduced by a whole factor; the last pixels may overhang it."""
    return ceil(dimensions[0] / factor), ceil(dimensions[1] / factor)


def read_blocks(
    reader: SlideReader, level: int, factor: int = 1
) -> Iterator[tuple[slice, slice, NDArray[np.uint8]]]:
    """The blocks of a level, each averaged over factor x factor pixels.

    Yields:
        Rows and columns of the block in the reduced level, and its (h, w, 3) uint8 pixels; where
        the reduced level overhangs the level, white is averaged in.
    """
    columns, rows = reduced_size(reader.level_dimensions[level], factor)
    side = max(1, BLOCK_PX // factor)
    downsample = reader.downsamples[level]
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            height, width = min(side, rows - top), min(side, columns - left)
            corner = (to_level0(left * factor, downsample), to_level0(top * factor, downsample))
            pixels = reader.read_region(corner, level, (width * factor, height * factor))
            if factor > 1:
                small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
                pixels = np.asarray(small, np.uint8)
            yield slice(top, top + height), slice(left, left + width), pixels


def read_level(reader: SlideReader, level: int, factor: int = 1) -> NDArray[np.uint8]:
    """A level, averaged over factor x factor pixels: (h, w, 3) uint8."""
    width, height = reduced_size(reader.level_dimensions[level], factor)
    if factor == 1 and max(width, height) <= BLOCK_PX:
        return reader.read_region((0, 0), level, (width, height))
    whole = np.empty((height, width, 3), np.uint8)
    for rows, columns, pixels in read_blocks(reader, level, factor):
        whole[rows, columns] = pixels
    return whole
