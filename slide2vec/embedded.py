"""What the API returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["EmbeddedSlide"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedSlide:
    """The embeddings of one slide.

    Attributes:
        sample_id: the slide's name.
        tile_embeddings: (N, D) float32 (float16 for fp16 runs), on the CPU, in the order of x and y.
        slide_embedding: (D,) for slide-level models, else None.
        x, y: (N,) int64, top-left corners of the tiles in level-0 px; sorted by x, then y.
        tile_size_lv0: side of a tile in level-0 px.
        image_path, mask_path: the files.
        num_tiles: N; 0 for a slide without tissue.
        mask_preview_path, tiling_preview_path: pictures, where they were asked for.
        latents: of slide encoders that have them.
    """

    sample_id: str
    tile_embeddings: torch.Tensor
    slide_embedding: torch.Tensor | None
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tile_size_lv0: int
    image_path: Path
    mask_path: Path | None
    num_tiles: int
    mask_preview_path: Path | None = None
    tiling_preview_path: Path | None = None
    latents: torch.Tensor | None = None
