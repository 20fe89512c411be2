"""GenBio-PathFM: a DINOv3-like transformer that sees red, green and blue as three grey images.

timm has this architecture, but rotates queries and keys in fp32; this model was trained and is
published with the rotation in bf16, also when all the rest is fp32. That is why it is written out
here. Names of parameters are those of the published checkpoint.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["ChannelwiseEncoder"]

EPS = 1e-6
ROPE_BASE = 100.0
#: What the rotation is computed in.
ROPE_DTYPE = torch.bfloat16


class ChannelwiseEncoder(nn.Module):
    """Class tokens of the three channels, concatenated.

    The recipe's kwargs: `img_size`, `patch_size`, `dim`, `depth`, `heads`, `hidden` (of the gated
    MLP), `storage_tokens`. `forward` takes normalised pixels (B, 3, H, W) float and returns features
    (B, 3 * dim). Three times as many images as tiles go through the blocks.
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        sizes = spec.kwargs
        dim, patch = sizes["dim"], sizes["patch_size"]
        self.patch = patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.storage_tokens = nn.Parameter(torch.randn(1, sizes["storage_tokens"], dim) * 0.02)
        self.rope_embed = Rotation(dim // sizes["heads"])
        self.blocks = nn.ModuleList(
            Block(dim, sizes["heads"], sizes["hidden"]) for _ in range(sizes["depth"])
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers, before the patches."""
        return 1 + self.storage_tokens.shape[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        classes = self.norm(self.tokens(pixels)[:, 0])
        return cast("Tensor", classes.reshape(pixels.shape[0], -1))

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (3B, T, dim), of red, green and blue in turn; before the closing norm."""
        channels = pixels.flatten(0, 1)[:, None]  # (3B, 1, H, W)
        patches = self.patch_embed["proj"](channels).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.cls_token, self.storage_tokens], dim=1)
        tokens = torch.cat([prefix.expand(channels.shape[0], -1, -1), patches], dim=1)
        sine, cosine = self.rope_embed(pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        for block in self.blocks:
            tokens = block(tokens, sine, cosine)
        return tokens


class Rotation(nn.Module):
    """Sine and cosine of the angles by which a patch's queries and keys are turned.

    A quarter of a head's dimension is turned by the row, a quarter by the column, at `periods` that
    grow from 1 to nearly ROPE_BASE; coordinates are patch centres in [-1, 1].
    """

    periods: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        steps = torch.arange(head_dim // 4, dtype=ROPE_DTYPE)
        self.register_buffer("periods", (ROPE_BASE ** (2 * steps / (head_dim // 2))).float())

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Two of (height * width, head_dim), patches row by row."""
        periods = rounded(self.periods)
        centres = (rounded(torch.arange(0.5, side, device=periods.device) / side) for side in (height, width))
        rows, columns = torch.meshgrid(*centres, indexing="ij")
        coordinates = rounded(2.0 * torch.stack([rows, columns], dim=-1).flatten(0, 1) - 1.0)
        angles = rounded(rounded(2 * math.pi * coordinates[:, :, None]) / periods)
        angles = angles.flatten(1).repeat(1, 2)
        return rounded(angles.sin()), rounded(angles.cos())


class Block(nn.Module):
    """Attention, then a gated MLP; each after a norm, scaled per dimension and added."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = Scale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = GatedMlp(dim, hidden)
        self.ls2 = Scale(dim)

    def forward(self, tokens: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), sine, cosine))
        return cast("Tensor", tokens + self.ls2(self.mlp(self.norm2(tokens))))


class Attention(nn.Module):
    """Self-attention whose queries and keys of patches are rotated by their place."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        images, count, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(images, count, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotated(query, sine, cosine), rotated(key, sine, cosine)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return cast("Tensor", self.proj(mixed.transpose(1, 2).flatten(2)))


def rotated(values: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """(N, heads, T, d) -> the same, with all but the prefix tokens turned, in ROPE_DTYPE.

    The prefix passes through that precision as well, as in the published model. It is computed in
    fp32 and rounded after every step, which gives the same bits: few runtimes compute in bf16.
    """
    turned = rounded(values)
    start = turned.shape[2] - sine.shape[0]
    prefix, patches = turned[:, :, :start], turned[:, :, start:]
    first, second = patches.chunk(2, dim=-1)
    crossed = torch.cat([-second, first], dim=-1)
    patches = rounded(rounded(patches * cosine) + rounded(crossed * sine))
    return torch.cat([prefix, patches], dim=2).to(values.dtype)


def rounded(values: Tensor) -> Tensor:
    """Float32 values that ROPE_DTYPE has."""
    return values.to(ROPE_DTYPE).float()


class GatedMlp(nn.Module):
    """SwiGLU with its two projections apart."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        return cast("Tensor", self.w3(F.silu(self.w1(tokens)) * self.w2(tokens)))


class Scale(nn.Module):
    """A learnt factor per dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma
