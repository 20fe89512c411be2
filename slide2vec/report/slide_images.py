"""Small pictures of a slide of a run: its tissue, its tiles, and a map for each encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.reading import load_embeddings
from slide2vec.artifacts.records import HierarchicalEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.config import PreviewConfig
from slide2vec.errors import Slide2VecError
from slide2vec.labels import TISSUE, class_folder
from slide2vec.pictures import pca_map, principal_components, variance_shares
from slide2vec.report.slide_facts import ReportedSlide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling
from slide2vec.tiling.previews import draw_tiles, draw_tissue, overview
from slide2vec.tiling.previous_files import recorded_masks
from slide2vec.tiling.slide_pictures import open_tiled
from slide2vec.tiling.tile import tissue_again
from slide2vec.tiling.types import expand_regions

__all__ = ["DrawnPicture", "draw_images"]

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnPicture:
    """A picture, or why there is none.

    Attributes:
        kind: "tissue", "tiles" or "map".
        text: what it shows.
        pixels: (h, w, 3) uint8 RGB; None without one.
    """

    kind: str
    text: str
    pixels: Picture | None = None


def draw_images(slide: ReportedSlide, size_px: int) -> list[DrawnPicture]:
    """All pictures of a slide, drawn anew; over white where the slide itself is gone. A slide of which
    nothing is known has none.

    Args:
        size_px: of the longer side.
    """
    return [
        image for folder, tiling in slide.tilings.items() for image in _of(slide, folder, tiling, size_px)
    ]


def _of(slide: ReportedSlide, folder: Path, tiling: Tiling, size_px: int) -> Iterator[DrawnPicture]:
    of = "" if len(slide.tilings) == 1 else f" of {tiling.geometry.requested_tile_size_px} px"
    try:
        background, tissue = _read(slide, folder, tiling, size_px)
    except (Slide2VecError, OSError) as error:
        background, tissue = _blank(tiling, size_px), None
        yield DrawnPicture("tissue", f"the slide cannot be read: {error}")
    if tissue is not None:
        yield DrawnPicture("tissue", "tissue, outlined", tissue)
    if len(tiling):
        yield DrawnPicture("tiles", f"tiles{of}", draw_tiles(background, tiling))
    for encoder in slide.run.encoders:
        owner = slide.run.owners.get(encoder)
        if owner is not None and owner.tiling == folder:
            yield from _map(slide, encoder, tiling, background)


def _read(slide: ReportedSlide, folder: Path, tiling: Tiling, size_px: int) -> tuple[Picture, Picture]:
    """The slide, and the slide with its tissue outlined."""
    masks = recorded_masks(folder / "tiles", slide.name)
    given = Slide(
        sample_id=slide.name,
        image_path=slide.image_path,
        mask_path=slide.mask_path,
        spacing_at_level_0=tiling.spacing_at_level_0,
        annotation=class_folder(tiling.annotation or TISSUE),
    )
    with open_tiled(given, tiling) as reader:
        background = overview(reader, max(reader.dimensions) / size_px, size_px)
        tissue = tissue_again(reader, given, tiling, masks)
    color = masks.color_of(slide.name)
    config = PreviewConfig() if color is None else PreviewConfig(tissue_contour_color=color)
    return background, draw_tissue(background, tissue, config)


def _map(slide: ReportedSlide, encoder: str, tiling: Tiling, background: Picture) -> Iterator[DrawnPicture]:
    bags = (TileEmbeddingArtifact, HierarchicalEmbeddingArtifact)
    found = [artifact for artifact in slide.artifacts(encoder) if isinstance(artifact, bags)]
    if not found or not len(tiling):
        return
    artifact = found[0]
    try:
        embeddings = load_embeddings(artifact.path).float().flatten(0, -2).numpy()
        if isinstance(artifact, HierarchicalEmbeddingArtifact):
            tiling = expand_regions(tiling, isqrt(artifact.tiles_per_region))
        shares = variance_shares(embeddings, principal_components(embeddings, 3))
        side = tiling.geometry.tile_size_lv0
        drawn = pca_map(embeddings, tiling.x, tiling.y, side, tiling.dimensions, background)
    except (Slide2VecError, OSError) as error:
        yield DrawnPicture("map", f"no map by {encoder}: {error}")
        return
    yield DrawnPicture("map", f"map by {encoder}: {' / '.join(f'{share:.0%}' for share in shares)}", drawn)


def _blank(tiling: Tiling, size_px: int) -> Any:
    scale = size_px / max(tiling.dimensions)
    width, height = (max(1, round(side * scale)) for side in tiling.dimensions)
    return np.full((height, width, 3), 255, np.uint8)
