"""How fast engines are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slide2vec.compile.parity import MeanStd, for_layout
from slide2vec.runtime.base import Engine
from slide2vec.runtime.torch_engine import TorchEngine

__all__ = ["beside_torch", "seconds_per_batch", "tiles_per_second"]

ROUNDS = 3
#: A round lasts this long, and one batch at least.
ROUND_S = 0.7


def beside_torch(
    engine: Engine, encoder: nn.Module, mean_std: MeanStd, pixels: Tensor, batch_size: int
) -> dict[str, float]:
    """Tiles/s of an engine and, in the same minute, of PyTorch in the same precision (fp16 for fp8).

    The encoder is on the CPU afterwards.
    """
    precision = "fp16" if engine.precision == "fp8" else engine.precision
    plain = TorchEngine(encoder, feature_dim=engine.feature_dim, precision=precision, device=engine.device)
    found = tiles_per_second({"engine": engine, "torch": plain}, mean_std, pixels, batch_size)
    encoder.cpu()
    return {name: round(speed, 2) for name, speed in found.items()}


def tiles_per_second(
    engines: Mapping[str, Engine], mean_std: MeanStd, pixels: Tensor, batch_size: int
) -> dict[str, float]:
    """The median over rounds, in which the engines take turns. Preparing pixels is not counted.

    Args:
        pixels: (N, H, W, 3) uint8, repeated to fill a batch.
    """
    tiles = pixels[torch.arange(batch_size) % len(pixels)]
    batches = {
        name: for_layout(tiles.to(engine.device), mean_std, engine.layout) for name, engine in engines.items()
    }
    for name, engine in engines.items():
        engine.run(batches[name])  # warm
    rounds = [
        {name: seconds_per_batch(engine, batches[name]) for name, engine in engines.items()}
        for _ in range(ROUNDS)
    ]
    return {name: batch_size / statistics.median(each[name] for each in rounds) for name in engines}


def seconds_per_batch(engine: Engine, batch: Tensor) -> float:
    """Mean over a round; the device is idle before and after."""
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < ROUND_S:
        engine.run(batch)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        count += 1
    return (time.perf_counter() - start) / count
