"""How close an engine is to its encoder: when it is built, and when it is verified later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from slide2vec.compile.store import StoredEngine
from slide2vec.errors import EngineError
from slide2vec.files import READING_ARRAYS
from slide2vec.runtime.base import BatchProfile, Engine, Layout
from slide2vec.runtime.loading import load_engine
from slide2vec.runtime.torch_engine import TorchEngine

__all__ = [
    "MeanStd",
    "Parity",
    "Reference",
    "batch_sizes",
    "check_files",
    "compare",
    "for_layout",
    "parity_of",
    "reference_features",
    "verify_engine",
    "write_reference",
]

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
    engine = TorchEngine(encoder, feature_dim=feature_dim, precision="fp32", device=device, cuda_graphs=False)
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


REFERENCE_NAME = "reference.npz"


def write_reference(folder: Path, pixels: Tensor, features: Tensor, min_cosine: float) -> None:
    """Keep tiles and their features beside an engine, and how close it has to be to them.

    Args:
        pixels: (N, H, W, 3) uint8, of a generated slide: nobody's tissue is kept.
        features: (N, D) float32, of the encoder in fp32.
        min_cosine: cosine that the engine must not be below.
    """
    path = folder / REFERENCE_NAME
    np.savez_compressed(path, pixels=pixels.numpy(), features=features.numpy(), least=min_cosine)


@dataclass(frozen=True)
class Reference:
    """What `write_reference` kept."""

    pixels: Tensor
    features: Tensor
    least: float

    @classmethod
    def of(cls, engine: StoredEngine) -> Reference:
        """That of an engine."""
        with READING_ARRAYS, np.load(engine.directory / REFERENCE_NAME) as kept:
            pixels, features = (torch.from_numpy(kept[name]) for name in ("pixels", "features"))
            min_cosine = engine.record.parity["least"] if engine.record.parity else float(kept["least"])
        return cls(pixels, features, min_cosine)


def check_files(engine: StoredEngine) -> None:
    """Raises EngineError where an engine's files are not as they were published."""
    if damage := engine.damage():
        raise EngineError(f"engine {engine.name}: {damage}; build it again")


def parity_of(engine: StoredEngine, loaded: Engine) -> Parity:
    """Compare a loaded engine with what its encoder gave when it was built."""
    record, known = engine.record, Reference.of(engine)
    mean, std = record.identity["normalisation"]
    sizes = batch_sizes(record.profile)
    return compare(loaded, (mean, std), known.pixels, known.features, sizes, known.least)


def verify_engine(engine: StoredEngine, device: torch.device) -> Parity:
    """Check an engine's files, load it, and compare it with what its encoder gave when it was built.

    Raises:
        EngineError: a file has changed, the engine does not run here, or it is no longer close enough.
    """
    check_files(engine)
    loaded = load_engine(engine.directory, device)
    try:
        parity = parity_of(engine, loaded)
    finally:
        loaded.close()
    if problem := parity.problem():
        raise EngineError(f"engine {engine.name}: {problem}; build it again")
    return parity
