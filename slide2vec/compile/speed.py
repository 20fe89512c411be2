"""How fast engines are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slide2vec.compile.export_module import torch_engine
from slide2vec.compile.parity import MeanStd, for_layout
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import Engine

__all__ = ["beside_torch", "seconds_per_batch", "tiles_per_second", "warm"]

ROUNDS = 3
#: A round lasts this long, and one batch at least.
ROUND_S = 0.7
#: Batches that are not timed: a size is captured as a CUDA graph when it comes the second time.
WARM = 2
#: Batches that tell how long one takes.
QUEUED = 8


def beside_torch(
    engine: Engine, encoder: nn.Module, recipe: Recipe, pixels: Tensor, batch_size: int
) -> dict[str, float]:
    """Tiles/s of an engine and, in the same minute, of PyTorch in the same precision (fp16 for fp8).

    The encoder is on the CPU afterwards.
    """
    precision = "fp16" if engine.precision == "fp8" else engine.precision
    plain = torch_engine(encoder, recipe, precision, engine.device, feature_dim=engine.feature_dim)
    mean_std = recipe.transform.mean, recipe.transform.std
    found = tiles_per_second({"engine": engine, "torch": plain}, mean_std, pixels, batch_size)
    plain.close()
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
        warm(engine, batches[name])
    rounds = [
        {name: seconds_per_batch(engine, batches[name]) for name, engine in engines.items()}
        for _ in range(ROUNDS)
    ]
    return {name: batch_size / statistics.median(each[name] for each in rounds) for name in engines}


def warm(engine: Engine, batch: Tensor) -> None:
    """Have an engine do all that it does only at the first batches of a size."""
    for _ in range(WARM):
        engine.run(batch)


def seconds_per_batch(engine: Engine, batch: Tensor) -> float:
    """Mean over a round; the device is idle before and after.

    A CUDA device is never waited for while batches are queued, as in a run; how many a round needs is found
    out before, by a few.
    """
    if engine.device.type != "cuda":
        return _host_round(engine, batch)
    trial = _queued(engine, batch, QUEUED)
    return _queued(engine, batch, max(QUEUED, round(ROUND_S / trial)))


def _host_round(engine: Engine, batch: Tensor) -> float:
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < ROUND_S:
        engine.run(batch)
        count += 1
    return (time.perf_counter() - start) / count


def _queued(engine: Engine, batch: Tensor, count: int) -> float:
    """Seconds per batch, of so many with one synchronisation after them."""
    torch.cuda.synchronize(engine.device)
    start = time.perf_counter()
    for _ in range(count):
        engine.run(batch)
    torch.cuda.synchronize(engine.device)
    return (time.perf_counter() - start) / count
