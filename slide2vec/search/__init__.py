"""Which tiles of a run are nearest to a tile, or to a text."""

from __future__ import annotations

from slide2vec.search.find import Run, searched_run
from slide2vec.search.index import FoundTile
from slide2vec.search.sheet import draw_sheet, tile_pixels
from slide2vec.search.words import has_texts, nearest_to_text, text_query

__all__ = [
    "FoundTile",
    "Run",
    "draw_sheet",
    "has_texts",
    "nearest_to_text",
    "searched_run",
    "text_query",
    "tile_pixels",
]
