"""PRISM: a Perceiver that reads a slide's tiles with 513 latents."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features

__all__ = ["PrismEncoder"]

KeysValues = tuple[Tensor, Tensor]


class PrismEncoder(nn.Module):
    """The slide encoder of PRISM (Shaikovski et al., 2024), without its text decoder.

    Parameters have the names of the published checkpoint. Tiles have no places: their order and
    coordinates do not matter. The arguments are those of the recipe: `in_dim` of the tile embeddings,
    `latents` and their `dim`, `rounds` over the tiles, `depth` and `heads` of the blocks between.
    """

    def __init__(self, in_dim: int, dim: int, latents: int, rounds: int, depth: int, heads: int) -> None:
        super().__init__()
        self.image_resampler = _Resampler(in_dim, dim, latents, rounds, depth, heads)

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (dim,) and latents (latents, dim).

        Raises:
            NothingToEmbedError: there are no tiles.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        resampler = self.image_resampler
        features = checked_features(bag, resampler.in_dim, resampler.perceiver.latents)
        embedding, latents = resampler(features)
        return SlideFeatures(embedding.float(), latents.float())


class _Resampler(nn.Module):
    def __init__(self, in_dim: int, dim: int, latents: int, rounds: int, depth: int, heads: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.perceiver = _Perceiver(in_dim, dim, 1 + latents, rounds, depth, heads)
        self.cls_norm = nn.LayerNorm(dim)
        self.img_norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, in_dim) -> (dim,), (latents, dim)."""
        latents = self.perceiver(features)
        return self.cls_norm(latents[0]), self.img_norm(latents[1:])


class _Perceiver(nn.Module):
    """Latents read the tiles, then exchange what they read, over and over.

    The first two rounds read with layers of their own; from the second on it is the same layer with the
    same keys and values, which are therefore computed once. The blocks between are the same in every
    round.
    """

    def __init__(self, in_dim: int, dim: int, latents: int, rounds: int, depth: int, heads: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.latents = nn.Parameter(torch.randn(latents, dim))
        blocks = nn.ModuleList(
            nn.ModuleDict({"mhsa": _SelfAttention(dim, heads), "ff": _FeedForward(dim)}) for _ in range(depth)
        )
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict({"xattn": _Reading(in_dim, dim), "tf": blocks}),
                nn.ModuleDict({"xattn": _Reading(in_dim, dim)}),
            ]
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (latents, dim)."""
        first, later = (cast("_Reading", cast("nn.ModuleDict", layer)["xattn"]) for layer in self.layers)
        latents = self._exchanged(first(self.latents, first.keys_values(features)))
        again = later.keys_values(features)
        for _ in range(self.rounds - 1):
            latents = self._exchanged(later(latents, again))
        return latents

    def _exchanged(self, latents: Tensor) -> Tensor:
        for block in cast("nn.ModuleList", cast("nn.ModuleDict", self.layers[0])["tf"]):
            parts = cast("nn.ModuleDict", block)
            latents = latents + parts["mhsa"](latents)
            latents = latents + parts["ff"](latents)
        return latents


class _Reading(nn.ModuleDict):
    """Cross-attention of the latents to the tiles, and a feed-forward layer."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__({"xattn": _CrossAttention(in_dim, dim), "ff": _FeedForward(dim)})

    def keys_values(self, features: Tensor) -> KeysValues:
        """(N, in_dim) -> twice (N, dim)."""
        key, value = self["xattn"].to_kv(features).chunk(2, dim=-1)  # type: ignore[operator]
        return key, value

    def forward(self, latents: Tensor, keys_values: KeysValues) -> Tensor:
        latents = latents + self["xattn"](latents, keys_values)
        return cast("Tensor", latents + self["ff"](latents))


class _CrossAttention(nn.Module):
    """One head; the tiles are not normed."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.x_norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(in_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, latents: Tensor, keys_values: KeysValues) -> Tensor:
        query = self.to_q(self.x_norm(latents))
        query, key, value = (each[None, None] for each in (query, *keys_values))
        return cast("Tensor", self.to_out(F.scaled_dot_product_attention(query, key, value)[0, 0]))


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mha = nn.MultiheadAttention(dim, heads, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        normed = self.norm(latents)
        return cast("Tensor", self.mha(normed, normed, normed, need_weights=False)[0])


class _FeedForward(nn.Module):
    """GEGLU (Shazeer, 2020): the first half of the hidden layer, times GELU of the second."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.net = nn.ModuleDict({"0": nn.Linear(dim, 2 * dim), "2": nn.Linear(dim, dim)})

    def forward(self, latents: Tensor) -> Tensor:
        value, gate = self.net["0"](self.norm(latents)).chunk(2, dim=-1)
        return cast("Tensor", self.net["2"](value * F.gelu(gate)))
