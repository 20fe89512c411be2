"""From a supertile's pixels to tiles of the requested size, on the device: the twin of `cut_tiles`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, floor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["area_taps", "cut_tiles_on_device", "reduce_whole"]

#: Float pixels of the tiles that are reduced at once where the ratio is fractional.
_AT_ONCE = 1 << 24
#: Shares of a pixel that OpenCV leaves out (computeResizeAreaTab of modules/imgproc/src/resize.cpp).
_LEAST_SHARE = 1e-3


def cut_tiles_on_device(
    pixels: Tensor, offsets: NDArray[Any], read_tile_size_px: int, targets: Sequence[Any]
) -> None:
    """Cut tiles out of a supertile and copy each, area-averaged, into its target; nothing is waited for.

    Args:
        pixels: (h, w, 3) uint8, the supertile.
        offsets: (n, 2) int64, (x, y) of each tile in it, px.
        read_tile_size_px: side of the tiles in it.
        targets: n (S, S, 3) uint8 tensors (or arrays), S the requested size, at most that side.

    Equal to OpenCV's INTER_AREA bit by bit.
    """
    size = targets[0].shape[0]
    ratio, rest = divmod(read_tile_size_px, size)
    if rest:
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
    per_step = max(1, _AT_ONCE // (side * side * 3))
    for start in range(0, len(targets), per_step):
        places = offsets[start : start + per_step].tolist()
        tiles = torch.stack([pixels[y : y + side, x : x + side] for x, y in places]).float()
        reduced = _reduce_axis(_reduce_axis(tiles, size, 2), size, 1)
        rounded = reduced.round_().clamp_(0, 255).to(torch.uint8)
        for tile, target in zip(rounded, targets[start : start + per_step], strict=True):
            torch.as_tensor(target).copy_(tile, non_blocking=True)


def _reduce_axis(tiles: Tensor, size: int, axis: int) -> Tensor:
    """Products and sums one by one, in OpenCV's order: a matrix product would round otherwise."""
    side = tiles.shape[axis]
    first, weights = area_taps(side, size, tiles.device)
    total: Tensor | None = None
    for tap, weight in enumerate(weights.unbind(1)):
        part = tiles.index_select(axis, (first + tap).clamp(max=side - 1)).mul_(
            weight.view([-1 if number == axis else 1 for number in range(tiles.dim())])
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@lru_cache(maxsize=8)
def area_taps(read: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which pixels each pixel of the requested size is the average of, and their shares in it, as OpenCV's
    INTER_AREA has them: pixel i covers the interval [i, i + 1) * read / size.

    Returns:
        (size,) int32, the first of them, and (size, taps) float32, their shares; 0 beyond the last.
    """
    scale = read / size
    taps = [_taps(index * scale, scale, read) for index in range(size)]
    most = max(len(shares) for _, shares in taps)
    weights = [shares + [0.0] * (most - len(shares)) for _, shares in taps]
    firsts = torch.tensor([first for first, _ in taps], dtype=torch.int32)
    return firsts.to(device), torch.tensor(weights, dtype=torch.float32).to(device)


def _taps(begin: float, scale: float, read: int) -> tuple[int, list[float]]:
    end, cell = begin + scale, min(scale, read - begin)
    last = min(floor(end), read - 1)
    whole = min(ceil(begin), last)
    shares = [1 / cell] * (last - whole)
    if end - last > _LEAST_SHARE:
        shares.append(min(end - last, 1.0, cell) / cell)
    if whole - begin > _LEAST_SHARE:
        return whole - 1, [(whole - begin) / cell, *shares]
    return whole, shares
