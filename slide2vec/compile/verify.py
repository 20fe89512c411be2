"""Whether a published engine still does what it did when it was built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slide2vec.compile.parity import Parity, compare
from slide2vec.compile.store import StoredEngine
from slide2vec.errors import EngineError
from slide2vec.files import READING_ARRAYS
from slide2vec.runtime.loading import load_engine

__all__ = ["verify_engine", "write_reference"]

REFERENCE_NAME = "reference.npz"


def write_reference(folder: Path, pixels: Tensor, features: Tensor) -> None:
    """Keep tiles and their features beside an engine.

    Args:
        pixels: (N, H, W, 3) uint8, of a generated slide: nobody's tissue is kept.
        features: (N, D) float32, of the encoder in fp32.
    """
    np.savez_compressed(folder / REFERENCE_NAME, pixels=pixels.numpy(), features=features.numpy())


def verify_engine(engine: StoredEngine, device: torch.device) -> Parity:
    """Check an engine's files, load it, and compare it with what its encoder gave when it was built.

    Raises:
        EngineError: a file has changed, the engine does not run here, or it is no longer close enough.
    """
    if damage := engine.damage():
        raise EngineError(f"engine {engine.name}: {damage}; build it again")
    with READING_ARRAYS, np.load(engine.directory / REFERENCE_NAME) as kept:
        pixels, features = (torch.from_numpy(kept[name]) for name in ("pixels", "features"))
    record = engine.record
    loaded = load_engine(engine.directory, device)
    try:
        sizes, least = tuple(record.parity["batch_sizes"]), record.parity["least"]
        mean, std = record.identity["normalisation"]
        parity = compare(loaded, (mean, std), pixels, features, sizes, least)
    finally:
        loaded.close()
    if problem := parity.problem():
        raise EngineError(f"engine {engine.name}: {problem}; build it again")
    return parity
