"""Models of timm, with the pooling of the recipe inside."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from slide2vec.encoders.weights import WeightsChoice, load_weights
from slide2vec.errors import GatedWeightsError, PresetError, WeightsError
from slide2vec.lazy import import_timm
from slide2vec.recipes import EncoderSpec, Recipe, Variant

__all__ = ["TimmEncoder", "create_trunk", "generic_encoder"]

timm = import_timm()


class ConvStem(nn.Module):
    """What CTransPath begins with instead of Swin's one convolution (Wang et al., 2022): two with a stride of
    2, and one to the width of the first stage. (B, 3, H, W) -> (B, H / 4, W / 4, D)."""

    def __init__(
        self, img_size: Any, patch_size: int, in_chans: int, embed_dim: int, norm_layer: Any, **_: Any
    ) -> None:
        super().__init__()
        height, width = timm.layers.to_2tuple(img_size)
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        widths = (in_chans, embed_dim // 8, embed_dim // 4)
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [
                nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        return cast("Tensor", self.norm(self.proj(pixels).permute(0, 2, 3, 1)))


#: Classes that a recipe may name in its kwargs.
LAYERS: dict[str, Any] = {
    "ConvStem": ConvStem,
    "SwiGLUPacked": timm.layers.mlp.SwiGLUPacked,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
}


class TimmEncoder(nn.Module):
    """A timm model and the pooling of its tokens.

    `forward` takes normalised pixels (B, 3, H, W) float and returns features (B, variant.dim).
    The trunk's keys are those of the published checkpoints.
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        self.pool, self.normalise = variant.pool, variant.normalise
        self.prefix_tokens = spec.prefix_tokens
        self.trunk = create_trunk(spec.arch, spec.kwargs)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        features = self._pooled(pixels)
        return nn.functional.normalize(features, dim=-1) if self.normalise else features

    def _pooled(self, pixels: Tensor) -> Tensor:
        if self.pool == "none":  # the model's own
            return cast("Tensor", self.trunk(pixels))
        tokens = cast("Tensor", self.trunk.forward_features(pixels))  # type: ignore[operator]
        if self.pool == "token_mean":
            return tokens.mean(dim=1)
        if self.pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.prefix_tokens :].mean(dim=1)
        return patches if self.pool == "patch_mean" else torch.cat([tokens[:, 0], patches], dim=-1)


def create_trunk(arch: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model of timm, made with the kwargs of a recipe."""
    made: nn.Module = timm.create_model(arch, **_resolve(kwargs))
    return made


def _resolve(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Recipe kwargs with layer names replaced by the classes they name."""
    resolved = dict(kwargs)
    for key, value in kwargs.items():
        if not key.endswith("_layer"):
            continue
        if value not in LAYERS:
            raise PresetError(
                f"encoder.kwargs.{key}: unknown layer {value!r}; known: {', '.join(sorted(LAYERS))}"
            )
        resolved[key] = LAYERS[value]
    return resolved


def generic_encoder(recipe: Recipe, variant: Variant, weights: WeightsChoice) -> nn.Module:
    """Any model of timm with its weights: those that timm finds on the hub (None), or a file in timm's
    format. In evaluation mode, on the CPU, in fp32.

    Raises:
        WeightsError: they cannot be had or do not fit; GatedWeightsError: access is missing.
    """
    if weights is None:
        encoder: nn.Module = _from_timm(recipe, variant)
    else:
        made = TimmEncoder(recipe.encoder, variant)  # initialised: files lack some of timm's buffers
        encoder = load_weights(lambda: made, recipe, weights)
    return encoder.eval().requires_grad_(False)


def _from_timm(recipe: Recipe, variant: Variant) -> TimmEncoder:
    from huggingface_hub.errors import GatedRepoError

    kwargs = {**recipe.encoder.kwargs, "pretrained": True}
    try:
        return TimmEncoder(recipe.encoder.model_copy(update={"kwargs": kwargs}), variant)
    except (RuntimeError, OSError, ValueError) as error:
        kind = GatedWeightsError if isinstance(error, GatedRepoError) else WeightsError
        cause = str(error).strip().partition("\n")[0]
        raise kind(
            f"timm could not load the weights of {recipe.name} ({recipe.licence.url}): {cause} "
            '(weights="/path/to/the/file" takes a file, weights="random" tries the pipeline without)'
        ) from error
