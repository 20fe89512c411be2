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
from slide2vec.artifacts.tile_features import check_same_files, coordinates_folder
from slide2vec.config import PreviewConfig
from slide2vec.errors import ArtifactError, Slide2VecError
from slide2vec.labels import TISSUE, class_folder
from slide2vec.pictures import pca_map, principal_components, variance_shares
from slide2vec.report.slide_facts import ReportedSlide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, load_coordinates
from slide2vec.tiling.previews import draw_tiles, draw_tissue, overview
from slide2vec.tiling.previous_files import recorded_masks
from slide2vec.tiling.slide_pictures import open_tiled
from slide2vec.tiling.tile import tissue_again
from slide2vec.tiling.types import expand_regions

__all__ = ["DrawnPicture", "draw_images", "embedded_tiles", "tiled_slide"]

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

    def same_as(self, other: DrawnPicture) -> bool:
        """Whether it shows, or says, nothing that the other one does not."""
        if (self.kind, self.text) != (other.kind, other.text):
            return False
        if self.pixels is None or other.pixels is None:
            return self.pixels is other.pixels
        return np.array_equal(self.pixels, other.pixels)


def draw_images(slide: ReportedSlide, size_px: int) -> list[DrawnPicture]:
    """All pictures of a slide, drawn anew; over white where the slide itself is gone. A slide of which
    nothing is known has none.

    Args:
        size_px: of the longer side.
    """
    found: list[DrawnPicture] = []
    for folder, tiling in slide.tilings.items():
        for image in _of(slide, folder, tiling, size_px):
            if not any(image.same_as(other) for other in found):  # tissue is one at most sizes of tiles
                found.append(image)
    return found


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
    masks = recorded_masks(slide.places[folder], slide.name)
    given = tiled_slide(slide, tiling)
    with open_tiled(given, tiling) as reader:
        background = overview(reader, max(reader.dimensions) / size_px, size_px)
        tissue = tissue_again(reader, given, tiling, masks)
    color = masks.color_of(slide.name)
    config = PreviewConfig() if color is None else PreviewConfig(tissue_contour_color=color)
    return background, draw_tissue(background, tissue, config)


def _map(slide: ReportedSlide, encoder: str, tiling: Tiling, background: Picture) -> Iterator[DrawnPicture]:
    try:
        found = embedded_tiles(slide, encoder, tiling)
        if found is None:
            return
        embeddings, tiling = found
        shares = variance_shares(embeddings, principal_components(embeddings, 3))
        side = tiling.geometry.tile_size_lv0
        drawn = pca_map(embeddings, tiling.x, tiling.y, side, tiling.dimensions, background)
    except (Slide2VecError, OSError) as error:
        yield DrawnPicture("map", f"no map by {encoder}: {error}")
        return
    yield DrawnPicture("map", f"map by {encoder}: {' / '.join(f'{share:.0%}' for share in shares)}", drawn)


def embedded_tiles(
    slide: ReportedSlide, encoder: str, tiling: Tiling
) -> tuple[NDArray[np.float32], Tiling] | None:
    """The (N, D) embeddings of a slide's tiles by an encoder, and the tiles; None where there are none.

    Args:
        tiling: of the encoder's coordinates; where these are of regions, their tiles are given.

    Raises:
        ArtifactError: they cannot be read, or are of other tiles.
    """
    bags = (TileEmbeddingArtifact, HierarchicalEmbeddingArtifact)
    found = next((artifact for artifact in slide.artifacts(encoder) if isinstance(artifact, bags)), None)
    if found is None or not len(tiling):
        return None
    metadata, tiles = found.metadata, slide.run.owners[encoder].tiling / "tiles"
    if (folder := coordinates_folder(metadata, tiles, slide.name)) != tiles:
        tiling = load_coordinates(folder, slide.name)
    check_same_files(metadata, folder, slide.name)
    embeddings = load_embeddings(found.path).float().flatten(0, -2).numpy()
    if isinstance(found, HierarchicalEmbeddingArtifact):
        tiling = expand_regions(tiling, isqrt(found.tiles_per_region))
    if len(embeddings) != len(tiling):
        raise ArtifactError(
            f"slide {slide.name}: {found.path} has {len(embeddings):,} embeddings, and its coordinate files "
            f"{len(tiling):,} tiles: embed it anew"
        )
    return embeddings, tiling


def tiled_slide(slide: ReportedSlide, tiling: Tiling) -> Slide:
    """A slide of a run as it was tiled."""
    return Slide(
        sample_id=slide.name,
        image_path=slide.image_path,
        mask_path=slide.mask_path,
        spacing_at_level_0=tiling.spacing_at_level_0,
        annotation=class_folder(tiling.annotation or TISSUE),
    )


def _blank(tiling: Tiling, size_px: int) -> Any:
    scale = size_px / max(tiling.dimensions)
    width, height = (max(1, round(side * scale)) for side in tiling.dimensions)
    return np.full((height, width, 3), 255, np.uint8)
