"""The text side of a preset: its encoder, from the weights of the image side, and the tokeniser beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.choices import TEXT_ENCODERS
from slide2vec.encoders.preset_chain import PartsWeights, weights_by_part
from slide2vec.encoders.text.tokenisers import Tokeniser, load_tokeniser
from slide2vec.encoders.weights import (
    WeightsChoice,
    assign_strictly,
    check_weights_file,
    compute_tables,
    find_beside,
    find_weights,
    read_checkpoint,
    seeded,
)
from slide2vec.encoders.wrapped import fitting
from slide2vec.errors import ConfigError, UnsupportedError
from slide2vec.recipes import Recipe, TextSpec, all_recipes

__all__ = ["TextSide", "load_text_side", "text_spec"]

#: Rows that a table of tokens may have beyond the tokeniser's: MUSK's has 64,010 for 64,001 tokens.
SPARE_ROWS = 16


class TextEncoder(Protocol):
    """What the modules of `TEXT_ENCODERS` have: tokens (N, T) int64 -> (N, dim).

    Attributes:
        context: tokens that a text may have at most, the marks of its start and end included.
        vocabulary: rows of its table of tokens.
    """

    context: int
    vocabulary: int

    @staticmethod
    def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a whole checkpoint, what belongs to the text side, under the module's own keys."""


@dataclass(frozen=True)
class TextSide:
    """Embeds texts. `normalise`: to unit length, where the preset's images are."""

    encoder: nn.Module
    tokenise: Tokeniser
    normalise: bool = False

    def to(self, device: torch.device) -> Self:
        """The same, its encoder moved to a device."""
        self.encoder.to(device)
        return self

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU, in the order of the texts.

        Raises:
            ConfigError: `texts` is one text rather than several, or one of them is empty or too long.
        """
        if isinstance(texts, str):
            raise ConfigError(f"texts={texts!r}: give a list of texts, [{texts!r}]")
        device = next(self.encoder.parameters()).device
        context = cast("TextEncoder", self.encoder).context
        with torch.inference_mode():
            found = self.encoder(self.tokenise(texts, context).to(device)).float().cpu()
        return cast("Tensor", F.normalize(found, dim=-1) if self.normalise else found)


def text_spec(recipe: Recipe) -> TextSpec:
    """The text side that a recipe describes.

    Raises:
        UnsupportedError: it has none that slide2vec runs; says which have.
    """
    if recipe.text is not None:
        return recipe.text
    having = {name: each for name, each in all_recipes().items() if each.text is not None}
    fed = [
        name for name, each in having.items() if each.tile_encoder and each.tile_encoder.preset == recipe.name
    ]
    of_slides = (
        f"; the texts of {fed[0]}, which it feeds, are compared with embeddings of slides" if fed else ""
    )
    raise UnsupportedError(
        f"preset {recipe.name} has no text side that slide2vec runs{of_slides} (those that have: "
        f"{', '.join(having)})"
    )


def load_text_side(recipe: Recipe, variant: str, weights: PartsWeights, seed: int = 0) -> TextSide:
    """The text side of a preset, from the same weights as its image side; in evaluation mode, on the CPU, in
    fp32. The tokeniser's file is looked for beside the weights, then in their repository on the hub.

    Args:
        variant: output of the image side that texts are to be compared with.

    Raises:
        UnsupportedError: the preset has no text side that slide2vec runs, or its space is another output's.
        WeightsError: the weights cannot be had or have no such text side, or there is no tokeniser.
        ExtraMissingError: a package that cuts texts into tokens, or holds CLIP's vocabulary, is missing.
        ConfigError: the tokeniser is not that of the encoder.
    """
    spec = text_spec(recipe)
    if variant != spec.variant:
        raise UnsupportedError(
            f"texts of preset {recipe.name} are in the space of its output {spec.variant!r}, not of "
            f"{variant!r}: embed slides with output_variant={spec.variant!r} to compare them"
        )
    own = weights_by_part(recipe, weights)[recipe.name]
    output = recipe.variants[variant]
    build = partial(TEXT_ENCODERS[spec.family].imported(), **spec.kwargs, dim=output.dim)
    encoder = _loaded(build, recipe, own, seed).eval().requires_grad_(False)
    tokenise = load_tokeniser(find_beside(recipe, spec.tokeniser, spec.tokeniser_url, own))
    rows = cast("TextEncoder", encoder).vocabulary
    if not tokenise.size <= rows < tokenise.size + SPARE_ROWS:
        raise ConfigError(f"the vocabulary has {tokenise.size} tokens, and the encoder was trained on {rows}")
    return TextSide(encoder, tokenise, output.normalise)


def _loaded(build: Any, recipe: Recipe, weights: WeightsChoice, seed: int) -> nn.Module:
    if weights == "random":
        with seeded(seed):
            return cast("nn.Module", build())
    path = find_weights(recipe, weights)
    check_weights_file(path, recipe, weights)
    with torch.device("meta"):
        encoder = cast("nn.Module", build())
    compute_tables(encoder, build)
    published = cast("TextEncoder", encoder).published
    state = fitting(read_checkpoint(path), published, encoder.state_dict().keys(), path)
    assign_strictly(encoder, state, f"weights file {path} has no text side of preset {recipe.name}")
    return encoder
