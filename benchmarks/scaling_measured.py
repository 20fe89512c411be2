"""Two workers on two CPUs against one process on one CPU, and on both; a part of `benchmarks.scaling`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.cpu import HERE, Row, compared, in_turns, machine

__all__ = ["PRESETS", "embed", "measure", "measured_report"]

PRESETS = {"scattering": 24, "prost40m": 12}
#: Sides of the generated slides in turns, px.
SIDES = (2048, 3072, 4096)
BASE, OURS, RIVAL = "1 process, 1 CPU", "2 workers, 1 CPU each", "1 process, 2 CPUs"


def slides_in(folder: Path, count: int) -> list[Path]:
    """Generated slides, made once; the first is the one to warm up with."""
    from slide2vec.synthetic import write_synthetic_slide

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scaling-{number}.svs" for number in range(count + 1)]
    for number, path in enumerate(paths):
        if not path.exists():
            write_synthetic_slide(path, size_px=SIDES[number % len(SIDES)], seed=number, levels=2)
    return paths


def embed(kind: str, preset: str, folder: Path, count: int) -> Row:
    """One run in this process, after a first call that starts what there is to start."""
    if kind == BASE:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    from slide2vec import ExecutionOptions, Model, PreprocessingConfig

    first, *slides = slides_in(folder, count)
    model = Model.from_preset(preset, weights="random", device="cpu")
    config = PreprocessingConfig(requested_tile_size_px=224)
    options = ExecutionOptions(devices=("cpu", "cpu") if kind == OURS else None)
    model.embed_slides([first], config, options)
    started = time.perf_counter()
    results = model.embed_slides(slides, config, options)
    seconds = time.perf_counter() - started
    torch.save([result.tile_embeddings for result in results], folder / f"{preset}-{kind}.pt")
    return {"tiles": sum(result.num_tiles for result in results), "seconds": seconds}


def child(kind: str, preset: str, args: argparse.Namespace) -> Row:
    count = args.slides or PRESETS[preset]
    given = [kind, preset, str(args.work_dir), str(count)]
    environ = os.environ | {"SLIDE2VEC_CPUS": "1" if kind == BASE else "2"}
    command = [sys.executable, "-m", "benchmarks.scaling", "--part", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row | {"tiles_per_s": row["tiles"] / row["seconds"], "differs": differs(preset, kind, args)}


def differs(preset: str, kind: str, args: argparse.Namespace) -> float:
    """The largest difference of an embedding from the base's; 0: all are `torch.equal`."""
    import torch

    ours, base = (torch.load(args.work_dir / f"{preset}-{name}.pt") for name in (kind, BASE))
    if all(map(torch.equal, ours, base)):
        return 0.0
    return max(float((one - other).abs().max()) for one, other in zip(ours, base, strict=True))


def measure(args: argparse.Namespace) -> Row:
    found: Row = {"machine": machine(), "presets": {}}
    for preset in args.presets:
        slides_in(args.work_dir, args.slides or PRESETS[preset])
        rivals: dict[str, Callable[[], Row]] = {
            kind: partial(child, kind, preset, args) for kind in (BASE, OURS, RIVAL)
        }
        rows = in_turns(rivals, args.rounds)
        found["presets"][preset] = compared(rows, BASE)
        for kind, row in found["presets"][preset].items():
            row["speed_up"] = ratios(row, found["presets"][preset][BASE])
            row["differs"] = max(run["differs"] for run in rows[kind])
            row["slides"] = args.slides or PRESETS[preset]
    return found


def ratios(row: Row, base: Row) -> Sequence[float]:
    """Of the speeds, round by round."""
    return [one / other for one, other in zip(row["runs"], base["runs"], strict=True)]


def measured_report(found: Row) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in found["machine"]["packages"].items() if v)
    lines = [
        f"# Scaling, measured, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, {packages}. Generated slides of "
        f"{', '.join(f'{side:,}' for side in SIDES)} px, random weights, `Model.embed_slides`.",
        "Medians; speed-ups are taken round by round. Each run is a process of its own, and its first call, "
        "on another slide, is not timed: starting workers and loading models is not in the figures. 1 CPU: "
        "the process is pinned to it.",
        "",
        "| preset (slides, tiles) | how | tiles/s | speed-up (range) | efficiency | embeddings |",
        "|---|---|---|---|---|---|",
    ]
    for preset, rows in found["presets"].items():
        for kind, row in rows.items():
            times = statistics.median(row["speed_up"])
            efficiency = times / (1 if kind == BASE else 2)
            same = f"within {row['differs']:.1e}" if row["differs"] else "equal"
            spread = f"{times:.2f} ({min(row['speed_up']):.2f} to {max(row['speed_up']):.2f})"
            lines.append(
                f"| {preset} ({row['slides']}, {row['tiles']:,}) | {kind} | {row['tiles_per_s']:,.1f} "
                f"| {spread} | {efficiency:.2f} | {same} |"
            )
    return "\n".join(lines) + "\n"
