"""Encoders whose architecture is code in their Hugging Face repository, run only with consent."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slide2vec.encoders.weights import WeightsChoice, no_access
from slide2vec.errors import ExtraMissingError, GatedWeightsError, PresetError, WeightsError
from slide2vec.files import hub_or_cache
from slide2vec.installation import add_extra
from slide2vec.recipes import Recipe, Variant, WeightsSource

__all__ = ["RemoteEncoder", "build_remote", "consented", "load_remote", "whole_repository"]

logger = logging.getLogger(__name__)


class RemoteEncoder(nn.Module):
    """A transformers model and the pooling of its last tokens.

    `forward` takes normalised pixels (B, 3, H, W) float and returns features (B, variant.dim).
    """

    def __init__(self, network: nn.Module, prefix_tokens: int, variant: Variant) -> None:
        super().__init__()
        self.network = network
        self.prefix_tokens = prefix_tokens
        self.pool = variant.pool

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = self.network(pixel_values=pixels).last_hidden_state
        if self.pool == "cls":
            return cast("Tensor", tokens[:, 0])
        return torch.cat([tokens[:, 0], tokens[:, self.prefix_tokens :].mean(dim=1)], dim=-1)


def build_remote(recipe: Recipe, variant: Variant, weights: WeightsChoice, consent: bool) -> nn.Module:
    """The encoder of a recipe of family "remote".

    Args:
        weights: None = the Hugging Face hub, or a directory with a copy of the repository.
        consent: the user agreed to run the repository's code.

    Raises:
        PresetError: no consent.
        ExtraMissingError: transformers is not installed.
        WeightsError, GatedWeightsError: the repository cannot be had or does not load.
    """
    place = consented(recipe, weights, consent)
    network = cast("nn.Module", load_remote(recipe, place, "AutoModel"))
    return RemoteEncoder(network.float(), recipe.encoder.prefix_tokens, variant)


def consented(recipe: Recipe, weights: WeightsChoice, consent: bool) -> Path | None:
    """Where to load a recipe's repository from, with the user's consent: a directory, None = the hub.

    Raises:
        PresetError: no consent.
        ExtraMissingError: transformers is not installed.
        WeightsError: `weights` is no copy of the repository.
    """
    source = recipe.weights
    if source is None:
        raise PresetError(f"preset {recipe.name} is of family remote and names no repository (weights.repo)")
    place = _place(recipe.name, source, weights)
    if not consent:
        raise PresetError(
            f"preset {recipe.name} runs Python code that comes with its weights, from "
            f"{_described(source, place)}. "
            "Read that code; to let it run on this machine, pass trust_remote_code=True "
            "(command line: --trust-remote-code)"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ExtraMissingError(f"preset {recipe.name} needs the package transformers: {add_extra('models')}")
    return place


def _place(preset: str, source: WeightsSource, weights: WeightsChoice) -> Path | None:
    """The directory to load from; None = the hub."""
    if weights is None:
        return None
    if weights == "random":
        raise WeightsError(
            f'preset {preset} cannot be built with weights="random": its architecture is code of '
            f"https://huggingface.co/{source.repo}. Use another preset to try the pipeline"
        )
    path = Path(weights).expanduser()
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"preset {preset}: weights={str(weights)!r} is not a directory with a copy of "
            f"https://huggingface.co/{source.repo} at revision {source.revision} (config.json, code, weights)"
        )
    return path


def _described(source: WeightsSource, place: Path | None) -> str:
    hub = f"https://huggingface.co/{source.repo}/tree/{source.revision} (revision {source.revision})"
    return hub if place is None else f"{place} (a copy of {hub})"


def whole_repository(recipe: Recipe) -> Path:
    """The folder in the hub's cache with a recipe's repository, fetched where it is not there; its code is
    among it, and not run.

    Raises:
        WeightsError, GatedWeightsError: it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub import errors

    source = recipe.weights
    assert source is not None
    try:
        with hub_or_cache():
            return Path(huggingface_hub.snapshot_download(source.repo, revision=source.revision))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise no_access(recipe.name, source, error) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"preset {recipe.name}: {source.page} could not be fetched: {reason}") from error


def load_remote(recipe: Recipe, place: Path | None, loader: str, **options: Any) -> Any:
    """What a class of transformers ("AutoModel", say) loads from the repository, at the pinned revision
    for weights and code alike.

    Args:
        place: from `consented`.
        options: of the loader.

    Raises:
        WeightsError, GatedWeightsError: the repository cannot be had or does not load.
    """
    import transformers

    source = recipe.weights
    assert source is not None
    pins: dict[str, Any] = {}
    if place is None:
        pins = {"revision": source.revision, "code_revision": source.revision}
    logger.info("running the code of %s", _described(source, place))
    try:
        with hub_or_cache() if place is None else nullcontext():
            return getattr(transformers, loader).from_pretrained(
                source.repo if place is None else str(place), trust_remote_code=True, **pins, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise _explained(recipe.name, source, place, error) from error


def _explained(preset: str, source: WeightsSource, place: Path | None, error: Exception) -> WeightsError:
    page = f"https://huggingface.co/{source.repo}"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    if place is None and _is_about_access(error):
        return GatedWeightsError(
            f"the weights of preset {preset} are gated: request access at {page}, then log in with "
            f"`hf auth login` (or set HF_TOKEN) and try again ({reason})"
        )
    return WeightsError(
        f"preset {preset} could not be loaded from {_described(source, place)} with transformers "
        f"{metadata.version('transformers')}: {reason}. Without network access, pass "
        f'weights="/path/to/a/copy" of {page}; code of another time may ask for another version'
    )


def _is_about_access(error: BaseException | None) -> bool:
    """Whether the hub refused (transformers wraps its errors in OSError)."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        error = error.__cause__ or error.__context__
    return False
