"""Vision transformers with a learnt head over their class token: CLIP towers, KEEP, Mettle."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.timm import create_trunk
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["HeadedEncoder"]


class HeadedEncoder(nn.Module):
    """A transformer of timm, and a head that the class token goes through after the closing norm.

    Besides timm's arguments, the recipe's kwargs hold `head`, its kind ("linear", "mlp", "refine"), and
    `head_dim`, the dimension of what comes out. `forward` takes normalised pixels (B, 3, H, W) float and
    returns features (B, variant.dim); of "cls_patch_mean" only the class token goes through the head.
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        self.pool, self.normalise, self.prefix_tokens = variant.pool, variant.normalise, spec.prefix_tokens
        kwargs = dict(spec.kwargs)
        kind, dim = kwargs.pop("head"), kwargs.pop("head_dim")
        self.vit = create_trunk(spec.arch, kwargs)
        self.head = _HEADS[kind](cast("int", self.vit.embed_dim), dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = cast("Tensor", self.vit.forward_features(pixels))  # type: ignore[operator]
        features = self.head(tokens[:, 0])
        if self.pool == "cls_patch_mean":
            features = torch.cat([features, tokens[:, self.prefix_tokens :].mean(dim=1)], dim=-1)
        return F.normalize(features, dim=-1) if self.normalise else cast("Tensor", features)


def _linear(dim: int, out: int) -> nn.Module:
    """CLIP's projection into the space that is shared with text."""
    return nn.Linear(dim, out, bias=False)


def _mlp(dim: int, out: int) -> nn.Module:
    """KEEP's."""
    return nn.Sequential(nn.Linear(dim, out), nn.GELU(), nn.Linear(out, out))


class _Refine(nn.Module):
    """Mettle's: a shift and a mixture of maps of low rank, both chosen by the token itself. Parameters have
    the names of the published checkpoint; sizes are those of its configuration."""

    ATOMS, RANK, HIDDEN = 16, 8, 256

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        atoms, hidden = self.ATOMS, self.HIDDEN
        self.P = nn.Parameter(torch.randn(atoms, dim, self.RANK) * dim**-0.5)
        self.Q = nn.Parameter(torch.randn(atoms, out, self.RANK) * dim**-0.5)
        self.mix = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, atoms))
        self.shift = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, token: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        into = self.P.permute(1, 0, 2).flatten(1)  # (D, atoms * rank)
        back = self.Q.permute(0, 2, 1).flatten(0, 1)  # (atoms * rank, D)
        share = self.mix(token).repeat_interleave(self.RANK, dim=-1)
        return cast("Tensor", token + (share * (token @ into)) @ back + self.shift(token))


_HEADS = {"linear": _linear, "mlp": _mlp, "refine": _Refine}
