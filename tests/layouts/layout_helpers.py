"""A run as files, of random embeddings, for tests of the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from slide2vec.artifacts import write_tile_embeddings
from slide2vec.config import PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, tile_slide, write_coordinates

__all__ = ["SIDE", "SIZE", "SPACING", "features", "tiled", "write"]

#: Tiles of 96 px at 0.6 um/px are 230 px of a slide of 0.25 um/px: no level has that spacing.
SIZE, SPACING, SIDE = 96, 0.6, 230


def tiled(slide: Path, **settings: Any) -> Tiling:
    config = PreprocessingConfig(
        **{"requested_spacing_um": SPACING, "requested_tile_size_px": SIZE, **settings}
    )
    own = Slide(sample_id="a", image_path=slide)
    with open_slide(own) as reader:
        found, _ = tile_slide(reader, own, 0.25, config)
    assert len(found) > 5
    return found


def write(run: Path, tiling: Tiling, name: str = "uni", dim: int = 1024, tiles: Path | None = None) -> None:
    """Coordinates, and random embeddings of an encoder."""
    seeded = torch.Generator().manual_seed(dim)
    embedded = EmbeddedSlide(
        sample_id=tiling.sample_id,
        tile_embeddings=torch.randn((len(tiling), dim), generator=seeded),
        slide_embedding=None,
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        image_path=tiling.image_path,
        mask_path=None,
        num_tiles=len(tiling),
    )
    places = write_coordinates((tiles or run) / "tiles", tiling)
    write_tile_embeddings(run, embedded, tiling, encoder={"name": name, "level": "tile"}, coordinates=places)


def features(run: Path) -> np.ndarray:
    return torch.load(run / "tile_embeddings/a.pt", weights_only=True).numpy()
