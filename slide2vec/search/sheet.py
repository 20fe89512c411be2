"""A contact sheet of tiles: their pixels side by side, with where they are and how near."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import Slide2VecError
from slide2vec.files import as_path
from slide2vec.labels import split_class_name
from slide2vec.readers import SlideReader, open_slide
from slide2vec.search.index import FoundTile
from slide2vec.slides import Slide

__all__ = ["draw_sheet", "tile_pixels"]

#: Side of a picture, the line under it, and the white around both, px.
SIDE, LINE, GAP = 224, 16, 8
COLUMNS = 5
_GREY = 90


def draw_sheet(
    tiles: Sequence[FoundTile], *, asked: FoundTile | None = None, backend: str = "auto"
) -> tuple[NDArray[np.uint8], list[str]]:
    """Tiles in their order, five in a row, each with its slide, place and cosine.

    Args:
        asked: the tile that was asked for, put before the others, which are numbered from 1 either way.

    Returns:
        (h, w, 3) uint8 RGB, and why the pixels of a slide are missing, one text for each.
    """
    tiles, first = (tiles, 1) if asked is None else ([asked, *tiles], 0)
    rows = -(-len(tiles) // COLUMNS)
    cell = SIDE + 2 * LINE + GAP
    sheet = np.full((rows * cell + GAP, COLUMNS * (SIDE + GAP) + GAP, 3), 255, np.uint8)
    problems = []
    numbered = sorted(enumerate(tiles), key=lambda item: item[1].sample_id)
    for name, group in groupby(numbered, key=lambda item: item[1].sample_id):
        of_slide = list(group)
        path, annotation = as_path(of_slide[0][1].image_path), split_class_name(name)[0]
        try:
            slide = Slide(sample_id=name, image_path=path, annotation=annotation)
            with open_slide(slide, backend) as reader:
                pictures = [tile_pixels(reader, (tile.x, tile.y), tile.tile_size_lv0) for _, tile in of_slide]
        except (Slide2VecError, OSError) as error:
            problems.append(f"slide {name}: no pictures of its tiles: {error}")
            pictures = [np.full((SIDE, SIDE, 3), 230, np.uint8)] * len(of_slide)
        for (number, tile), picture in zip(of_slide, pictures, strict=True):
            top, left = GAP + number // COLUMNS * cell, GAP + number % COLUMNS * (SIDE + GAP)
            sheet[top : top + SIDE, left : left + SIDE] = picture
            place = f"{first + number}." if first + number else "asked for:"
            _write(sheet, f"{place} {tile.sample_id}", left, top + SIDE + LINE)
            _write(sheet, f"{tile.x},{tile.y}  {tile.score:.4f}", left, top + SIDE + 2 * LINE)
    return sheet, problems


def tile_pixels(reader: SlideReader, corner: tuple[int, int], size_lv0: int) -> NDArray[np.uint8]:
    """A tile (its corner and side in level-0 px) at the size of the sheet, (SIDE, SIDE, 3) uint8 RGB, from
    the coarsest level that has its pixels.

    Raises:
        SlideReadError: they cannot be decoded.
    """
    enough = [level for level, ds in enumerate(reader.downsamples) if size_lv0 / ds >= SIDE]
    level = enough[-1] if enough else 0
    side = max(1, round(size_lv0 / reader.downsamples[level]))
    pixels = reader.read_region(corner, level, (side, side))
    how = cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=how), np.uint8)


def _write(sheet: NDArray[np.uint8], text: str, left: int, bottom: int) -> None:
    """As much of a text as there is room for under a picture."""
    cell = np.full((LINE, SIDE, 3), 255, np.uint8)
    cv2.putText(cell, text, (0, LINE - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (_GREY,) * 3, 1, cv2.LINE_AA)
    sheet[bottom - LINE : bottom, left : left + SIDE] = cell
