"""From decoded compressed tiles straight to tiles of the requested size, on the device.

By one Triton kernel per supertile where Triton works; else the supertile is put together first, and cut by
`cut_tiles_on_device`. Both give OpenCV's pixels, bit by bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.prepare.device_cut import area_taps, cut_tiles_on_device
from slide2vec.prepare.triton_preparer import triton_unavailable
from slide2vec.readers.decoders import NvimgcodecMemory
from slide2vec.readers.jpeg_tiles import DecodedTiles, region_of

__all__ = ["Gather", "choose_gather", "gather_by_kernel", "gather_by_torch"]

logger = logging.getLogger(__name__)

#: Decoded tiles; (n, 2) int64, (x, y) of each tile, px of the level; its side there, px; n targets, (S, S, 3)
#: uint8 each, S at most that side. Nothing is waited for.
Gather: TypeAlias = Callable[[DecodedTiles, NDArray[np.int64], int, Sequence[Any]], None]

#: Bytes of a tile per program: eight per thread.
_BLOCK = 1024


def gather_by_torch(
    decoded: DecodedTiles, corners: NDArray[np.int64], side: int, targets: Sequence[Any]
) -> None:
    """See `Gather`; by PyTorch's operations."""
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    pixels = region_of(decoded, left, top, right - left + side, bottom - top + side)
    cut_tiles_on_device(pixels, corners - (left, top), side, targets)


def gather_by_kernel(
    decoded: DecodedTiles, corners: NDArray[np.int64], side: int, targets: Sequence[Any]
) -> None:
    """See `Gather`; by one launch of a Triton kernel, whose numbers go there in one copy."""
    pixels, slots = decoded.memory.pixels, decoded.slots.size
    device, size = pixels.device, targets[0].shape[0]
    plan = torch.empty(slots + 3 * len(targets), dtype=torch.int64, pin_memory=device.type == "cuda")
    numbers = plan.numpy()
    numbers[:slots] = decoded.slots.ravel()
    places = numbers[slots:].reshape(-1, 3)
    places[:, :2] = corners
    places[:, 2] = _addresses(targets)
    on_device = plan.to(device, non_blocking=True)
    ratio, rest = divmod(side, size)
    first, weights = area_taps(side, size, device) if rest else (on_device, on_device)
    grid = (-(-size * size * 3 // _BLOCK), len(targets))
    gather = import_module("slide2vec.prepare.triton_kernel").gather
    gather[grid](
        pixels,
        on_device,
        first,
        weights,
        slots,
        decoded.slots.shape[1],
        *decoded.box,
        tile_width=pixels.shape[2],
        tile_height=pixels.shape[1],
        size=size,
        taps=weights.shape[1] if rest else ratio,
        whole=not rest,
        block=_BLOCK,
        enable_fp_fusion=False,
    )


def _addresses(targets: Sequence[Any]) -> list[int]:
    if isinstance(targets[0], torch.Tensor):
        return [target.data_ptr() for target in targets]
    return [target.ctypes.data for target in targets]


def choose_gather(device: torch.device) -> Gather:
    """The kernel where it works and gives PyTorch's pixels, else PyTorch."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return gather_by_torch
    wrong = triton_unavailable()
    try:
        wrong = wrong or _difference(device)
    except Exception as error:  # of Triton, which needs a C compiler, too: its work is done without it
        wrong = str(error) or type(error).__name__
    if wrong is None:
        return gather_by_kernel
    logger.warning("tiles are cut on %s without Triton, which costs time: %s", device, wrong)
    return gather_by_torch


def _difference(device: torch.device) -> str | None:
    """What is wrong with the kernel's pixels of a small pattern, None when nothing is."""
    noise = torch.randint(
        0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    slots = np.array([[0, 1], [3, -1]], np.int64)
    decoded = DecodedTiles(NvimgcodecMemory(noise.to(device)), slots, 16, 16, (45, 46))
    corners = np.array([[17, 18], [-3, 25]], np.int64)
    found = [torch.zeros((2, 8, 8, 3), dtype=torch.uint8, device=device) for _ in range(2)]
    for pixels, gather in zip(found, (gather_by_kernel, gather_by_torch), strict=True):
        gather(decoded, corners, 21, list(pixels))
    return None if torch.equal(*found) else "its pixels differ"
