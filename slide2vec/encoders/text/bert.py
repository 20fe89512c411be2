"""The text side of KEEP: PubMedBERT, by the class of transformers, and its pooled first token."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from slide2vec.errors import ExtraMissingError
from slide2vec.installation import add_extra

__all__ = ["BertTextEncoder"]

#: Of the padding in BERT's vocabularies.
PAD = 0
PREFIX = "text."


class BertTextEncoder(nn.Module):
    """Tokens (N, T) int64, the rest 0 -> (N, dim), not of unit length.

    Args:
        dim: of the embeddings, which is BERT's hidden size.
        context: tokens that a text may have.
        bert: of transformers' BertConfig.
    """

    def __init__(self, *, dim: int, context: int = 256, **bert: Any) -> None:
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise ExtraMissingError(f"this text side needs the package transformers: {add_extra('text')}")
        from transformers import BertConfig, BertModel

        config = BertConfig(**bert, hidden_size=dim)
        self.context, self.vocabulary = context, config.vocab_size
        self.text = BertModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        found = self.text(input_ids=tokens, attention_mask=(tokens != PAD).long())
        return cast("Tensor", found.pooler_output)

    @staticmethod
    def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of KEEP's checkpoint: its text side. Older files of transformers have a table of 0, 1, 2, …"""
        return {
            key: value
            for key, value in state.items()
            if key.startswith(PREFIX) and not key.endswith(".position_ids")
        }
