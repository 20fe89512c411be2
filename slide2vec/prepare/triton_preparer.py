"""The encoder's transform as one Triton kernel, where it needs no resize: crop, normalise, layout."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.recipes import Transform
from slide2vec.runtime.base import Layout
from slide2vec.runtime.device import use_device

__all__ = ["TritonPreparer", "triton_unavailable"]

#: Pixels per program.
_BLOCK = 1024


def triton_unavailable() -> str | None:
    """Why Triton cannot be used here, None when it can."""
    return None if find_spec("triton") else "Triton is not installed: it comes with PyTorch for CUDA (Linux)"


class TritonPreparer:
    """See `slide2vec.prepare.choose.Preparer`. Reads every tile once and writes every pixel once.

    Raises:
        ExtraMissingError: Triton is not installed.
        ConfigError: the device is no NVIDIA GPU, and Triton's interpreter is not asked for.
    """

    def __init__(self, transform: Transform, device: torch.device, layout: Layout = "float32_nchw") -> None:
        if reason := triton_unavailable():
            raise ExtraMissingError(reason)
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(f'preparer="triton" needs an NVIDIA GPU, and the model is on {device}')
        self.transform, self.device, self.layout = transform, device, layout
        self._scale = [1 / (255 * std) for std in transform.std]
        self._shift = [-mean / std for mean, std in zip(transform.mean, transform.std, strict=True)]
        self._kernel = import_module("slide2vec.prepare.triton_kernel").normalise

    def prepare(self, tiles: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, crop, crop) float32, or (B, crop, crop, 3) uint8, on the device.

        Raises:
            ConfigError: the tiles would have to be resized.
        """
        count, side = tiles.shape[:2]
        crop = self.transform.crop
        if side != self.transform.resize:
            raise ConfigError(
                f'preparer="triton" does not resize, and tiles of {side} px are to be brought to '
                f'{self.transform.resize} px; use preparer="auto", or requested_tile_size_px='
                f"{self.transform.resize}"
            )
        tiles = tiles.to(self.device, non_blocking=True).contiguous()
        packed = self.layout == "uint8_nhwc"
        shape = (count, crop, crop, 3) if packed else (count, 3, crop, crop)
        dtype = torch.uint8 if packed else torch.float32
        out = torch.empty(shape, dtype=dtype, device=self.device)
        grid = (-(-crop * crop // _BLOCK), count, 3)
        corner = round((side - crop) / 2)
        with use_device(self.device):
            self._kernel[grid](tiles, out, side, crop, corner, *self._scale, *self._shift, packed, _BLOCK)
        return out
