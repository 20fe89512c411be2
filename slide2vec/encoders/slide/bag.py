"""What slide encoders take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slide2vec.errors import ConfigError, NothingToEmbedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SlideFeatures", "TileBag", "checked_features"]


@dataclass(frozen=True)
class TileBag:
    """The tiles of one slide.

    Attributes:
        features: (N, D) float, their embeddings.
        coords: (N, 2) int64, x and y of their top-left corners, level-0 px.
        tile_size_lv0: side of a tile, level-0 px.
    """

    features: Tensor
    coords: Tensor
    tile_size_lv0: int


@dataclass(frozen=True)
class SlideFeatures:
    """What a slide encoder makes of a slide.

    Attributes:
        embedding: (D,) float32.
        latents: (L, D) float32, where the model has them.
    """

    embedding: Tensor
    latents: Tensor | None = None


def checked_features(bag: TileBag, dim: int, like: torch.Tensor) -> Tensor:
    """The bag's features (N, dim), with the type of the encoder's parameters and where they are.

    Raises:
        NothingToEmbedError: there are no tiles.
        ConfigError: features, coordinates and encoder do not belong together.
    """
    features, coords = bag.features, bag.coords
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ConfigError(
            f"features {tuple(features.shape)} and coords {tuple(coords.shape)} of a slide's tiles must be "
            "(N, D) and (N, 2)"
        )
    if not len(features):
        raise NothingToEmbedError(
            "the slide has no tiles, so a slide encoder has nothing to embed: leave it out"
        )
    if features.shape[1] != dim:
        raise ConfigError(
            f"tile embeddings have {features.shape[1]} dimensions, but this slide encoder takes {dim}: "
            "embed the tiles with the tile preset and output variant that its recipe names"
        )
    if bag.tile_size_lv0 < 1:
        raise ConfigError(f"tile_size_lv0={bag.tile_size_lv0}: the side of a tile is at least one level-0 px")
    return features.to(device=like.device, dtype=like.dtype)
