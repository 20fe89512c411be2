"""slide2vec 7.1.4's own loader over coordinate files: run by the Python of an environment that has it.

    python peer_slide2vec.py SLIDE COORDINATES_DIR

Builds the collator, DataLoader and worker counts as that package's embedding pipeline does, and
iterates; prints one JSON object like benchmarks.parts. Nothing of ours is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hs2p import load_tiling_result
from slide2vec.data.dataset import TileIndexDataset
from slide2vec.data.tile_reader import OnTheFlyBatchTileCollator
from slide2vec.runtime.cpu_budget import resolve_on_the_fly_num_workers


def main() -> None:
    slide, folder = Path(sys.argv[1]), Path(sys.argv[2])
    name = slide.stem
    tiling = load_tiling_result(folder / f"{name}.coordinates.npz", folder / f"{name}.coordinates.meta.json")
    collate = OnTheFlyBatchTileCollator(
        image_path=slide, tiling_result=tiling, backend="cucim", num_cucim_workers=4
    )
    workers, _ = resolve_on_the_fly_num_workers(4, num_gpus=1)
    order = collate.ordered_indices
    indices = np.arange(len(tiling.x), dtype=np.int64) if order is None else order
    loader = torch.utils.data.DataLoader(
        TileIndexDataset(indices), collate_fn=collate, num_workers=workers, prefetch_factor=4, batch_size=32
    )
    start, before = time.perf_counter(), cpu_seconds()
    tiles = sum(len(pixels) for _, pixels, _ in loader)
    seconds = time.perf_counter() - start
    del loader  # ends the workers, whose CPU time counts from then on
    found = {"tiles": tiles, "seconds": seconds, "workers": workers}
    print(json.dumps(found | {"cpu_seconds": cpu_seconds() - before}))


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
