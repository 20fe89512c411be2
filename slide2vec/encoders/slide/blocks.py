"""Pieces that slide encoders share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_chunks", "rows_within", "split_heads"]

#: Tokens per pass through a layer that works token by token: its hidden layer then stays small.
_TOKENS = 16_384


def in_chunks(layer: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """(N, D) through a layer that works token by token, a part at a time."""
    return torch.cat([layer(part) for part in torch.split(tokens, _TOKENS)])


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(N, heads * d) -> (heads, N, d), contiguous: attention reads it once per block of rows."""
    return tokens.reshape(len(tokens), heads, -1).transpose(0, 1).contiguous()


def rows_within(budget_bytes: int, bytes_per_row: int) -> int:
    """Rows of a matrix that fit into a budget; at least 16, or products of matrices get slow."""
    return max(16, budget_bytes // bytes_per_row)
