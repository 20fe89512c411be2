"""A CLIP vision tower and a linear layer over its tokens (iSight)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from slide2vec.lazy import import_timm
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["ClipLinearEncoder"]

timm = import_timm()


class ClipLinearEncoder(nn.Module):
    """Tokens of CLIP's last block, without its closing norm, through a linear layer.

    The closing norm (transformers: `post_layernorm`) was not trained with this model, whose features
    are `hidden_states[-1]`: it is left out of the trunk. `forward` takes normalised pixels
    (B, 3, H, W) float and returns features (B, variant.dim): the mean over all tokens, the class
    token among them, or the class token alone.
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        self.pool = variant.pool
        self.vit: nn.Module = timm.create_model(spec.arch, pretrained=False, final_norm=False, **spec.kwargs)
        self.projection = nn.Linear(cast("int", self.vit.embed_dim), variant.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = self.projection(self.vit.forward_features(pixels))  # type: ignore[operator]
        return cast("Tensor", tokens[:, 0] if self.pool == "cls" else tokens.mean(dim=1))
