"""The text side of MUSK: the text expert of BEiT-3 and the layer that projects its first token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Beit3TextEncoder"]

#: Of the padding, as XLM-RoBERTa counts.
PAD = 1
#: Rows of the table of positions that are never used: it counts from 2, as fairseq does.
UNUSED_ROWS = 2
#: Keys of the text side in torchscale's names: expert B, what only texts have, and the projection.
_OF_TEXTS = re.compile(r"(text_embed|language_head|encoder\..*\.B)\.")


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return cast("Tensor", self.out_proj(self.inner_attn_ln(mixed.transpose(1, 2).flatten(2))))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.fc2(self.ffn_layernorm(F.gelu(self.fc1(tokens)))))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.ffn = _Attention(width, heads), _Mlp(width, hidden)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.self_attn_layer_norm(tokens), mask)
        return cast("Tensor", tokens + self.ffn(self.final_layer_norm(tokens)))


class Beit3TextEncoder(nn.Module):
    """Tokens (N, T) int64, the rest 1 -> (N, dim), not of unit length. Parameters have torchscale's names
    without the expert's.

    Args:
        context: tokens that a text may have.
        positions: rows of the table of positions.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        dim: int,
        context: int = 100,
        vocabulary: int = 64_010,
        positions: int = 1024,
    ) -> None:
        super().__init__()
        self.context, self.vocabulary = context, vocabulary
        self.text_embed = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleDict(
            {
                "embed_positions": nn.Embedding(positions, width),
                "layers": nn.ModuleList(_Layer(width, heads, hidden) for _ in range(layers)),
                "layer_norm": nn.LayerNorm(width),
            }
        )
        self.language_head = nn.Linear(width, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        there = tokens != PAD
        places = torch.arange(UNUSED_ROWS, UNUSED_ROWS + tokens.shape[1], device=tokens.device)
        states = self.text_embed(tokens) + self.encoder["embed_positions"](places)
        states = states * there[..., None]
        for layer in cast("nn.ModuleList", self.encoder["layers"]):
            states = layer(states, there[:, None, None])
        return cast("Tensor", self.language_head(self.encoder["layer_norm"](states[:, 0])))

    @staticmethod
    def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of MUSK's checkpoint: its text side, under our keys."""
        plain = {key.removeprefix("beit3."): value for key, value in state.items()}
        return {re.sub(r"\.B(?=\.)", "", key): value for key, value in plain.items() if _OF_TEXTS.match(key)}
