"""CoCa vision towers (CONCH, CONCH v1.5): a timm trunk, attention pooling by one query, a norm."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.lazy import import_timm
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["AttentionPool", "CocaEncoder"]

timm = import_timm()


class AttentionPool(nn.Module):
    """Queries that were learnt attend to all tokens.

    Args:
        dim: of the queries and of the result.
        context_dim: of the tokens.
        heads: of the attention.
        bias: whether its linear layers have one.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim)
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, context_dim) -> (B, queries, dim)."""
        query = self._by_head(self.q(self.norm_query(self.query))[None])
        key, value = self.kv(self.norm_context(tokens)).chunk(2, dim=-1)
        key, value = self._by_head(key), self._by_head(value)
        query = query.expand(tokens.shape[0], -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, key, value)
        return cast("Tensor", self.out(pooled.transpose(1, 2).flatten(2)))

    def _by_head(self, values: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, dim / heads)."""
        batch, count, dim = values.shape
        return values.reshape(batch, count, self.heads, dim // self.heads).transpose(1, 2)


class CocaEncoder(nn.Module):
    """The image side of a CoCa model, before its projection into the space shared with text, or ("aligned")
    in it.

    Besides timm's arguments, the recipe's kwargs hold `pool_heads` and `pool_bias`. `forward` takes
    normalised pixels (B, 3, H, W) float and returns features (B, variant.dim).
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        kwargs = dict(spec.kwargs)
        heads, bias = kwargs.pop("pool_heads"), kwargs.pop("pool_bias")
        self.vit: nn.Module = timm.create_model(spec.arch, pretrained=False, **kwargs)
        self.pool = AttentionPool(variant.dim, cast("int", self.vit.embed_dim), heads, bias)
        self.norm = nn.LayerNorm(variant.dim)
        if variant.pool == "aligned":
            self.projection = nn.Linear(variant.dim, variant.dim, bias=False)
        self.aligned, self.normalise = variant.pool == "aligned", variant.normalise

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = self.vit.forward_features(pixels)  # type: ignore[operator]
        features = self.norm(self.pool(tokens)[:, 0])
        if self.aligned:
            features = self.projection(features)
        return F.normalize(features, dim=-1) if self.normalise else cast("Tensor", features)
