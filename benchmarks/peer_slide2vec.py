"""slide2vec 7.1.4's own loader over coordinate files: run by the Python of an environment that has it.

    python peer_slide2vec.py SLIDE COORDINATES_DIR SLIDES

Builds the collator, DataLoader and worker counts as that package's embedding pipeline does, and
iterates, for a cohort of so many slides that are all this one; prints one JSON object like benchmarks.parts.
Nothing of ours is imported.
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
    slide, folder, slides = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    tiles, first = 0, None
    start, before = time.perf_counter(), cpu_seconds()
    for _ in range(slides):
        for _, pixels, _ in batches(slide, folder):
            first = first or time.perf_counter()
            tiles += len(pixels)
    seconds = time.perf_counter() - start
    found = {"tiles": tiles, "seconds": seconds, "first_batch_s": (first or start) - start}
    print(json.dumps(found | {"cpu_seconds": cpu_seconds() - before}))


def batches(slide: Path, folder: Path) -> torch.utils.data.DataLoader:
    """What its pipeline loads of one slide; the CPU time of its workers counts once they have ended."""
    name = slide.stem
    tiling = load_tiling_result(folder / f"{name}.coordinates.npz", folder / f"{name}.coordinates.meta.json")
    collate = OnTheFlyBatchTileCollator(
        image_path=slide, tiling_result=tiling, backend="cucim", num_cucim_workers=4
    )
    workers, _ = resolve_on_the_fly_num_workers(4, num_gpus=1)
    order = collate.ordered_indices
    indices = np.arange(len(tiling.x), dtype=np.int64) if order is None else order
    return torch.utils.data.DataLoader(
        TileIndexDataset(indices), collate_fn=collate, num_workers=workers, prefetch_factor=4, batch_size=32
    )


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
