"""Tissue tiles that engines are compared on and calibrated with."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import EngineError
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import Recipe
from slide2vec.slides import as_slide
from slide2vec.stream import plan_slide
from slide2vec.synthetic import write_synthetic_slide

__all__ = ["tissue_pixels"]

#: Of a tile that counts as tissue.
TISSUE_THRESHOLD = 0.5
#: Side of the generated slide in tiles: about a third of it is tissue.
GENERATED_TILES = 12
GENERATED_SPACING_UM = 0.25
#: For encoders that say nothing of spacing.
SPACING_UM = 0.5


def tissue_pixels(recipe: Recipe, count: int, slide: Path | None = None) -> Tensor:
    """Tiles of tissue as a preset's engine sees them: (count, H, W, 3) uint8, not normalised yet.

    Args:
        count: how many, spread over the slide.
        slide: that they are from; None = a generated one.

    Raises:
        SlideError: the slide cannot be read.
        EngineError: it has too little tissue.
    """
    spacing, size = recipe.default_spacing_um or SPACING_UM, recipe.tile_size_px
    if recipe.encoder.family == "segmentation":  # at 10 µm/px no slide has so many tiles
        spacing = SPACING_UM
    tiles = _generated(spacing, size, count) if slide is None else _tiles_of(slide, spacing, size, count)
    return TorchPreparer(recipe.transform, torch.device("cpu"), "uint8_nhwc").prepare(tiles)


@lru_cache(maxsize=4)
def _generated(spacing_um: float, tile_size_px: int, count: int) -> Tensor:
    """Tiles of a generated slide, always the same ones."""
    side = int(GENERATED_TILES * tile_size_px * max(1.0, spacing_um / GENERATED_SPACING_UM))
    with TemporaryDirectory(prefix="slide2vec-") as folder:
        path = Path(folder) / "generated.svs"
        write_synthetic_slide(path, size_px=side, seed=0, spacing_um=GENERATED_SPACING_UM)
        return _tiles_of(path, spacing_um, tile_size_px, count)


def _tiles_of(slide: Path, spacing_um: float, tile_size_px: int, count: int) -> Tensor:
    """(count, S, S, 3) uint8, S the tile size."""
    config = PreprocessingConfig(
        requested_spacing_um=spacing_um,
        requested_tile_size_px=tile_size_px,
        tissue_threshold=TISSUE_THRESHOLD,
    )
    plan = plan_slide(as_slide(slide), config)
    try:
        there = len(plan.tiling)
        if there < count:
            raise EngineError(
                f"slide {slide} has {there} tiles of tissue, {count} are needed: name another slide"
            )
        tiles = np.empty((count, tile_size_px, tile_size_px, 3), np.uint8)
        for target, tile in zip(tiles, np.linspace(0, there - 1, count).astype(int), strict=True):
            plan.source.read_tile(int(tile), target)
        return torch.from_numpy(tiles)
    finally:
        plan.source.close()
