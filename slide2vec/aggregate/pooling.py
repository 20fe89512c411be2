"""Slide embeddings without a slide encoder: plain statistics of the tiles."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOP_TISSUE", "Aggregator", "aggregate", "top_tissue"]

Aggregator = Literal["mean", "max", "top_tissue"]

#: Of the tiles, the share with the most tissue that "top_tissue" takes, ties included.
TOP_TISSUE = 0.25


def aggregate(
    tiles: Tensor, aggregator: Aggregator, tissue_fractions: NDArray[np.float32] | None = None
) -> Tensor:
    """(N, D) tile embeddings -> (D,), in float32 and back to their dtype; N must not be 0.

    Args:
        aggregator: "mean", "max", or "top_tissue": the mean of the tiles of `top_tissue`.
        tissue_fractions: (N,) of the tiles, for "top_tissue".

    Raises:
        ConfigError: no such aggregator.
        ArtifactError: "top_tissue" without tissue fractions.
    """
    if aggregator not in ("mean", "max", "top_tissue"):
        raise ConfigError(f'aggregator={aggregator!r} is not "mean", "max" or "top_tissue"')
    values = tiles.float()
    if aggregator == "max":
        return values.amax(0).to(tiles.dtype)
    if aggregator == "top_tissue":
        if tissue_fractions is None:
            raise ArtifactError(
                'aggregator="top_tissue" needs the tissue fractions of the tiles, which coordinate files of '
                "HS2P and slide2vec have (coords_path); take the mean instead"
            )
        values = values[top_tissue(tissue_fractions)]
    return values.mean(0).to(tiles.dtype)


def top_tissue(tissue_fractions: NDArray[np.float32]) -> NDArray[np.int64]:
    """Indices of the tiles whose tissue fraction is not below the ceil(N / 4)th largest of the slide.

    Equal tiles are all in or all out, so that the order of tiles does not matter.
    """
    least = np.sort(tissue_fractions)[-ceil(TOP_TISSUE * len(tissue_fractions))]
    return np.flatnonzero(tissue_fractions >= least)
