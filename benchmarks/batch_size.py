"""Tiles per forward pass on this machine's CPU: `python -m benchmarks.batch_size`.

Runs every batch size in turns over random tensors and prints the median tiles/s of each, for a ViT-S
and for wavelet scattering. `slide2vec.compile.batch_size.batch_size_for` takes its default from it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks.common import PRESET, THREADS, TILE_PX
from slide2vec import Model

SIZES = (1, 4, 8, 16, 32, 64)
TILES, ROUNDS = 64, 3


def speed(encoder: nn.Module, size: int) -> float:
    """Tiles per second in batches of one size."""
    pixels = torch.rand(size, 3, TILE_PX, TILE_PX)
    start = time.perf_counter()
    for _ in range(TILES // size):
        encoder(pixels)
    return TILES / (time.perf_counter() - start)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(THREADS)
    for preset in ("scattering", PRESET):
        encoder = Model.from_preset(preset, weights="random", device="cpu").encoder
        with torch.inference_mode():
            encoder(torch.rand(8, 3, TILE_PX, TILE_PX))
            rounds = [[speed(encoder, size) for size in SIZES] for _ in range(ROUNDS)]
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(
            preset,
            *(f"{size}: {median:.1f}" for size, median in zip(SIZES, medians, strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
