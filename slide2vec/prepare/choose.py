"""What a preparer is (tiles to the encoder's input), and which one a model's tiles go through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from slide2vec.choices import PREPARERS
from slide2vec.errors import ConfigError, nearest_names
from slide2vec.prepare.pixel_difference import PixelLimits
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import Transform
from slide2vec.runtime.base import Layout

__all__ = ["Preparer", "choose_preparer"]

logger = logging.getLogger(__name__)


class Preparer(Protocol):
    """Turns a batch of tiles into the encoder's input."""

    def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 tiles, wherever they are -> pixels in the engine's layout, on its device."""
        ...


#: What "auto" tries on a GPU before PyTorch: what moves the fewest bytes first (Triton's kernel, which does
#: not resize, reads and writes every pixel once), until benchmarks/gpu.py has timed them there. On the CPU it
#: takes PyTorch, which does in a second of CPU time twice as many tiles as DALI without a resize, and 5.4
#: times as many with one (benchmarks.cpu).
_AUTO_ON_GPU = ("triton", "dali")
#: Of a tile to PyTorch's pixels. Measured, mean and 99th percentile of the worst tile, 192 to 512 px brought
#: to 224: DALI 0.29 and 2 (noise, smooth patterns, tissue); Triton 0 and 0; without antialiasing 0.65 and 2
#: at least on smooth patterns, 4 to 42 and 14 to 116 on noise.
PREPARED = PixelLimits(mean=0.33, percentile_99=2.0)


def choose_preparer(
    name: str, transform: Transform, device: torch.device, layout: Layout, tile_size_px: int
) -> Preparer:
    """The preparer asked for; "auto": the fastest that is there and gives PyTorch's pixels.

    Raises:
        ConfigError: there is no such preparer, or it cannot do this transform.
        ExtraMissingError: it is not installed.
    """
    if name == "auto":
        names = _AUTO_ON_GPU if device.type == "cuda" else ()
        return _first(names, transform, device, layout, tile_size_px)
    if name not in PREPARERS:
        raise ConfigError(f"unknown preparer {name!r}. {nearest_names(name, ('auto', *PREPARERS))}")
    preparer = _made(name, transform, device, layout)
    with torch.inference_mode():  # says now what it cannot do
        preparer.prepare(torch.zeros((1, tile_size_px, tile_size_px, 3), dtype=torch.uint8))
    return preparer


def _made(name: str, transform: Transform, device: torch.device, layout: Layout) -> Preparer:
    return cast(Preparer, PREPARERS[name].imported()(transform, device, layout))


def _first(
    names: Sequence[str], transform: Transform, device: torch.device, layout: Layout, tile_size_px: int
) -> Preparer:
    """The first of them that gives PyTorch's pixels, else PyTorch."""
    expected, reasons = TorchPreparer(transform, device, layout), list[str]()
    for name in names:
        try:
            found = _made(name, transform, device, layout)
            wrong = _difference(found, expected, tile_size_px)
        except Exception as error:  # of libraries and compilers, whatever it is
            wrong = str(error) or type(error).__name__
        if wrong is None:
            return found
        reasons.append(f"{name}: {wrong}")
    if reasons:
        logger.warning("tiles are prepared by PyTorch on %s (%s)", device, "; ".join(reasons))
    return expected


def _difference(found: Preparer, expected: Preparer, side: int) -> str | None:
    """How far a preparer's pixels are from PyTorch's, None where they are near enough."""
    tiles = _tiles(side)
    with torch.inference_mode():
        pixels, reference = found.prepare(tiles), expected.prepare(tiles)
    if pixels.shape != reference.shape or pixels.dtype != reference.dtype:
        return f"it gives {tuple(pixels.shape)}, {pixels.dtype}"
    # A grey level of normalised pixels is about 1 / (255 * 0.25).
    levels = 1 if pixels.dtype == torch.uint8 else 64
    return PREPARED.exceeded(*((levels * each.cpu().float()).numpy() for each in (pixels, reference)))


def _tiles(side: int) -> torch.Tensor:
    """(4, side, side, 3) uint8: smooth waves, coarse and fine blobs, noise."""
    place = torch.arange(side)
    waves = torch.stack(
        [place[:, None] + place, 2 * place[:, None] + 0 * place, 0 * place[:, None] + 3 * place], -1
    )
    tiles = [128 + 127 * torch.sin(waves / 9)]
    numbers = torch.Generator().manual_seed(0)
    for size in (16, 4, 1):
        few = 255 * torch.rand((1, 3, -(-side // size), -(-side // size)), generator=numbers)
        blobs = torch.nn.functional.interpolate(few, scale_factor=size, mode="bicubic")
        tiles.append(blobs[0, :, :side, :side].permute(1, 2, 0))
    return torch.stack(tiles).clamp(0, 255).to(torch.uint8)
