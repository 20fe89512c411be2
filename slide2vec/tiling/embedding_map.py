"""The tiles of a slide coloured by their embeddings, over the slide, with what the colours mean below it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.pictures import (
    pca_key,
    pca_map,
    principal_components,
    slide_size,
    variance_shares,
    with_footer,
)
from slide2vec.readers import SlideReader
from slide2vec.tiling.previews import overview, tiles_in_words
from slide2vec.tiling.types import Tiling

__all__ = ["MAP_PX", "draw_embedding_map"]

#: Longer side of a map.
MAP_PX = 2048


def draw_embedding_map(
    reader: SlideReader, tiling: Tiling, embeddings: NDArray[np.floating[Any]], encoder: str
) -> NDArray[np.uint8]:
    """The map of a slide, see `slide2vec.pictures.pca_map`, and below it its key: (h, w, 3) uint8 RGB.

    Args:
        tiling: of the embeddings; not of regions.
        embeddings: (N, D) float.
        encoder: named below the map.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    geometry, dimensions = tiling.geometry, tiling.dimensions
    background = overview(reader, max(reader.dimensions) / MAP_PX)
    drawn = pca_map(embeddings, tiling.x, tiling.y, geometry.tile_size_lv0, dimensions, background)
    lines = [
        f"{tiles_in_words(tiling)}, {encoder}",
        slide_size(dimensions, geometry.base_spacing_um),
    ]
    if len(tiling):
        first, second, third = variance_shares(embeddings, principal_components(embeddings, 3))
        lines.append(
            "Like colours: tiles that look alike to the encoder. Of the variance on this slide, principal "
            f"component 1 (to the right in the square) has {first:.0%}, 2 (upwards) {second:.0%} and 3 (the "
            f"bar) {third:.0%}."
        )
    um_per_px = geometry.base_spacing_um * dimensions[0] / drawn.shape[1]
    return with_footer(drawn, lines, um_per_px=um_per_px, key=pca_key() if len(tiling) else None)
