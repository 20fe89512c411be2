"""What the benchmarks share: pieces in processes of their own, rivals in turns, the machine, slides."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slide2vec.recipes import Recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = (
    "slide2vec",
    "torch",
    "timm",
    "openvino",
    "cucim-cu13",
    "opencv-python-headless",
    "openslide-python",
    "simplejpeg",
    "imagecodecs",
    "numpy",
)

THREADS = 2
SPACING_UM = 0.5
TILE_PX = 224
PRESET = "prost40m"  # a ViT-S

Row = dict[str, Any]


def of_depth(recipe: Recipe, depth: int) -> Recipe:
    """A recipe with so many blocks, per stage where an encoder has stages; 0 = all. The scattering transform
    has none."""
    stages = {"swin_tiny_patch4_window7_224": "depths", "resnet50": "layers"}.get(recipe.encoder.arch)
    few = {stages: [depth] * 4} if stages else {"depth": depth}
    if not depth or recipe.encoder.family == "scattering":
        return recipe
    spec = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, **few}})
    return recipe.model_copy(update={"encoder": spec})


def child(*command: str) -> Row:
    """Run a piece in its own process; the JSON object that it prints last."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    if "seconds" in row:
        row["tiles_per_s"] = row["tiles"] / row["seconds"]
    return row


def in_turns(rivals: dict[str, Callable[[], Row]], rounds: int) -> dict[str, list[Row]]:
    """Run each rival once per round, A B C, A B C …"""
    rows: dict[str, list[Row]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name, run in rivals.items():
            rows[name].append(run())
            speed = rows[name][-1]["tiles_per_s"]
            print(f"  round {number + 1}: {name:<22} {speed:8.1f} tiles/s", flush=True)
    return rows


def compared(rows: dict[str, list[Row]], ours: str) -> Row:
    """Median speeds, and the median of ours / rival taken round by round."""
    found: Row = {}
    for name, runs in rows.items():
        speeds = [row["tiles_per_s"] for row in runs]
        found[name] = {"tiles_per_s": statistics.median(speeds), "runs": speeds, "tiles": runs[0]["tiles"]}
        found[name] |= {key: runs[0][key] for key in ("backend",) if key in runs[0]}
        if all("peak_mb" in row for row in runs):
            found[name]["memory_mb"] = statistics.median(row["peak_mb"] for row in runs)
        if all("cpu_seconds" in row for row in runs):
            per_cpu = [row["tiles"] / row["cpu_seconds"] for row in runs]
            found[name]["tiles_per_cpu_s"] = statistics.median(per_cpu)
        if all("first_batch_s" in row for row in runs):
            found[name]["first_batch_s"] = statistics.median(row["first_batch_s"] for row in runs)
        if name != ours:
            ratios = [a["tiles_per_s"] / b["tiles_per_s"] for a, b in zip(rows[ours], runs, strict=True)]
            found[name]["ours_over_it"] = {"median": statistics.median(ratios), "runs": ratios}
            if "tiles_per_cpu_s" in found[name] and "tiles_per_cpu_s" in found[ours]:
                ratio = found[ours]["tiles_per_cpu_s"] / found[name]["tiles_per_cpu_s"]
                found[name]["ours_over_it_per_cpu_s"] = ratio
    return found


def machine() -> Row:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def generated(folder: Path, size: int) -> Path:
    """A synthetic slide, made once and kept in the folder."""
    from slide2vec.synthetic import write_synthetic_slide

    path = folder / f"synthetic-{size}.svs"
    if not path.exists():
        print(f"generating {path}", flush=True)
        write_synthetic_slide(path, size_px=size, seed=0)
    return path


class NullEngine:
    """An encoder that costs nothing, to measure what feeds it."""

    runtime, precision, feature_dim = "none", "fp32", 1

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")
        self.first: float | None = None

    def run(self, pixels: Any) -> Any:
        self.first = self.first or time.perf_counter()
        return pixels[:, 0, 0, :1]

    def close(self) -> None:
        pass


def configs(backend: str = "auto") -> Any:
    from slide2vec import PreprocessingConfig

    return PreprocessingConfig(
        requested_spacing_um=SPACING_UM, requested_tile_size_px=TILE_PX, backend=backend
    )
