"""Pictures of a slide with what was found on it: its tissue, its tiles, and how alike these are."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import MaskSamplingConfig, PreviewConfig
from slide2vec.errors import ConfigError, SlideError
from slide2vec.pictures import (
    pca_key,
    pca_map,
    principal_components,
    slide_size,
    variance_shares,
    with_footer,
)
from slide2vec.readers import SlideReader, open_slide
from slide2vec.slides import Slide
from slide2vec.tiling.previews import (
    LEAST_SIDE_PX,
    artefact_swatches,
    draw_tiles,
    draw_tissue,
    overview,
    tiles_in_words,
    tissue_in_words,
)
from slide2vec.tiling.tile import tissue_again
from slide2vec.tiling.types import Tiling

__all__ = ["MAP_PX", "PictureKind", "draw_embedding_map", "draw_slide", "open_tiled"]

#: Longer side of a map.
MAP_PX = 2048

PictureKind: TypeAlias = Literal["map", "tiles", "tissue"]
Picture: TypeAlias = NDArray[np.uint8]


def draw_slide(
    kind: PictureKind, slide: Slide, tiling: Tiling, embeddings: NDArray[np.floating[Any]], size_px: int
) -> Picture:
    """A picture of a slide, with what it shows in words below it: (h, w, 3) uint8 RGB.

    Args:
        kind: "map": its tiles coloured by principal components of their embeddings; "tiles": their outlines;
            "tissue": the outline of what was taken for tissue, looked for again.
        slide: named as the tiling is.
        tiling: of the embeddings.
        embeddings: (N, D) float.
        size_px: longer side of the picture without the words; a smaller slide is drawn with fewer px.

    Raises:
        ConfigError: there is no such kind; or tissue of a class of annotations is asked for.
        SlideError: the slide cannot be read, or is another one than was tiled.
    """
    if kind not in get_args(PictureKind):
        raise ConfigError(f"kind={kind!r}: pictures of a slide are {', '.join(get_args(PictureKind))}")
    if kind == "tissue" and tiling.annotation is not None:
        raise ConfigError(
            f"slide {tiling.sample_id}: its tiles are of annotations, not of tissue: "
            "preview={'save_mask_preview': True} draws these"
        )
    with open_tiled(slide, tiling) as reader:
        if kind == "map":
            return draw_embedding_map(reader, tiling, embeddings, size_px=size_px)
        picture = _background(reader, size_px)
        spacing = tiling.geometry.base_spacing_um
        lines, swatches = [tiles_in_words(tiling)], artefact_swatches(tiling)
        if kind == "tissue":
            tissue = tissue_again(reader, slide, tiling, MaskSamplingConfig())
            picture, swatches = draw_tissue(picture, tissue, PreviewConfig()), {}
            lines = [tissue_in_words(tissue)]
        else:
            picture = draw_tiles(picture, tiling)
        lines.append(slide_size(tiling.dimensions, spacing))
        um_per_px = spacing * tiling.dimensions[0] / picture.shape[1]
        return with_footer(picture, lines, um_per_px=um_per_px, swatches=swatches)


def draw_embedding_map(
    reader: SlideReader,
    tiling: Tiling,
    embeddings: NDArray[np.floating[Any]],
    encoder: str | None = None,
    *,
    size_px: int = MAP_PX,
) -> Picture:
    """The map of a slide, see `slide2vec.pictures.pca_map`, and below it its key: (h, w, 3) uint8 RGB.

    Args:
        tiling: of the embeddings; not of regions.
        embeddings: (N, D) float.
        encoder: named below the map.
        size_px: longer side of the picture without the words.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    geometry, dimensions = tiling.geometry, tiling.dimensions
    background = _background(reader, size_px)
    drawn = pca_map(embeddings, tiling.x, tiling.y, geometry.tile_size_lv0, dimensions, background)
    lines = [
        tiles_in_words(tiling) + (f", {encoder}" if encoder else ""),
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


def open_tiled(slide: Slide, tiling: Tiling) -> SlideReader:
    """The slide that a tiling is of.

    Raises:
        SlideError: it cannot be opened, or is of another size.
    """
    reader = open_slide(slide, tiling.requested_backend)
    if reader.dimensions != tiling.dimensions:
        found = reader.dimensions
        reader.close()
        raise SlideError(
            f"slide {slide.sample_id}: {slide.image_path} has {found} px, and its tiles are of a slide of "
            f"{tiling.dimensions} px: the file was replaced; embed it anew"
        )
    return reader


def _background(reader: SlideReader, size_px: int) -> Picture:
    return overview(reader, max(reader.dimensions) / size_px, min(size_px, LEAST_SIDE_PX))
