"""Tile embeddings, region by region."""

from __future__ import annotations

from dataclasses import replace

from slide2vec.embedded import EmbeddedSlide
from slide2vec.stream import SlideOutcome

__all__ = ["regrouped"]


def regrouped(outcome: SlideOutcome) -> SlideOutcome:
    """A slide with its embeddings by region, (R, tiles per region, D), where it has regions."""
    tiling, embedded = outcome.tiling, outcome.embedded
    if embedded is None or tiling is None or tiling.regions is None:
        return outcome
    regions = tiling.regions
    shape = (len(regions), tiling.region_tile_multiple**2)
    made: EmbeddedSlide = replace(
        embedded,
        tile_embeddings=embedded.tile_embeddings.reshape(*shape, embedded.tile_embeddings.shape[-1]),
        x=regions.x,
        y=regions.y,
        tile_x=tiling.x.reshape(shape),
        tile_y=tiling.y.reshape(shape),
    )
    return replace(outcome, embedded=made)
