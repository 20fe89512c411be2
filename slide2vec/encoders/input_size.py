"""Inputs of other sizes than an encoder was trained on: whether it takes them, as slide2vec 7.1.4 does.

Position embeddings are resampled for another grid of patches in the way of the code that the model was
published with (`Recipe.positions`); a network of convolutions takes what it can compute.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from slide2vec.encoders.checkpoint_keys import PUBLISHED
from slide2vec.encoders.registered import BroughtTiles
from slide2vec.errors import ConfigError
from slide2vec.recipes import Recipe

__all__ = ["for_input", "positions_for"]

#: Added to the side of the grid by Dinov2Model of transformers 4.35 to 4.44, and by code copied from it.
_SHIFT = 0.1


def for_input(recipe: Recipe, encoder: nn.Module, size_px: int, asked: str) -> Recipe:
    """The recipe of an encoder whose inputs have another size, which it is then ready for.

    The encoder's weights stay as they are, and so do its features of inputs of the usual size.

    Args:
        size_px: side of the input.
        asked: what asks for that size, for the message.

    Raises:
        ConfigError: the backbone does not take it, and why.
    """
    usual = recipe.transform.crop
    if size_px != usual and (problem := _problem(recipe, encoder, size_px)):
        raise ConfigError(
            f"{asked}: preset {recipe.name} takes no inputs of {size_px} px: {problem}. Read tiles of "
            f"{recipe.tile_size_px} px, or give "
            f"input_size_px={usual} to have other tiles resized to {usual} px"
        )
    transform = recipe.transform.model_copy(update={"resize": size_px, "crop": size_px})
    gflops = recipe.gflops * (size_px / usual) ** 2
    return recipe.model_copy(update={"transform": transform, "gflops": gflops})


def _problem(recipe: Recipe, encoder: nn.Module, size_px: int) -> str | None:
    """Why the encoder does not take inputs of a size; None where it does, and is ready for them."""
    if recipe.positions == "fixed":
        what = "it is" if recipe.encoder.family == "registered" else "its position embeddings are"
        return f"{what} for {recipe.transform.crop} px only"
    if isinstance(encoder, BroughtTiles):
        encoder.ready_for_other_sizes(recipe.name)
    trunk: Any = getattr(encoder, "trunk", None) or getattr(encoder, "vit", None) or encoder
    patch = _patch(trunk, recipe)
    if patch is not None and (size_px < patch or size_px % patch):
        nearest = max(1, round(size_px / patch)) * patch
        return f"its patches have {patch} px a side, and its inputs a multiple of that, such as {nearest} px"
    if hasattr(trunk, "dynamic_img_size") and getattr(trunk, "pos_embed", None) is not None:
        _resample_positions(trunk, recipe.positions)
        if patch is not None:
            return None
    return _fails(encoder, size_px)


def _patch(trunk: Any, recipe: Recipe) -> int | None:
    """Side of the patches in px; None for networks without."""
    side = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    side = recipe.encoder.kwargs.get("patch_size") if side is None else side
    return side[0] if isinstance(side, tuple) else side


def _fails(encoder: nn.Module, size_px: int) -> str | None:
    """Why it cannot compute features of an input of a size."""
    parameter = next(iter((*encoder.parameters(), *encoder.buffers())), torch.empty(0))
    pixels = torch.zeros(1, 3, size_px, size_px, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.inference_mode():
            encoder(pixels)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def _resample_positions(trunk: Any, how: str) -> None:
    """Have a vision transformer of timm resample its position embeddings to the grid of each input."""
    if not trunk.dynamic_img_size:  # what timm does when it is built with dynamic_img_size=True
        from timm.layers.format import Format

        trunk.dynamic_img_size = True
        embed = trunk.patch_embed
        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
    if how != "antialiased":
        trunk.position_resampling = how
        trunk._pos_embed = MethodType(_with_positions, trunk)


def positions_for(trunk: Any, grid: tuple[int, int]) -> Tensor | None:
    """Position embeddings (1, tokens, D) of a vision transformer for a grid of patches; None where timm's own
    way of resampling them is the right one.

    They are resampled from those of the checkpoint, wherever these were resampled when it was loaded: twice
    would give other values.
    """
    how = getattr(trunk, "position_resampling", None)
    if how is None:
        return None
    table, had = cast("Tensor", trunk.pos_embed), tuple(trunk.patch_embed.grid_size)
    if grid == had:
        return table
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    published = getattr(trunk, PUBLISHED, None)
    if published is not None:
        table, had = published, (math.isqrt(published.shape[1] - prefix),) * 2
    if grid == had:
        return table
    patches = table[:, prefix:].float().reshape(1, *had, -1).permute(0, 3, 1, 2)
    shifted = tuple((side + _SHIFT) / before for side, before in zip(grid, had, strict=True))
    resampling: dict[str, Any] = {"size": grid} if how == "plain" else {"scale_factor": shifted}
    patches = functional.interpolate(patches, mode="bicubic", align_corners=False, **resampling)
    resampled = patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], resampled], dim=1)


def _with_positions(trunk: Any, patches: Tensor) -> Tensor:
    """Tokens with their positions, in the order of timm's `VisionTransformer._pos_embed`.
    (B, h, w, D) -> (B, tokens, D)."""
    positions = cast("Tensor", positions_for(trunk, (patches.shape[1], patches.shape[2])))
    batch, tokens = patches.shape[0], patches.flatten(1, 2)
    before = [
        token.expand(batch, -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None
    ]
    if trunk.no_embed_class:
        return cast("Tensor", trunk.pos_drop(torch.cat([*before, tokens + positions], dim=1)))
    return cast("Tensor", trunk.pos_drop(torch.cat([*before, tokens], dim=1) + positions))
