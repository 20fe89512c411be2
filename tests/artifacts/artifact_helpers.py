"""A tiling and embeddings without a slide, for the tests of the artifacts room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from slide2vec.artifacts import TileEmbeddingArtifact, write_tile_embeddings
from slide2vec.config import FilterConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.geometry import tile_geometry
from slide2vec.tiling import Segmentation, Tiling

ENCODER = {"name": "enc", "level": "tile", "input_size_px": 224, "weights": "none"}
FORMATS = ("pt", "npz", "safetensors", "h5")


def a_tiling(
    count: int = 12,
    *,
    sample_id: str = "s",
    size_px: int = 256,
    spacing_um: float = 0.5,
    base_spacing_um: float = 0.25,
    downsamples: tuple[float, ...] = (1.0, 4.0),
    overlap: float = 0.0,
) -> Tiling:
    """`count` tiles in columns of three."""
    geometry = tile_geometry(
        requested_tile_size_px=size_px,
        requested_spacing_um=spacing_um,
        base_spacing_um=base_spacing_um,
        downsamples=downsamples,
        overlap=overlap,
    )
    index, side = np.arange(count, dtype=np.int64), geometry.tile_size_lv0
    return Tiling(
        sample_id=sample_id,
        image_path=Path("slides") / f"{sample_id}.svs",
        mask_path=None,
        spacing_at_level_0=None,
        backend="openslide",
        requested_backend="auto",
        dimensions=(90_000, 70_000),
        downsamples=downsamples,
        geometry=geometry,
        x=index // 3 * side,
        y=index % 3 * side + 7,
        tissue_fractions=np.ones(count, np.float32),
        tissue_threshold=0.01,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=1, spacing_um=16.0
        ),
        filtering=FilterConfig(ref_tile_size=size_px),
    )


def embedded(
    tiling: Tiling, *, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> EmbeddedSlide:
    """Random embeddings of a tiling's tiles."""
    values = torch.randn((len(tiling), dim), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return EmbeddedSlide(
        sample_id=tiling.sample_id,
        tile_embeddings=values,
        slide_embedding=None,
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        image_path=tiling.image_path,
        mask_path=None,
        num_tiles=len(tiling),
    )


def write(
    folder: Path, tiling: Tiling | None = None, *, seed: int = 0, dim: int = 5, **options: Any
) -> TileEmbeddingArtifact:
    """Write embeddings of a tiling (12 tiles of slide "s") as `options` say."""
    tiling = a_tiling() if tiling is None else tiling
    return write_tile_embeddings(
        folder, embedded(tiling, dim=dim, seed=seed), tiling, **{"encoder": ENCODER, **options}
    )
