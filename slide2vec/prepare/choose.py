"""What a preparer is (tiles to the encoder's input), and which one a model's tiles go through."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from slide2vec.errors import ConfigError, ExtraMissingError, Slide2VecError, nearest_names
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import Transform
from slide2vec.runtime.base import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["PREPARERS", "Preparer", "choose_preparer"]

logger = logging.getLogger(__name__)


class Preparer(Protocol):
    """Turns a batch of tiles into the encoder's input."""

    def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 tiles, wherever they are -> pixels in the engine's layout, on its device."""
        ...


#: name -> (its module, its class).
PREPARERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "torch": ("slide2vec.prepare.torch_preparer", "TorchPreparer"),
        "dali": ("slide2vec.prepare.dali_preparer", "DaliPreparer"),
        "triton": ("slide2vec.prepare.triton_preparer", "TritonPreparer"),
    }
)
#: What "auto" tries on a GPU before PyTorch. On the CPU it takes PyTorch, which does in a second of CPU
#: time twice as many tiles as DALI without a resize, and 5.4 times as many with one (benchmarks.cpu).
_AUTO_ON_GPU = ("dali",)
#: Largest mean difference to PyTorch's pixels in grey levels: libraries round differently, by one level in
#: at most every third pixel.
MAX_MEAN_DIFFERENCE = 0.33


def choose_preparer(
    name: str, transform: Transform, device: torch.device, layout: Layout, tile_size_px: int
) -> Preparer:
    """The preparer asked for; "auto": the fastest that is there and gives PyTorch's pixels.

    Raises:
        ConfigError: there is no such preparer, or it cannot do this transform.
        ExtraMissingError: it is not installed.
    """
    if name == "auto":
        return _first(transform, device, layout, tile_size_px)
    if name not in PREPARERS:
        raise ConfigError(f"unknown preparer {name!r}. {nearest_names(name, ('auto', *PREPARERS))}")
    preparer = _made(name, transform, device, layout)
    with torch.inference_mode():  # says now what it cannot do
        preparer.prepare(torch.zeros((1, tile_size_px, tile_size_px, 3), dtype=torch.uint8))
    return preparer


def _made(name: str, transform: Transform, device: torch.device, layout: Layout) -> Preparer:
    module, kind = PREPARERS[name]
    return cast(Preparer, getattr(import_module(module), kind)(transform, device, layout))


def _first(transform: Transform, device: torch.device, layout: Layout, tile_size_px: int) -> Preparer:
    expected = TorchPreparer(transform, device, layout)
    for name in _AUTO_ON_GPU if device.type == "cuda" else ():
        try:
            found = _made(name, transform, device, layout)
            wrong = _difference(found, expected, tile_size_px)
        except (Slide2VecError, ExtraMissingError, RuntimeError) as error:  # RuntimeError: of the library
            wrong = str(error)
        if wrong is None:
            return found
        logger.info("tiles are prepared without %s: %s", name, wrong)
    return expected


def _difference(found: Preparer, expected: Preparer, side: int) -> str | None:
    """How far a preparer is from PyTorch's on a smooth pattern, None where it is near enough."""
    place = torch.arange(side)
    pattern = torch.stack(
        [place[:, None] + place, 2 * place[:, None] + 0 * place, 0 * place[:, None] + 3 * place], -1
    )
    tiles = (128 + 127 * torch.sin(pattern[None] / 9)).to(torch.uint8)
    pixels, reference = found.prepare(tiles), expected.prepare(tiles)
    # A grey level of normalised pixels is about 1 / (255 * 0.25).
    levels = 1 if pixels.dtype == torch.uint8 else 64
    mean = levels * float((pixels.float() - reference.float()).abs().mean())
    return None if mean <= MAX_MEAN_DIFFERENCE else f"its pixels differ by {mean:.1f} grey levels"
