"""The text side of CLIP: a causal transformer over tokens; its state at the end of the text is projected into
the space of images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClipTextEncoder", "TextBlock", "open_clip_key"]

#: Keys of transformers' CLIPModel -> those of OpenAI's and open_clip's models.
_TRANSFORMERS = (
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.(\d+)\.layer_norm", r"transformer.resblocks.\1.ln_"),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.", r"transformer.resblocks.\1.attn."),
)
#: What a checkpoint's keys of the text side begin with.
_OF_TEXTS = re.compile(
    r"(text_model|transformer|ln_final|token_embedding|positional_embedding|text_projection)\b"
)


class TextBlock(nn.Module):
    """Attention to what is before, or what a mask allows, then an MLP; each of a norm's output, and added.
    Parameters have open_clip's names, but for a dot.

    Args:
        quick: OpenAI's approximation of GELU, with which their models were trained.
    """

    def __init__(self, width: int, heads: int, quick: bool = False) -> None:
        super().__init__()
        self.heads, self.quick = heads, quick
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"in_proj": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, W) -> (N, T, W). `mask`: (N, 1, T, T), what each token attends to."""
        parts = self.attn["in_proj"](self.ln_1(tokens)).chunk(3, dim=-1)
        query, key, value = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        tokens = tokens + self.attn["out_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = self.mlp["c_fc"](self.ln_2(tokens))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return cast("Tensor", tokens + self.mlp["c_proj"](hidden))


class ClipTextEncoder(nn.Module):
    """Tokens (N, context) int64 -> (N, dim), as image embeddings not of unit length.

    Args:
        vocabulary: tokens that there are, the last of which marks the end of a text.
        quick_gelu: OpenAI's approximation of GELU.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        dim: int,
        context: int = 77,
        vocabulary: int = 49_408,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.vocabulary = context, vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.01)
        blocks = nn.ModuleList(TextBlock(width, heads, quick_gelu) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in cast("nn.ModuleList", self.transformer["resblocks"]):
            states = block(states)
        ends = (tokens == self.vocabulary - 1).int().argmax(dim=1)
        at_end = self.ln_final(states[torch.arange(len(tokens), device=tokens.device), ends])
        return cast("Tensor", at_end @ self.text_projection)

    @staticmethod
    def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a checkpoint of OpenAI, open_clip or transformers: its text side, under our keys."""
        made: dict[str, Tensor] = {}
        for key, value in state.items():
            if not _OF_TEXTS.match(key) or key.endswith(".position_ids"):
                continue
            for pattern, new in _TRANSFORMERS:
                key = re.sub(pattern, new, key)
            made[open_clip_key(key)] = value
        for key in [key for key in made if ".attn.q_proj." in key]:
            parts = [made.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            made[key.replace("q_proj", "in_proj")] = torch.cat(parts)
        if "text_projection.weight" in made:  # a linear layer
            made["text_projection"] = made.pop("text_projection.weight").T.contiguous()
        return made


def open_clip_key(key: str) -> str:
    """Of a `TextBlock` as open_clip has it: what goes into the attention is a layer here."""
    return key.replace(".attn.in_proj_", ".attn.in_proj.")
