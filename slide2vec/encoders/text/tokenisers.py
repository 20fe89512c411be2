"""Tokenisers in files beside the weights: Hugging Face's .json, BERT's vocab.txt, sentencepiece's .spm. They
are data; no code comes with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slide2vec.encoders.text.clip_tokens import ClipTokeniser, as_rows, clip_vocabulary
from slide2vec.errors import ExtraMissingError, WeightsError
from slide2vec.installation import add_extra

__all__ = ["Tokeniser", "load_tokeniser"]

#: What tokenisers call the token that fills up a row.
PADDING = ("<pad>", "[PAD]")


class Tokeniser(Protocol):
    """Texts -> (N, length) int64: each between marks of its start and end, then padding.

    Attributes:
        size: how many tokens there are.
    """

    size: int

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """See the class.

        Raises:
            ConfigError: a text is empty or too long; says which.
        """


def load_tokeniser(path: Path | None) -> Tokeniser:
    """That of a file; None: CLIP's, with the vocabulary that open-clip-torch has.

    Raises:
        ExtraMissingError: the package that reads it is missing.
        WeightsError: it cannot be read, or is no tokeniser with marks of start and end.
    """
    if path is None:
        return ClipTokeniser(clip_vocabulary())
    if path.suffix in (".spm", ".model"):
        return _SentencePieces(path)
    return _Tokens(path)


class _Tokens:
    """A file of the package tokenizers, or a vocabulary of BERT's: a word piece a line, in lower case."""

    def __init__(self, path: Path) -> None:
        _require("tokenizers")
        import tokenizers

        try:
            if path.suffix == ".json":
                self._own = tokenizers.Tokenizer.from_file(str(path))
            else:
                self._own = tokenizers.BertWordPieceTokenizer(str(path), lowercase=True)
        except Exception as error:  # the package raises nothing more specific
            raise WeightsError(f"tokeniser {path} cannot be read: {error}") from error
        self._own.no_padding()
        self._own.no_truncation()
        self.size = self._own.get_vocab_size()
        pad = next((number for name in PADDING if (number := self._own.token_to_id(name)) is not None), None)
        if pad is None or len(self._own.encode("").ids) != 2:
            raise WeightsError(
                f"tokeniser {path} has no padding ({' or '.join(PADDING)}), or sets no marks around a text: "
                "it is not of one of the models here"
            )
        self._pad = pad

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """See `Tokeniser`."""
        marked = [self._own.encode(text).ids for text in texts]
        return as_rows(texts, marked, length, self._pad)


class _SentencePieces:
    """A model of sentencepiece, its numbers as XLM-RoBERTa counts them: start, padding, end and unknown, then
    the pieces."""

    START, PAD, END, UNKNOWN = range(4)

    def __init__(self, path: Path) -> None:
        _require("sentencepiece")
        import sentencepiece

        try:
            self._own = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"tokeniser {path} cannot be read: {error}") from error
        self.size = self._own.vocab_size() + 1

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """See `Tokeniser`."""
        pieces = [[number + 1 if number else self.UNKNOWN for number in self._own.encode(t)] for t in texts]
        return as_rows(texts, [[self.START, *each, self.END] for each in pieces], length, self.PAD)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ExtraMissingError(f"texts are cut into tokens by the package {package}: {add_extra('text')}")
