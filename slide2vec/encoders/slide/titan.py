"""TITAN: a transformer over a grid of tiles, and attention pooling by one query."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.slide.alibi import alibi_attention, alibi_slopes
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.slide.blocks import in_chunks, split_heads
from slide2vec.errors import NothingToEmbedError

__all__ = ["TitanEncoder", "grid_cells"]


class TitanEncoder(nn.Module):
    """The vision side of TITAN (Ding et al., Nature Medicine 2025).

    Parameters have the names of the published checkpoint. The arguments are those of the recipe:
    `in_dim` of the tile embeddings, `dim` and `heads` of the blocks, `hidden` of their MLPs,
    `pool_heads` of the pooling; `pool`: "aligned" = projected into the space that is shared with texts.
    """

    def __init__(
        self, in_dim: int, dim: int, depth: int, heads: int, hidden: int, pool_heads: int, pool: str = "none"
    ) -> None:
        super().__init__()
        self.aligned = pool == "aligned"
        self.vision_encoder = _Tower(in_dim, dim, depth, heads, hidden, pool_heads, self.aligned)

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (dim,).

        Raises:
            NothingToEmbedError: there are no tiles, or their embeddings are all zero.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        tower = self.vision_encoder
        features = checked_features(bag, tower.in_dim, tower.cls_token)
        cells, places = grid_cells(features.float(), bag.coords.to(features.device), bag.tile_size_lv0)
        found = tower(cells.to(features.dtype), places).float()
        return SlideFeatures(F.normalize(found, dim=-1) if self.aligned else found)


def grid_cells(features: Tensor, coords: Tensor, tile_size_lv0: int) -> tuple[Tensor, Tensor]:
    """Sums of the tiles in each cell of a grid of tile_size_lv0, laid from the smallest x and y; cells
    whose sum is all zero are background and left out.

    Args:
        features: (N, D) float32.
        coords: (N, 2) int64, level-0 px.

    Returns:
        (C, D) float32 and (C, 2) float32, their cells, in the order of x, then y.
    """
    at = torch.div(coords - coords.amin(dim=0), tile_size_lv0, rounding_mode="floor")
    cells, member = torch.unique(at, dim=0, return_inverse=True)
    sums = features.new_zeros(len(cells), features.shape[1]).index_add_(0, member, features)
    seen = (sums != 0).any(dim=1)
    if not seen.any():
        raise NothingToEmbedError(
            "the embeddings of the slide's tiles are all zero: TITAN has nothing to embed"
        )
    return sums[seen], cells[seen].float()


class _Tower(nn.Module):
    def __init__(
        self, in_dim: int, dim: int, depth: int, heads: int, hidden: int, pool_heads: int, projects: bool
    ) -> None:
        super().__init__()
        self.in_dim, self.slopes = in_dim, alibi_slopes(heads)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.patch_embed = nn.Sequential(nn.Linear(in_dim, dim), nn.GELU())
        self.blocks = nn.ModuleDict(
            {"modules_list": nn.ModuleList(_Block(dim, heads, hidden) for _ in range(depth))}
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn_pool_contrastive = _Pool(dim, pool_heads)
        self.proj = nn.Parameter(torch.randn(dim, dim) * dim**-0.5) if projects else None

    def forward(self, cells: Tensor, places: Tensor) -> Tensor:
        """(C, in_dim), (C, 2) -> (dim,)."""
        tokens = torch.cat([self.cls_token[0], self.patch_embed(cells)])
        for block in cast("nn.ModuleList", self.blocks["modules_list"]):
            tokens = block(tokens, places, self.slopes)
        pooled = cast("Tensor", self.attn_pool_contrastive(self.norm(tokens)))
        return pooled if self.proj is None else pooled @ self.proj


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, hidden)

    def forward(self, tokens: Tensor, places: Tensor, slopes: list[float]) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), places, slopes)
        return tokens + in_chunks(lambda part: self.mlp(self.norm2(part)), tokens)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, places: Tensor, slopes: list[float]) -> Tensor:
        query, key, value = (split_heads(each, self.heads) for each in self.qkv(tokens).chunk(3, dim=-1))
        attended = alibi_attention(query, key, value, places, slopes)
        return cast("Tensor", self.proj(attended.transpose(0, 1).flatten(1)))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.fc2(F.gelu(self.fc1(tokens))))


class _Pool(nn.Module):
    """One query that was learnt attends to all tokens, the class token among them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, dim) -> (dim,)."""
        tokens = self.ln_k(tokens)
        pooled, _ = self.attn(self.ln_q(self.query), tokens, tokens, need_weights=False)
        return cast("Tensor", pooled[0])
