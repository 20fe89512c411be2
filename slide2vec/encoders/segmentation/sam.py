"""SAM 2.1 with Hiera-T for one picture and one box: what AtlasPatch, and slide2vec 7.1.4 after it, find
tissue with. Parameters have the names of its checkpoints; what videos, clicks and masks as prompts need is
left out.

Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024; Kirillov et al., Segment Anything, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.lazy import import_timm

__all__ = ["TissueSam"]

#: Channels of the decoder, and of Hiera-T's maps from the coarsest on.
WIDTH = 256
HIERA_T = (768, 384, 192, 96)
#: Of the decoder.
HEADS, HIDDEN, LAYERS = 8, 2048, 2
#: Mask tokens of the checkpoint; the first one is of a single, unambiguous mask.
MASKS = 4


class TissueSam(nn.Module):
    """Finds what is in a box.

    `forward` takes normalised pixels (B, 3, S, S), S a multiple of 32, and the boxes (B, 4) float, (left,
    top, right, bottom) in px (None: all of the picture), and returns logits (B, S/4 · S/4), above 0 inside.
    """

    no_mem_embed: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.image_encoder = _ImageEncoder()
        self.sam_prompt_encoder = _PromptEncoder()
        self.sam_mask_decoder = _MaskDecoder()
        self.no_mem_embed = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)

    def forward(self, pixels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) and (B, 4) -> (B, S/4 · S/4)."""
        side = pixels.shape[-1]
        if boxes is None:
            boxes = pixels.new_tensor([[0.0, 0.0, side, side]]).expand(len(pixels), -1)
        fine, middle, coarse = self.image_encoder(pixels)
        coarse = coarse + self.no_mem_embed.view(1, WIDTH, 1, 1) + self.sam_prompt_encoder.no_mask
        prompt = self.sam_prompt_encoder(boxes, side)
        places = self.sam_prompt_encoder.pe_layer.grid(coarse.shape[-2], coarse.shape[-1])
        masks = self.sam_mask_decoder(coarse, places, prompt, (fine, middle))
        return cast("Tensor", masks).flatten(1)


