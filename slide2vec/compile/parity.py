"""How close an engine is to its encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from slide2vec.runtime.base import BatchProfile, Engine, Layout
from slide2vec.runtime.torch_engine import TorchEngine

__all__ = ["MeanStd", "Parity", "batch_sizes", "compare", "for_layout", "reference_features"]

#: Of each colour, in [0, 1]: what is subtracted, and divided by.
MeanStd: TypeAlias = "tuple[Sequence[float], Sequence[float]]"
#: Tiles per forward pass of the reference.
REFERENCE_BATCH = 8


@dataclass(frozen=True)
class Parity:
    """An engine's features against those of the encoder in fp32, in PyTorch.

    Attributes:
        min_cosine, mean_cosine: over all tiles at all batch sizes.
        finite: whether every value was, at every batch size.
        least: cosine that it must not be below.
        tiles: different ones that were compared.
        batch_sizes: that were run.
    """

    min_cosine: float
    mean_cosine: float
    finite: bool
    least: float
    tiles: int
    batch_sizes: tuple[int, ...]

    def problem(self) -> str | None:
        """Why it is not close enough, None when it is."""
        if not self.finite:
            return "some of its features are not finite"
        if self.min_cosine < self.least:
            return f"its least cosine to the encoder in fp32 is {self.min_cosine:.6f}, below {self.least:g}"
        return None


def batch_sizes(profile: BatchProfile) -> tuple[int, ...]:
    """Those that are tried: the profile's own and the powers of two between."""
    powers = (1 << exponent for exponent in range(profile.max.bit_length()))
    between = {size for size in powers if profile.min <= size <= profile.max}
    return tuple(sorted({profile.min, profile.opt, profile.max} | between))


def for_layout(pixels: Tensor, mean_std: MeanStd, layout: Layout) -> Tensor:
    """(B, H, W, 3) uint8 -> pixels of a layout."""
    if layout == "uint8_nhwc":
        return pixels
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in mean_std)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def reference_features(
    encoder: nn.Module, mean_std: MeanStd, pixels: Tensor, device: torch.device, feature_dim: int
) -> Tensor:
    """(N, D) float32 on the CPU: the encoder in fp32, in PyTorch, without TF32.

    Args:
        pixels: (N, H, W, 3) uint8.
    """
    engine = TorchEngine(encoder, feature_dim=feature_dim, precision="fp32", device=device)
    with _exact():
        parts = [
            engine.run(for_layout(part.to(device), mean_std, engine.layout)).cpu()
            for part in torch.split(pixels, REFERENCE_BATCH)
        ]
    return torch.cat(parts)


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions without TF32, which cuDNN uses by default; matrix products are without."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compare(
    engine: Engine,
    mean_std: MeanStd,
    pixels: Tensor,
    reference: Tensor,
    sizes: tuple[int, ...],
    least: float,
) -> Parity:
    """Run an engine at every batch size, and on every tile at least once.

    Args:
        pixels: (N, H, W, 3) uint8; repeated for batches larger than N.
        reference: (N, D) float32, see `reference_features`.
    """
    cosines, finite = [], True
    for tiles in _batches(len(pixels), sizes):
        batch = for_layout(pixels[tiles].to(engine.device), mean_std, engine.layout)
        features = engine.run(batch).float().cpu()
        finite = finite and bool(features.isfinite().all())
        cosines.append(nn.functional.cosine_similarity(features, reference[tiles], dim=-1))
    every = torch.cat(cosines).nan_to_num(-1.0)
    return Parity(every.min().item(), every.mean().item(), finite, least, len(pixels), sizes)


def _batches(count: int, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Indices of the tiles of each batch: every size once, then what is left in the largest."""
    start = 0
    for size in sizes:
        yield torch.arange(start, start + size) % count
        start += size
    while start < count:
        yield torch.arange(start, min(start + sizes[-1], count))
        start += sizes[-1]
