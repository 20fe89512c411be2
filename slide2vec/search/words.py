"""The tiles of a run that are nearest to a text, by the text side of the run's own encoder."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import torch

from slide2vec.encoders.late import LateEncoder, as_module
from slide2vec.encoders.preset_chain import load_parts
from slide2vec.encoders.text import load_text_side, text_spec
from slide2vec.encoders.weights import WeightsChoice
from slide2vec.errors import PresetError, UnsupportedError, WeightsError
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.search.find import Run
from slide2vec.search.index import FoundTile

__all__ = ["has_texts", "nearest_to_text", "text_query"]

logger = logging.getLogger(__name__)


def nearest_to_text(
    run: Run, text: str, count: int = 20, *, weights: WeightsChoice = None
) -> list[FoundTile]:
    """The tiles whose embeddings have the largest cosine to a text, the nearest first.

    Args:
        weights: see `text_query`.

    Raises:
        ArtifactError, OutputError: as of `Run.nearest`. Others: as of `text_query`.
    """
    run, query = text_query(run, text, weights=weights)
    return run.nearest(query, count)


def has_texts(encoder: str) -> bool:
    """Whether tiles of an encoder can be compared with texts; true of names that are no preset's."""
    try:
        text_spec(load_recipe(encoder))
    except UnsupportedError:
        return False
    except PresetError:
        pass
    return True


def text_query(run: Run, text: str, *, weights: WeightsChoice = None) -> tuple[Run, torch.Tensor]:
    """A text's embedding (D,), and the run with its embeddings in the space of texts, to compare with it.

    Embeddings that lack only a linear projection into the space of texts (those of conch and of musk, as they
    are by default) are projected for that, exactly; others that are not in it are refused.

    Args:
        weights: of the run's encoder; None = the Hugging Face hub, or random with the run's seed.

    Raises:
        UnsupportedError: the run's encoder has no text side, or its embeddings are of another output.
        WeightsError: the weights cannot be had, or are not those that the embeddings were made with.
        ConfigError: the text is empty or too long. PresetError: the encoder is no preset.
    """
    recipe = load_recipe(str(run.encoder.get("name")))
    spec = text_spec(recipe)
    variant = str(run.encoder.get("output_variant") or recipe.default_variant)
    if variant != spec.variant and variant not in spec.projected:
        raise UnsupportedError(
            f"the run has output {variant!r} of preset {recipe.name}, and texts are in the space of its "
            f"output {spec.variant!r}: embed the slides with output_variant={spec.variant!r} "
            f"(--output-variant {spec.variant})"
        )
    recorded = str(run.encoder.get("weights") or "")
    seed = int(recorded.removeprefix("random:")) if recorded.startswith("random:") else 0
    if weights is None and recorded.startswith("random:"):
        weights = "random"
    options = {"weights": weights, "seed": seed, "trust_remote_code": False, "input_size_px": None}
    if recipe.weights is not None and weights != "random":
        _check_weights(recipe, {**options, "output_variant": variant}, recorded)
    if variant != spec.variant:
        (part,) = load_parts(recipe, {**options, "output_variant": spec.variant})
        matrix = cast("torch.nn.Linear", as_module(part.encoder).projection).weight.T
        if len(matrix) != spec.projected[variant]:
            raise UnsupportedError(f"preset {recipe.name}: text.projected is not what its projection takes")
        run = replace(run, projection=matrix.contiguous())
    (query,) = load_text_side(recipe, spec.variant, weights, seed).embed([text])
    return run, query


def _check_weights(recipe: Recipe, options: dict[str, Any], recorded: str) -> None:
    """Texts are compared with images of the same training only."""
    (part,) = load_parts(recipe, options)
    encoder = LateEncoder.of(part.encoder)
    if not recorded:
        logger.warning(
            "the run does not say which weights of %s it was made with: they are taken to be those of %s",
            recipe.name,
            part.weights,
        )
    elif encoder.digest != recorded:
        raise WeightsError(
            f"the run was made with other weights of {recipe.name} (digest {recorded}) than {part.weights} "
            f"({encoder.digest}): give those of the run (weights=…, --weights)"
        )
    encoder.confirm()
