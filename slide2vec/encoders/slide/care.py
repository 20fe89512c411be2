"""CARE, whose architecture is code in its Hugging Face repository, run only with consent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from slide2vec.encoders.remote_code import consented, load_remote, whole_repository
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.weights import WeightsChoice
from slide2vec.recipes import Recipe, Variant

__all__ = ["CareEncoder", "build_care"]


class CareEncoder(nn.Module):
    """The repository's network, called as its authors' example does.

    Args:
        network: as transformers loads it.
        in_dim: of the tile embeddings.
    """

    def __init__(self, network: nn.Module, in_dim: int) -> None:
        super().__init__()
        self.network, self.in_dim = network, in_dim

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (variant.dim,).

        Raises:
            NothingToEmbedError: there are no tiles.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        features = checked_features(bag, self.in_dim, next(self.network.parameters()))
        cells = bag.coords.to(features.device).div(bag.tile_size_lv0, rounding_mode="floor")
        counts = torch.tensor([len(features)], device=features.device)
        found: Any = self.network(features[None], counts, cells[None])
        return SlideFeatures(cast("torch.Tensor", found.wsi_embedding)[0].float())


def build_care(recipe: Recipe, variant: Variant, weights: WeightsChoice, consent: bool) -> nn.Module:
    """CARE in fp32, from a copy of its repository, or from the hub.

    Raises:
        PresetError: no consent.
        ExtraMissingError: transformers is missing.
        WeightsError, GatedWeightsError: the repository cannot be had or does not load.
    """
    place = consented(recipe, weights, consent) or whole_repository(recipe)
    with _importable(place):
        network = cast("nn.Module", load_remote(recipe, place, "AutoModel"))
    return CareEncoder(network.float(), recipe.encoder.kwargs["in_dim"])


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Have the modules of a folder importable by their names in the block: those of this repository import
    each other so, which transformers takes for missing packages."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
