"""What `TileAssembler` needs of a container: where its compressed tiles lie, how they are coded, their
bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError

__all__ = ["Fail", "Parts", "TileFormat", "TilePlace", "TileTable", "tile_places"]

#: A compressed tile: one piece, or one per channel where channels are stored apart.
Parts: TypeAlias = Sequence[bytes]
#: (level, x, y in level px, what is wrong) -> the error to raise.
Fail: TypeAlias = Callable[[int, int, int, object], SlideReadError]


@dataclass(frozen=True, kw_only=True)
class TileFormat:
    """How the tiles of a level are coded.

    Attributes:
        width, height: of a whole tile, px.
        compression: its TIFF name ("JPEG", "LZW", "NONE", …; "JPEGLS" and "RLE" of DICOM).
        photometric: its TIFF name ("RGB", "YCBCR", "MINISBLACK", "MINISWHITE", "PALETTE").
        samples: channels that a tile holds; those beyond the colours are opacity or ignored.
        planar: channels are coded apart.
        predictor: 2 where pixels are coded as differences from their left neighbour, else 1.
        alpha: what the channel after the colours is: opacity that the colours were multiplied with, or not.
        colormap: (256, 3) uint8 of PALETTE.
        is_subsampled: of YCBCR, the colours have fewer pixels than the brightness.
        reversed_bits: the bytes of the file have their lowest bit first.
        is_strip: the last tile of a column may be coded shorter.
        rgb: JPEG: the components are RGB already, whatever a decoder would think.
    """

    width: int
    height: int
    compression: str
    photometric: str = "RGB"
    samples: int = 3
    planar: bool = False
    predictor: int = 1
    alpha: Literal["premultiplied", "straight"] | None = None
    colormap: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    is_subsampled: bool = False
    reversed_bits: bool = False
    is_strip: bool = False
    rgb: bool = False


class TilePlace(NamedTuple):
    """A compressed tile under a box.

    Attributes:
        tile: its number in the level.
        x, y: of its top-left corner, level px.
        width, height: of what the level holds of it, px.
        is_whole: the box holds all of it, so that no neighbouring box needs it.
    """

    tile: int
    x: int
    y: int
    width: int
    height: int
    is_whole: bool


class TileTable(ABC):
    """The compressed tiles of a slide's levels. Used from several threads.

    Args:
        name: of the slide.
        forms: how the tiles of each level are coded.
        fail: makes the error of a tile that is damaged.
    """

    def __init__(self, name: str, forms: Sequence[TileFormat], fail: Fail) -> None:
        self._name, self._forms, self._fail = name, forms, fail

    def format(self, level: int) -> TileFormat:
        """How they are coded."""
        return self._forms[level]

    @abstractmethod
    def tiles_in(self, level: int, x: int, y: int, width: int, height: int) -> list[TilePlace]:
        """The tiles under a box that lies inside a level (level px), without those that the file leaves out:
        these are white."""

    @abstractmethod
    def read(self, level: int, places: Sequence[TilePlace]) -> list[Parts]:
        """What is stored of tiles.

        Raises:
            SlideReadError: it cannot be read, or the slide was closed.
        """

    def damaged(self, level: int, place: TilePlace, why: object) -> SlideReadError:
        """The error of a tile that a decoder does not take."""
        return self._fail(level, place.x, place.y, why)

    @abstractmethod
    def close(self) -> None:
        """Release the files. May be called twice."""


def tile_places(
    level_size: tuple[int, int], tile_size: tuple[int, int], box: tuple[int, int, int, int]
) -> list[TilePlace]:
    """The tiles under a box, numbered row by row.

    Args:
        level_size, tile_size: (width, height), px.
        box: (x, y, width, height) inside the level, px.
    """
    (right, bottom), (tile_w, tile_h), (x, y, width, height) = level_size, tile_size, box
    across = -(-right // tile_w)
    columns = [_span(at, tile_w, right, x, width) for at in range(x // tile_w, (x + width - 1) // tile_w + 1)]
    rows = [_span(at, tile_h, bottom, y, height) for at in range(y // tile_h, (y + height - 1) // tile_h + 1)]
    return [
        TilePlace(row * across + column, left, top, wide, high, all_x and all_y)
        for row, top, high, all_y in rows
        for column, left, wide, all_x in columns
    ]


def _span(at: int, side: int, end: int, start: int, length: int) -> tuple[int, int, int, bool]:
    """Of the row or column `at` of tiles: its number, place, length inside the level; if the box holds it."""
    first = at * side
    inside = min(side, end - first)
    return at, first, inside, start <= first and first + inside <= start + length
