"""The text side of CoCa (CONCH, TITAN): a causal transformer whose last token, a learnt one, gathers all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.text.clip import TextBlock, open_clip_key

__all__ = ["CocaTextEncoder"]

#: Of the padding.
PAD = 0
#: What the keys of CONCH's and TITAN's checkpoints begin with.
PREFIXES = ("text.", "text_encoder.")


class CocaTextEncoder(nn.Module):
    """Tokens (N, context) int64, the rest 0 -> (N, dim), not of unit length.

    The gathering token stands behind the padding, at the last position, so that the embedding of a text
    depends on how far it is filled up: `context` is what it was trained with. It attends to the text and to
    the first token of padding, and where there is padding not to itself: open_clip shifts its mask by one,
    and the published weights were trained so.

    Args:
        context: tokens of a text and its marks; one fewer than there are positions.
    """

    def __init__(
        self, *, width: int, heads: int, layers: int, dim: int, context: int = 127, vocabulary: int = 32_007
    ) -> None:
        super().__init__()
        self.context, self.vocabulary = context, vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.cls_emb = nn.Parameter(torch.randn(width) * 0.01)
        self.positional_embedding = nn.Parameter(torch.randn(context + 1, width) * 0.01)
        blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        states = torch.cat([self.token_embedding(tokens), self.cls_emb.expand(len(tokens), 1, -1)], dim=1)
        states = states + self.positional_embedding
        length = states.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        mask = mask.repeat(len(tokens), 1, 1, 1)
        mask[:, 0, -1] = F.pad(tokens != PAD, (1, 0), value=True)
        for block in cast("nn.ModuleList", self.transformer["resblocks"]):
            states = block(states, mask)
        return cast("Tensor", self.ln_final(states[:, -1]) @ self.text_projection)

    @staticmethod
    def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a checkpoint of CONCH or TITAN: its text side, under our keys."""
        return {
            open_clip_key(key.removeprefix(prefix)): value
            for prefix in PREFIXES
            for key, value in state.items()
            if key.startswith(prefix)
        }
