"""Texts as CLIP takes them: byte-pair encoding with the vocabulary that open-clip-torch ships."""

from __future__ import annotations

import gzip
import html
import importlib.util
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.installation import add_extra

__all__ = ["ClipTokeniser", "as_rows", "clip_vocabulary"]

#: Of the file, which holds more; a vocabulary is 2 * 256 single bytes, these, and two marks: 49,408 in all.
MERGES = 49_152 - 256 - 2
_CONTRACTIONS = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")
_END = "</w>"
#: Quotation marks, which CLIP's own cleaning of texts straightens.
_STRAIGHT = {**dict.fromkeys(range(0x2018, 0x201C), "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}


def clip_vocabulary() -> Path:
    """The file of CLIP's merges in open-clip-torch, which is not imported.

    Raises:
        ExtraMissingError: it is not installed.
    """
    found = importlib.util.find_spec("open_clip")
    if found is not None and found.origin is not None:
        path = Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
        if path.is_file():
            return path
    raise ExtraMissingError(
        f"texts are cut into tokens with a vocabulary that open-clip-torch has: {add_extra('text')}"
    )


class ClipTokeniser:
    """Texts -> tokens, as OpenAI's and open_clip's tokeniser gives them.

    Args:
        path: of the merges, .txt.gz: a line of comment, then two pieces a line, the most frequent first.
        merges: how many of them count.
    """

    def __init__(self, path: Path, merges: int = MERGES) -> None:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : merges + 1]
        pairs = [tuple(line.split()) for line in lines if line.strip()]
        singles = list(_bytes_as_text().values())
        pieces = [*singles, *(each + _END for each in singles), *("".join(pair) for pair in pairs)]
        self._numbers = {piece: number for number, piece in enumerate(pieces)}
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.start, self.end = len(pieces), len(pieces) + 1
        self.size = self.end + 1

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """(N, length) int64: start, the text's tokens, end, zeros; errors as of `as_rows`."""
        marked = [[self.start, *self.tokens(text), self.end] for text in texts]
        return as_rows(texts, marked, length, 0)

    def tokens(self, text: str) -> list[int]:
        """Numbers of a text's pieces, without the marks of start and end."""
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", text).translate(_STRAIGHT)))
        letters = _bytes_as_text()
        words = _words(" ".join(text.split()).lower())
        return [
            self._numbers[piece]
            for word in words
            for piece in self._pieces("".join(letters[byte] for byte in word.encode()))
        ]

    def _pieces(self, word: str) -> list[str]:
        """A word's pieces: neighbours are joined, the most frequent pair first, as long as any is known."""
        pieces = [*word[:-1], word[-1] + _END]
        while len(pieces) > 1:
            pairs = set(pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            pieces = _joined(pieces, best)
        return pieces


def as_rows(texts: Sequence[str], marked: Sequence[list[int]], length: int, pad: int) -> Tensor:
    """(N, length) int64: the tokens of each text between its two marks, then `pad`. Longer texts are errors:
    their end would be lost.

    Raises:
        ConfigError: a text is empty or too long; says which.
    """
    made = torch.full((len(texts), length), pad, dtype=torch.int64)
    for row, text, tokens in zip(made, texts, marked, strict=True):
        if len(tokens) <= 2:
            raise ConfigError(f"text {text!r} is empty: say what to look for")
        if len(tokens) > length:
            raise ConfigError(
                f"text {text[:60]!r}… has {len(tokens) - 2} tokens; the encoder takes {length - 2}"
            )
        row[: len(tokens)] = torch.tensor(tokens)
    return made


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Every occurrence of a pair in one piece, from the left."""
    made: list[str] = []
    for piece in pieces:
        if made and (made[-1], piece) == pair:
            made[-1] += piece
        else:
            made.append(piece)
    return made


def _words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single digits, runs of anything else but spaces."""
    at = 0
    while at < len(text):
        contraction = next((each for each in _CONTRACTIONS if text.startswith(each, at)), None)
        kind, end = _kind(text[at]), at + 1
        if contraction is not None:
            end = at + len(contraction)
        elif kind in ("letter", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[at:end]
        at = end


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(category[0], "other")


@cache
def _bytes_as_text() -> dict[int, str]:
    """A printable character for every byte: itself where it is one, else one from 256 on."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in spans for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
