"""Whether a published engine still does what it did when it was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slide2vec.compile.parity import Parity, batch_sizes, compare
from slide2vec.compile.store import StoredEngine
from slide2vec.errors import EngineError
from slide2vec.files import READING_ARRAYS
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine

__all__ = ["Reference", "check_files", "parity_of", "verify_engine", "write_reference"]

REFERENCE_NAME = "reference.npz"


def write_reference(folder: Path, pixels: Tensor, features: Tensor, least: float) -> None:
    """Keep tiles and their features beside an engine, and how close it has to be to them.

    Args:
        pixels: (N, H, W, 3) uint8, of a generated slide: nobody's tissue is kept.
        features: (N, D) float32, of the encoder in fp32.
        least: cosine that the engine must not be below.
    """
    path = folder / REFERENCE_NAME
    np.savez_compressed(path, pixels=pixels.numpy(), features=features.numpy(), least=least)


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
            least = engine.record.parity["least"] if engine.record.parity else float(kept["least"])
        return cls(pixels, features, least)


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
