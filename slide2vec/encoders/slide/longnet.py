"""Prov-GigaPath's slide encoder: LongNet over tile embeddings with sine-cosine positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.slide.blocks import in_chunks, split_heads
from slide2vec.encoders.slide.dilated import dilated_attention

__all__ = ["LongNetEncoder", "position_embeddings"]


class LongNetEncoder(nn.Module):
    """The slide encoder of Prov-GigaPath (Xu et al., Nature 2024) and Prov-GigaPath-Flash.

    Parameters have the names of the published checkpoint. The arguments are those of the recipe:
    `in_dim` of the tile embeddings, `dim`, `depth`, `heads` and `hidden` of the layers, `segments` and
    `dilations` of their attention, `pool` of the variant ("cls", "patch_mean"). Tiles are taken in the order
    of the bag, which matters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        segments: Sequence[int],
        dilations: Sequence[int],
        pool: str = "cls",
    ) -> None:
        super().__init__()
        self.in_dim, self.pool = in_dim, pool
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(in_dim, dim)})
        layers = nn.ModuleList(_Layer(dim, heads, hidden, segments, dilations) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layers": layers, "layer_norm": nn.LayerNorm(dim)})
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (dim,): the class token, or the mean of the tiles' tokens, which
        the authors take before the closing norm of the layers.

        A tile is in the cell floor(coordinate / tile_size_lv0) of the grid of positions, so neighbouring
        tiles are in neighbouring cells whatever their size; only tiles that overlap may share one. Tiles of
        256 px at 0.5 µm/px, for which the encoder was trained, are where its authors put them.

        Raises:
            NothingToEmbedError: there are no tiles.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        features = checked_features(bag, self.in_dim, self.cls_token)
        coords = bag.coords.to(features.device)
        cells = torch.div(coords, bag.tile_size_lv0, rounding_mode="floor")
        tiles = self.patch_embed["proj"](features)
        tiles = tiles + position_embeddings(cells, tiles.shape[1]).to(tiles)
        tokens = torch.cat([self.cls_token[0], tiles])  # the class token's position is zero
        for layer in cast("nn.ModuleList", self.encoder["layers"]):
            tokens = layer(tokens)
        if self.pool == "patch_mean":
            return SlideFeatures(self.norm(tokens[1:].float().mean(dim=0).to(tokens)).float())
        return SlideFeatures(self.norm(self.encoder["layer_norm"](tokens[0])).float())


def position_embeddings(cells: Tensor, dim: int) -> Tensor:
    """(N, 2) cells (x, y) -> (N, dim) float32: the first half encodes y, the second x, each by sines and
    then cosines of it over 10000^(i / (dim / 4)) (He et al., Masked autoencoders, 2022).

    The published code keeps a table of 1000 x 1000 cells, 3 GB, with the same values; here there is no
    last cell.
    """
    x, y = cells.unbind(dim=1)
    return torch.cat([_waves(y, dim // 2), _waves(x, dim // 2)], dim=1)


def _waves(cells: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim) float32; a slide has few different columns and rows, and each is computed once,
    on a CPU, since not every device has float64."""
    values, place = torch.unique(cells, return_inverse=True)
    frequency = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = values.cpu().double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float().to(cells.device)[place]


class _Layer(nn.Module):
    def __init__(
        self, dim: int, heads: int, hidden: int, segments: Sequence[int], dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = _Attention(dim, heads, segments, dilations)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.ffn = _FeedForward(dim, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.self_attn_layer_norm(tokens))
        return tokens + in_chunks(lambda part: self.ffn(self.final_layer_norm(part)), tokens)


class _Attention(nn.Module):
    """Dilated attention, with a norm before the last layer (sub-LN: Wang et al., Foundation
    transformers, 2022)."""

    def __init__(self, dim: int, heads: int, segments: Sequence[int], dilations: Sequence[int]) -> None:
        super().__init__()
        self.heads, self.segments, self.dilations = heads, tuple(segments), tuple(dilations)
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner_attn_ln = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(layer(tokens), self.heads) for layer in layers)
        attended = dilated_attention(query, key, value, self.segments, self.dilations)
        attended = attended.to(tokens.dtype).transpose(0, 1).flatten(1)
        return cast("Tensor", self.out_proj(self.inner_attn_ln(attended)))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(tokens).float()).to(tokens.dtype)
        return cast("Tensor", self.fc2(self.ffn_layernorm(hidden)))
