"""Dilated attention of LongNet (Ding et al., 2023), segment by segment.

A branch with segments of length w and dilation r splits the tokens into segments, and in a segment the
g-th of r equal groups of heads sees tokens g, g + r, g + 2r … only. Where it computes something for a
token, the branches are mixed by the softmax of their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slide2vec.encoders.slide.blocks import rows_within

__all__ = ["dilated_attention"]

#: For the scores of one block of rows: what stays in the caches of a CPU; a GPU is kept busy by more.
_BLOCK_BYTES = {"cpu": 8 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 512 * 2**20


def dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], dilations: Sequence[int]
) -> Tensor:
    """(heads, N, d) each -> (heads, N, d) float32.

    A segment is not longer than the sequence. What is missing to whole segments and whole dilations is
    filled up with zero keys and values, which take part in the softmax, as in the code that the
    published weights were trained with. Here they are not computed: n of them add n to the sum of the
    exponentials and nothing to the values.

    Args:
        segments, dilations: of the branches; every dilation divides the number of heads, and there is a
            branch without (1), so that every token gets a value from every head.
    """
    heads, tokens, _ = query.shape
    mixed = query.new_zeros(query.shape, dtype=torch.float32)
    weight = query.new_full((heads, tokens, 1), -torch.inf, dtype=torch.float32)  # log-sum-exp so far
    for segment, dilation in zip(segments, dilations, strict=True):
        for where, padding in _parts(heads, tokens, min(segment, tokens), dilation):
            found, lse = _attention(query[where], key[where], value[where], padding)
            before = weight[where]
            together = torch.logaddexp(before, lse)
            mixed[where] = mixed[where] * (before - together).exp() + found * (lse - together).exp()
            weight[where] = together
    return mixed


def _parts(heads: int, tokens: int, segment: int, dilation: int) -> Iterator[tuple[tuple[slice, slice], int]]:
    """Heads and tokens that see each other, and the number of zero keys that they see besides."""
    group = heads // dilation
    length = math.ceil(segment / dilation)
    for start in range(0, tokens, segment):
        stop = min(start + segment, tokens)
        for number in range(dilation):
            seen = range(start + number, stop, dilation)
            if seen:
                where = (
                    slice(number * group, (number + 1) * group),
                    slice(start + number, stop, dilation),
                )
                yield where, length - len(seen)


def _attention(query: Tensor, key: Tensor, value: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Attention (h, n, d) and log-sum-exp of the scores (h, n, 1), with `padding` zero keys; float32."""
    heads, tokens, dim = query.shape
    key, value = key.transpose(1, 2) * dim**-0.5, value.contiguous()
    budget = _BLOCK_BYTES.get(query.device.type, _BLOCK_BYTES_ELSEWHERE)
    parts = []
    for rows in torch.split(query, rows_within(budget, heads * tokens * 4), dim=1):
        scores = (rows @ key).float()
        shares = scores.softmax(dim=-1)
        # the largest share is exp(its score - lse)
        lse = scores.amax(dim=-1, keepdim=True) - shares.amax(dim=-1, keepdim=True).log()
        parts.append(((shares.to(value.dtype) @ value).float(), lse))
    found, lse = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    if padding:
        full = torch.logaddexp(lse, lse.new_tensor(math.log(padding)))
        found, lse = found * (lse - full).exp(), full
    return found, lse
