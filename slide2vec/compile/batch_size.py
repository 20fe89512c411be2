"""How many tiles an encoder takes at once: by default, and as many as fit into a GPU's memory."""

from __future__ import annotations

import logging

import torch

from slide2vec.prepare import Preparer
from slide2vec.runtime import Engine
from slide2vec.runtime.device import use_device

__all__ = ["batch_size_for", "bytes_per_tile", "fitting", "fitting_batch_size"]

logger = logging.getLogger(__name__)

#: Tiles of the trial batch.
TRIAL = 4
#: Of the free memory: the rest is for decoding, for batches of tiles and for fragmentation.
SHARE = 0.6


def batch_size_for(gflops: float, device: torch.device) -> int:
    """Tiles per forward pass when none are asked for; `gflops` is the encoder's work per tile.

    8 on a CPU, where activations then stay in its caches (benchmarks.batch_size: best, or within a few
    per cent of it, for a ViT-S and for wavelet scattering). On an accelerator as many as make
    20,000 to 40,000 GFLOP, a power of two up to 256: an estimate, not measured yet.
    """
    if device.type == "cpu":
        return 8
    wanted = int(40_000 / max(gflops, 0.1))
    return min(256, 1 << max(0, wanted.bit_length() - 1))


def fitting(wanted: int, free_bytes: int, bytes_per_tile: float) -> int:
    """The largest of wanted, wanted / 2, … tiles that take no more than `SHARE` of what is free."""
    size = wanted
    while size > 1 and size * bytes_per_tile > SHARE * free_bytes:
        size //= 2
    return size


def fitting_batch_size(device: torch.device, wanted: int, taken: float) -> int:
    """Tiles per forward pass on a GPU: as many as wanted, or as fit into what is free of its memory.

    Args:
        taken: `bytes_per_tile` of the engine.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, unused
    size = fitting(wanted, free, taken)
    if size < wanted:
        logger.info("batch_size=%d: %.0f MB a tile, %.1f GB free", size, taken / 2**20, free / 2**30)
    return size


def bytes_per_tile(engine: Engine, preparer: Preparer, wanted: int, tile_size_px: int) -> float:
    """Bytes that preparing and encoding a tile take on a GPU, beyond what was there, by a trial batch.

    Once for an engine, before it has CUDA graphs; one that allocates outside PyTorch has done so when loaded.
    The host does not wait: that would spoil the CUDA graph that another thread captures.
    """
    count = min(TRIAL, wanted)
    tiles = torch.zeros((count, tile_size_px, tile_size_px, 3), dtype=torch.uint8, device=engine.device)
    torch.cuda.reset_peak_memory_stats(engine.device)
    before = torch.cuda.memory_allocated(engine.device)
    with use_device(engine.device):
        engine.run(preparer.prepare(tiles))
    return (torch.cuda.max_memory_allocated(engine.device) - before) / count
