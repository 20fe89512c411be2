"""Slide encoders that weigh a slide's tiles by gated attention (ABMIL: Ilse et al., 2018): FEATHER, MADELEINE
and CHIEF. Parameters have the names of the published checkpoints, arguments those of the recipes. Neither the
places of the tiles nor their order matter."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.slide.blocks import in_chunks

__all__ = ["ChiefEncoder", "FeatherEncoder", "MadeleineEncoder"]


class FeatherEncoder(nn.Module):
    """FEATHER (Shao et al., ICML 2025), without its classifier: `in_dim` of the tile embeddings, `dim` of the
    result, `hidden` of the attention."""

    def __init__(self, in_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        embed, attention = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU()), _GatedAttention(dim, hidden)
        self.model = nn.ModuleDict({"patch_embed": embed, "global_attn": attention})

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (dim,).

        Raises:
            NothingToEmbedError: there are no tiles.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        features = checked_features(bag, self.in_dim, next(self.parameters()))
        tiles = in_chunks(self.model["patch_embed"], features)
        return SlideFeatures(_weighed(tiles, in_chunks(self.model["global_attn"], tiles)))


class ChiefEncoder(nn.Module):
    """CHIEF (Wang et al., Nature 2024): the attention's weights, applied to the tile embeddings themselves.

    This is the authors' `WSI_feature`, which the organ is not part of. `dim` and `hidden` are those of the
    attention.
    """

    def __init__(self, in_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        layers = (nn.Linear(in_dim, dim), nn.ReLU(), nn.Identity(), _GatedAttention(dim, hidden))
        self.attention_net = nn.Sequential(*layers)  # the third is dropout in training

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (in_dim,); raises what `FeatherEncoder` raises."""
        features = checked_features(bag, self.in_dim, next(self.parameters()))
        return SlideFeatures(_weighed(features, in_chunks(self.attention_net, features)))


class MadeleineEncoder(nn.Module):
    """MADELEINE (Jaume et al., ECCV 2024), its H&E embedding: `heads` attentions over as many maps of a tile,
    and a projection of what they give together."""

    def __init__(self, in_dim: int, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.in_dim, self.heads = in_dim, heads
        self.wsi_embedders = nn.ModuleDict(
            {
                "pre_attn": nn.Sequential(*_layer(in_dim, dim), *_layer(dim, dim), *_layer(dim, dim * heads)),
                "attn": nn.ModuleList(_GatedAttention(dim, hidden) for _ in range(heads)),
            }
        )
        self.projector = nn.Linear(dim * heads, dim)

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (dim,); raises what `FeatherEncoder` raises."""
        features = checked_features(bag, self.in_dim, self.projector.weight)
        tiles = in_chunks(self.wsi_embedders["pre_attn"], features)
        by_head = tiles.reshape(len(tiles), -1, self.heads)  # the heads take turns along a tile's embedding
        attentions = cast("nn.ModuleList", self.wsi_embedders["attn"])
        pooled = [
            _weighed(each, in_chunks(attention, each))
            for attention, each in zip(attentions, by_head.unbind(dim=2), strict=True)
        ]
        together = torch.stack(pooled, dim=1).flatten().to(self.projector.weight)
        return SlideFeatures(self.projector(together).float())


class _GatedAttention(nn.Module):
    """(N, dim) -> scores (N, 1)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid())
        self.attention_c = nn.Linear(hidden, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        return cast("Tensor", self.attention_c(self.attention_a(tiles) * self.attention_b(tiles)))


def _layer(into: int, out: int) -> tuple[nn.Module, ...]:
    """With the place of the dropout that training has."""
    return nn.Linear(into, out), nn.LayerNorm(out), nn.GELU(), nn.Identity()


def _weighed(tiles: Tensor, scores: Tensor) -> Tensor:
    """(N, D), (N, 1) -> the mean (D,) float32 of the tiles by the softmax of their scores; thousands of small
    shares are summed in fp32."""
    return (tiles.float().T @ scores.float().softmax(dim=0))[:, 0]
