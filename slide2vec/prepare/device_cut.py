"""From a supertile's pixels to tiles of the requested size, on the device: the twin of `cut_tiles`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["area_weights", "cut_tiles_on_device", "reduce_whole"]

#: Float pixels of the tiles that are reduced at once where the ratio is fractional.
_AT_ONCE = 1 << 24


def cut_tiles_on_device(
    pixels: Tensor, offsets: NDArray[Any], read_tile_size_px: int, targets: Sequence[Any]
) -> None:
    """Cut tiles out of a supertile and copy each, area-averaged, into its target; nothing is waited for.

    Args:
        pixels: (h, w, 3) uint8, the supertile.
        offsets: (n, 2) int64, (x, y) of each tile in it, px.
        read_tile_size_px: side of the tiles in it.
        targets: n (S, S, 3) uint8 tensors (or arrays), S the requested size.

    Equal to OpenCV's INTER_AREA where the ratio of the sizes is whole, within one grey level elsewhere.
    """
    size = targets[0].shape[0]
    ratio, rest = divmod(read_tile_size_px, size)
    if rest or not ratio:
        _cut_fractional(pixels, offsets, read_tile_size_px, targets)
    elif (offsets % ratio).any():
        for (x, y), target in zip(offsets.tolist(), targets, strict=True):
            tile = pixels[y : y + read_tile_size_px, x : x + read_tile_size_px]
            torch.as_tensor(target).copy_(reduce_whole(tile, ratio), non_blocking=True)
    else:
        reduced = reduce_whole(pixels, ratio)
        for (x, y), target in zip((offsets // ratio).tolist(), targets, strict=True):
            torch.as_tensor(target).copy_(reduced[y : y + size, x : x + size], non_blocking=True)


def reduce_whole(pixels: Tensor, ratio: int) -> Tensor:
    """(h, w, 3) uint8 averaged over ratio x ratio cells.

    Halves are rounded as OpenCV does: up where the ratio is 2, else to even.
    """
    if ratio == 1:
        return pixels
    height, width = pixels.shape[0] // ratio, pixels.shape[1] // ratio
    whole = pixels[: height * ratio, : width * ratio]
    total = torch.zeros((height, width, 3), dtype=torch.int32, device=pixels.device)
    for row in range(ratio):
        for column in range(ratio):
            total += whole[row::ratio, column::ratio]
    if ratio == 2:
        return ((total + 2) >> 2).to(torch.uint8)
    return (total.float() * (1 / ratio**2)).round_().to(torch.uint8)


def _cut_fractional(pixels: Tensor, offsets: NDArray[Any], side: int, targets: Sequence[Any]) -> None:
    size = targets[0].shape[0]
    weights = area_weights(side, size, pixels.device)
    per_step = max(1, _AT_ONCE // (side * side * 3))
    for start in range(0, len(targets), per_step):
        places = offsets[start : start + per_step].tolist()
        tiles = torch.stack([pixels[y : y + side, x : x + side] for x, y in places]).float()
        rows = torch.einsum("sr,nrwc->nswc", weights, tiles)
        reduced = torch.einsum("tw,nswc->nstc", weights, rows).round_().clamp_(0, 255).to(torch.uint8)
        for tile, target in zip(reduced, targets[start : start + per_step], strict=True):
            torch.as_tensor(target).copy_(tile, non_blocking=True)


@lru_cache(maxsize=8)
def area_weights(read: int, size: int, device: torch.device) -> Tensor:
    """(size, read) float32: the share of each read pixel in each pixel of the requested size.

    Pixel i covers the interval [i, i + 1) * read / size; its value is the average over that interval.
    """
    edges = torch.arange(size + 1, dtype=torch.float64) * (read / size)
    pixel = torch.arange(read, dtype=torch.float64)
    begin = torch.maximum(edges[:-1, None], pixel)
    end = torch.minimum(edges[1:, None], pixel + 1)
    return ((end - begin).clamp_(min=0) * (size / read)).float().to(device)
