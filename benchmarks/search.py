"""Exact search over many tile embeddings: time and memory; see README.md.

    python -m benchmarks.search [--rows 1000000] [--dim 512] [--slides 100] [--rounds 5]

writes results/search-<date>.md. A run of random embeddings in single precision is made in a folder for
temporary files; each search is that of `slide2vec search` without its picture. Against: NumPy over the same
embeddings, all in memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, Row, child, machine

NEAREST = 20


def make(folder: Path, rows: int, dim: int, slides: int) -> None:
    """A run: embeddings with their sidecars."""
    import torch
    from safetensors.torch import save_file

    (folder / "tile_embeddings").mkdir(parents=True)
    each = rows // slides
    for number in range(slides):
        name = f"slide{number:04d}"
        values = np.random.default_rng(number).standard_normal((each, dim), np.float32)
        path = folder / "tile_embeddings" / f"{name}.safetensors"
        at = torch.arange(each)[:, None] * torch.tensor([10, 0])
        save_file({"features": torch.from_numpy(values), "coords": at}, path)
        sidecar = {
            **{
                "artifact_type": "tile_embeddings",
                "sample_id": name,
                "format": "safetensors",
                "schema_version": 2,
            },
            **{"num_tiles": each, "feature_dim": dim, "feature_dtype": "float32", "encoder_name": "random"},
            **{"encoder_level": "tile", "file_size_bytes": path.stat().st_size, "tile_size_lv0": 10},
        }
        (folder / "tile_embeddings" / f"{name}.meta.json").write_text(json.dumps(sidecar))


def ours(folder: Path, rounds: int) -> Row:
    """Open the run and search, as a new process does it: the first time with the index to be made."""
    import torch

    from slide2vec.search import searched_run

    before, started = _peak_mb(), time.perf_counter()
    index = searched_run(folder).index
    opened, seconds = time.perf_counter() - started, []
    for number in range(rounds):
        query = torch.randn(index.dim, generator=torch.Generator().manual_seed(number))
        started = time.perf_counter()
        hits = index.nearest(query, NEAREST)
        seconds.append(time.perf_counter() - started)
    last = [[hit.sample_id, hit.row] for hit in hits]
    row = {"open_s": opened, "search_s": seconds, "peak_mb": _peak_mb(), "before_mb": before, "last": last}
    return {**row, "rows": len(index), "threads": torch.get_num_threads()}


def numpy_(folder: Path, rounds: int) -> Row:
    """All embeddings in memory, of unit length; the same queries."""
    import torch
    from safetensors.torch import load_file

    paths = sorted((folder / "tile_embeddings").glob("*.safetensors"))
    parts = [load_file(path)["features"].numpy() for path in paths]
    counts = [len(part) for part in parts]
    everything = np.concatenate(parts)
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    seconds = []
    for number in range(rounds):
        query = torch.randn(everything.shape[1], generator=torch.Generator().manual_seed(number)).numpy()
        started = time.perf_counter()
        scores = everything @ (query / np.linalg.norm(query))
        best = np.argpartition(-scores, NEAREST)[:NEAREST]
        best = best[np.argsort(-scores[best])]
        seconds.append(time.perf_counter() - started)
    ends = np.cumsum(counts)
    found = []
    for row in best.tolist():
        slide = int(np.searchsorted(ends, row, side="right"))
        found.append([paths[slide].stem, row - int(ends[slide] - counts[slide])])
    return {"search_s": seconds, "peak_mb": _peak_mb(), "last": found}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", nargs=2, metavar=("ours|numpy", "FOLDER"))
    options = parser.parse_args()
    if options.part:
        run = ours if options.part[0] == "ours" else numpy_
        print(json.dumps(run(Path(options.part[1]), options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.rows, options.dim, options.slides)
        command = (sys.executable, "-m", "benchmarks.search", "--rounds", str(options.rounds), "--part")
        first, again = child(*command, "ours", folder), child(*command, "ours", folder)
        rival = child(*command, "numpy", folder)
    assert again["last"] == rival["last"], "the nearest tiles are others"
    date = datetime.date.today().isoformat()
    lines = [
        f"# Exact search over {first['rows']:,} embeddings of {options.dim} dimensions, {date}",
        "",
        f"{machine()['cpus']} cores of {machine()['cpu']}, load {os.getloadavg()[0]:.0f}; {options.slides} "
        f"slides, float32; the {NEAREST} nearest by cosine, {options.rounds} queries; files in the page "
        "cache. Both find the same tiles.",
        "",
        "| | open the run, s | a search, s (median, largest) | peak memory, MB (before the run is opened) |",
        "|---|---|---|---|",
        *(
            f"| {title} | {row['open_s']:.2f} | {statistics.median(row['search_s']):.2f}, "
            f"{max(row['search_s']):.2f} | {row['peak_mb']:.0f} ({row['before_mb']:.0f}) |"
            for title, row in (("slide2vec, first (gathers)", first), ("slide2vec, then", again))
        ),
        f"| NumPy, in memory | | {statistics.median(rival['search_s']):.2f}, {max(rival['search_s']):.2f} "
        f"| {rival['peak_mb']:.0f} |",
        "",
    ]
    (RESULTS / f"search-{date}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
