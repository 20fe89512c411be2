"""Prism2, whose architecture is code in its Hugging Face repository, run only with consent."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any, cast

import torch
from torch import nn

from slide2vec.encoders.remote_code import consented, load_remote
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.weights import WeightsChoice
from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.recipes import Recipe, Variant

__all__ = ["Prism2Encoder", "build_prism2"]

#: The first transformers whose Phi-3 lacks what the code of the diagnostic output calls.
_PHI3_CHANGED = (4, 52)


class Prism2Encoder(nn.Module):
    """The repository's network and the processor that prepares tile embeddings for it.

    Args:
        network, processor: as transformers loads them.
        in_dim: of the tile embeddings.
        output: "base", of the Perceiver, or "diagnostic", of the language model behind it.
    """

    def __init__(self, network: nn.Module, processor: Any, in_dim: int, output: str) -> None:
        super().__init__()
        self.network, self.in_dim, self.output = network, in_dim, output
        self._processor = processor

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (variant.dim,). Coordinates and order do not matter.

        Raises:
            NothingToEmbedError: there are no tiles.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        like = next(self.network.parameters())
        features = checked_features(bag, self.in_dim, like)
        batch = self._processor(tile_embeddings=[features]).to(like.device)
        embed = getattr(self.network, f"get_{self.output}_embedding")
        return SlideFeatures(cast("torch.Tensor", embed(**batch))[0].float())


def build_prism2(recipe: Recipe, variant: Variant, weights: WeightsChoice, consent: bool) -> nn.Module:
    """Prism2 in bf16, as published: its attention (flash-attn) takes nothing wider. It runs on CUDA only.

    Raises:
        PresetError: no consent.
        ExtraMissingError: transformers or flash-attn is missing, or transformers is too new.
        ConfigError: there is no CUDA device.
        WeightsError, GatedWeightsError: the repository cannot be had or does not load.
    """
    place = consented(recipe, weights, consent)
    _check_machine(recipe.name, variant.pool)
    network = load_remote(recipe, place, "AutoModel", torch_dtype=torch.bfloat16)
    processor = load_remote(recipe, place, "AutoProcessor")
    return Prism2Encoder(network, processor, recipe.encoder.kwargs["in_dim"], variant.pool)


def _check_machine(preset: str, output: str) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        raise ExtraMissingError(
            f"preset {preset} needs the package flash-attn, which its code imports: pip install flash-attn"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"preset {preset} runs on NVIDIA GPUs only (flash-attn), and there is none here")
    if output != "diagnostic":
        return
    installed = metadata.version("transformers")
    if tuple(map(int, installed.split(".")[:2])) >= _PHI3_CHANGED:
        raise ExtraMissingError(
            f"output diagnostic of preset {preset} was written for transformers 4.51.3 and does not run with "
            f"{installed}: pip install transformers==4.51.3, or use output base"
        )