class _ImageEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk: nn.Module = import_timm().create_model("sam2_hiera_tiny", pretrained=False, num_classes=0)
        self.trunk.head = nn.Identity()  # its norm is of classifiers
        self.neck = _Neck()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> maps of `WIDTH` channels at 1/4, 1/8 and 1/16."""
        trunk: Any = self.trunk
        return cast("list[Tensor]", self.neck(trunk.forward_intermediates(pixels, intermediates_only=True)))


class _Neck(nn.Module):
    """Brings the maps to one width; the coarsest one is joined with the next, and used for nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential() for _ in HIERA_T)
        for conv, channels in zip(self.convs, HIERA_T, strict=True):
            cast("nn.Sequential", conv).add_module("conv", nn.Conv2d(channels, WIDTH, 1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        coarsest, coarse, *finer = (conv(x) for conv, x in zip(self.convs, reversed(maps), strict=True))
        joined = coarse + F.interpolate(coarsest, scale_factor=2.0, mode="nearest")
        return [*reversed(finer), joined]


class _Places(nn.Module):
    """Places in a picture, from 0 to 1 along both sides, as sines and cosines of random frequencies."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, WIDTH // 2))

    def forward(self, places: Tensor) -> Tensor:
        """(…, 2), x and y -> (…, WIDTH)."""
        angles = 2 * torch.pi * ((2 * places - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, height: int, width: int) -> Tensor:
        """Of the middles of a map's pixels: (1, WIDTH, h, w)."""
        like = self.positional_encoding_gaussian_matrix
        y, x = (
            (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
            for side in (height, width)
        )
        places = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        return cast("Tensor", self(places)).permute(2, 0, 1)[None]


class _PromptEncoder(nn.Module):
    """The two corners of a box, and that there is nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = _Places()
        self.point_embeddings = nn.ModuleDict({"2": nn.Embedding(1, WIDTH), "3": nn.Embedding(1, WIDTH)})
        self.not_a_point_embed = nn.Embedding(1, WIDTH)
        self.no_mask_embed = nn.Embedding(1, WIDTH)

    @property
    def no_mask(self) -> Tensor:
        """Of no mask as a prompt: (1, WIDTH, 1, 1)."""
        return self.no_mask_embed.weight.view(1, WIDTH, 1, 1)

    def forward(self, boxes: Tensor, side: int) -> Tensor:
        """(B, 4) px -> (B, 3, WIDTH)."""
        corners = self.pe_layer((boxes.view(-1, 2, 2) + 0.5) / side)
        kinds = torch.stack([cast("nn.Embedding", self.point_embeddings[name]).weight for name in "23"], 1)
        nothing = self.not_a_point_embed.weight.expand(len(boxes), 1, -1)
        return torch.cat([corners + kinds, nothing], dim=1)


class _MaskDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = _TwoWayTransformer()
        self.obj_score_token, self.iou_token = nn.Embedding(1, WIDTH), nn.Embedding(1, WIDTH)
        self.mask_tokens = nn.Embedding(MASKS, WIDTH)
        half, quarter = WIDTH // 4, WIDTH // 8
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, half, 2, stride=2),
            _ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            nn.GELU(),
        )
        self.conv_s0, self.conv_s1 = nn.Conv2d(WIDTH, quarter, 1), nn.Conv2d(WIDTH, half, 1)
        self.output_hypernetworks_mlps = nn.ModuleDict({"0": _Mlp(WIDTH, WIDTH, quarter, layers=3)})

    def forward(self, image: Tensor, places: Tensor, prompt: Tensor, finer: tuple[Tensor, Tensor]) -> Tensor:
        """Maps at 1/16 with their places, tokens of the prompt, maps at 1/4 and 1/8 -> (B, h/4, w/4)."""
        own = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(prompt), -1, -1), prompt], dim=1)
        tokens, seen = self.transformer(image.flatten(2).mT, places.flatten(2).mT, tokens)
        first, norm, act, second, act_too = self.output_upscaling
        x = seen.mT.unflatten(2, image.shape[-2:])
        x = act(norm(first(x) + self.conv_s1(finer[1])))
        x = act_too(second(x) + self.conv_s0(finer[0]))
        weights = self.output_hypernetworks_mlps["0"](
            tokens[:, 2]
        )  # after the score of objects and of overlap
        return torch.einsum("bc,bchw->bhw", weights, x)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        sides = (dim, *[hidden] * (layers - 1), out)
        self.layers = nn.ModuleList(nn.Linear(*each) for each in pairwise(sides))

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.layers
        for layer in first:
            x = F.relu(layer(x))
        return cast("Tensor", last(x))


class _Attention(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, WIDTH)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, WIDTH), (B, M, WIDTH) twice -> (B, N, WIDTH)."""
        heads = [
            proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        seen = F.scaled_dot_product_attention(*heads)
        return cast("Tensor", self.out_proj(seen.transpose(1, 2).flatten(2)))


class _TwoWayBlock(nn.Module):
    """Tokens look at each other, then at the picture, and the picture at them."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = _Attention(WIDTH)
        self.cross_attn_token_to_image = _Attention(WIDTH // 2)
        self.cross_attn_image_to_token = _Attention(WIDTH // 2)
        self.mlp = _Mlp(WIDTH, HIDDEN, WIDTH, layers=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, kinds: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:  # the tokens are their kinds still
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            known = tokens + kinds
            tokens = tokens + self.self_attn(known, known, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + kinds, image + places, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + places, tokens + kinds, tokens)
        return tokens, self.norm4(image)


class _TwoWayTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(first=number == 0) for number in range(LAYERS))
        self.final_attn_token_to_image = _Attention(WIDTH // 2)
        self.norm_final_attn = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor, places: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h · w, WIDTH), its places, tokens (B, N, WIDTH) -> tokens and picture."""
        tokens = kinds
        for layer in self.layers:
            tokens, image = layer(tokens, image, kinds, places)
        seen = self.final_attn_token_to_image(tokens + kinds, image + places, image)
        return self.norm_final_attn(tokens + seen), image
