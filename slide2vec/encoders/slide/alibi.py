"""Attention with biases that grow with the distance between tiles (2-D ALiBi), without an (N, N) matrix.

The bias of a head is minus its slope times the Euclidean distance between two tiles. For 100,000 tiles
and 12 heads all biases would take 480 GB; here they are made for a block of rows and one head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slide2vec.encoders.slide.blocks import rows_within

__all__ = ["BLOCK_BYTES", "alibi_attention", "alibi_slopes"]

#: For distances and biases of one block of rows. With 100,000 tiles a block has 160 rows; larger blocks
#: are no faster on a CPU.
BLOCK_BYTES = 128 * 2**20


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of the heads: a geometric sequence from 2^(-8/n) for n heads, a power of two; for another
    number that of the power below, then every second one of the power above (Press et al., Train short,
    test long, ICLR 2022, and its published code)."""
    upstream = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / upstream) for i in range(1, upstream + 1)]
    return slopes + [2.0 ** (-4.0 * i / upstream) for i in range(1, 2 * (heads - upstream), 2)]


def alibi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    slopes: Sequence[float],
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Scaled dot-product attention of tokens of which the last ones are tiles.

    The tokens before the tiles (class token, registers) have no place: nothing that they look at, and
    nobody who looks at them, is biased.

    Args:
        query: (heads, Q, d), of the first Q tokens.
        key, value: (heads, P + N, d), of P tokens without a place and N tiles.
        places: (N, 2) float32, of the tiles.
        slopes: one per head, per unit of `places`.
        block_bytes: for the distances and biases that exist at a time.

    Returns:
        (heads, Q, d).
    """
    tokens = key.shape[1]
    rows = min(query.shape[1], rows_within(block_bytes, tokens * (4 + query.element_size())))
    bias = query.new_empty(rows, tokens)  # reused: allocating it anew costs as much as filling it
    attended = torch.empty_like(query)
    for start in range(0, query.shape[1], rows):
        block = slice(start, min(start + rows, query.shape[1]))
        distance = _distances(places, block, tokens - len(places))
        mask = bias[: len(distance)]
        for head, slope in enumerate(slopes):
            torch.mul(distance, -slope, out=mask)
            attended[head, block] = F.scaled_dot_product_attention(
                query[None, head : head + 1, block],
                key[None, head : head + 1],
                value[None, head : head + 1],
                attn_mask=mask[None, None],
            )[0, 0]
    return attended


def _distances(places: Tensor, block: slice, prefix: int) -> Tensor:
    """(rows, prefix + N) float32 from the tokens of a block to all, zero where one has no place."""
    distance = places.new_zeros(block.stop - block.start, prefix + len(places))
    first = max(block.start, prefix)
    if first < block.stop:
        here = places[first - prefix : block.stop - prefix]
        # the exact way: by products of matrices small distances would be differences of large numbers
        between = torch.cdist(here, places, compute_mode="donot_use_mm_for_euclid_dist")
        distance[first - block.start :, prefix:] = between
    return distance
