"""Runs on disk: what writing costs, memory over many slides, time lost by a kill; see README.md.

`python -m benchmarks.cohort` writes results/cohort-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, RESULTS, Row, child, compared, in_turns, machine

#: Encoders and slides: one that costs little, for which writing weighs most, and a ViT-S.
PRESETS = {"scattering": 50, "prost40m": 12}
SLIDES = 50


def cohort(folder: Path, count: int) -> list[Path]:
    """Generated slides of 2,048 px, about 40 tiles each, made once."""
    from slide2vec.synthetic import write_synthetic_slide

    paths = [folder / f"cohort-{number}.svs" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            write_synthetic_slide(path, size_px=2048, seed=number, levels=2)
    return paths


def embed(kind: str, preset: str, folder: Path, count: int, output_dir: Path) -> Row:
    """One run in this process: "memory" keeps nothing, "disk" publishes every slide."""
    import torch

    from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig

    torch.set_num_threads(2)
    slides = cohort(folder, count)
    model = Model.from_preset(preset, weights="random", device="cpu")
    config = PreprocessingConfig(requested_tile_size_px=224, resume=True)
    execution = ExecutionOptions(output_dir=output_dir if kind == "disk" else None)
    started = time.perf_counter()
    if kind == "disk":
        result = Pipeline(model, config, execution).run(slides)
        tiles = sum(artifact.num_tiles for artifact in result.tile_artifacts)
    else:
        tiles = sum(o.embedded.num_tiles for o in model.iter_slides(slides, config, execution) if o.embedded)
    seconds = time.perf_counter() - started
    return {
        "tiles": tiles,
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def command(kind: str, preset: str, args: argparse.Namespace, count: int, output_dir: Path) -> list[str]:
    given = [kind, preset, str(args.work_dir), str(count), str(output_dir)]
    return [sys.executable, "-m", "benchmarks.cohort", "--part", *given]


def fresh(args: argparse.Namespace) -> Path:
    output_dir = args.work_dir / "out"
    shutil.rmtree(output_dir, ignore_errors=True)
    return Path(output_dir)


def writing(args: argparse.Namespace, preset: str) -> Row:
    """A run on disk against the same slides embedded in memory."""
    count = PRESETS[preset]
    rivals = {
        "on disk": lambda: child(*command("disk", preset, args, count, fresh(args))),
        "in memory": lambda: child(*command("memory", preset, args, count, fresh(args))),
    }
    return compared(in_turns(rivals, args.rounds), "on disk")


def memory(args: argparse.Namespace) -> Row:
    found = {}
    for count in (5, SLIDES):
        row = child(*command("disk", "scattering", args, count, fresh(args)))
        found[f"{count} slides"] = {"peak_mb": row["peak_mb"], "tiles": row["tiles"]}
    return found


def killed(args: argparse.Namespace) -> Row:
    """Kill a run half-way and resume it: the time beyond that of an undisturbed one."""
    rows = []
    for _ in range(args.rounds):
        whole = timed(command("disk", "scattering", args, SLIDES, fresh(args)))
        first = command("disk", "scattering", args, SLIDES, fresh(args))
        before = timed(first, kill_after=whole / 2)
        after = timed(first)
        start = timed(command("memory", "scattering", args, 0, fresh(args)))
        rows.append({"undisturbed_s": whole, "lost_s": before + after - whole, "start_s": start})
        print(f"  {rows[-1]}", flush=True)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"runs": rows}


def timed(given: list[str], kill_after: float | None = None) -> float:
    """Seconds of a process, start-up included."""
    started = time.perf_counter()
    process = subprocess.Popen(given, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.perf_counter() - started


def report(found: Row) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in found["machine"]["packages"].items() if v)
    lines = [
        f"# Runs on disk, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, ",
    ]
    lines[-1] += f"{packages}. Generated slides of 2,048 px; medians."
    lines += [
        "",
        "| preset (slides) | on disk, tiles/s | in memory, tiles/s | on disk / in memory |",
        "|---|---|---|---|",
    ]
    for preset, row in found["writing"].items():
        disk, ram = row["on disk"]["tiles_per_s"], row["in memory"]["tiles_per_s"]
        ratio = row["in memory"]["ours_over_it"]["median"]
        lines.append(f"| {preset} ({PRESETS[preset]}) | {disk:,.1f} | {ram:,.1f} | {ratio:.3f} |")
    peaks = ", ".join(f"{name} {row['peak_mb']:,.0f} MB" for name, row in found["memory"].items())
    lost = found["killed"]
    lines += ["", f"Peak memory of the process: {peaks}."]
    lines += [
        "",
        f"Killed half-way (SIGKILL) and resumed: {lost['lost_s']:.1f} s more than the undisturbed "
        f"{lost['undisturbed_s']:.1f} s, of which {lost['start_s']:.1f} s start the process again.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    args = parser.parse_args()
    if args.part:
        kind, preset, folder, count, output_dir = args.part
        print(json.dumps(embed(kind, preset, Path(folder), int(count), Path(output_dir))))
        return
    cohort(args.work_dir, SLIDES)
    found: dict[str, Any] = {"date": f"{datetime.date.today()}", "machine": machine()}
    found["writing"] = {preset: writing(args, preset) for preset in PRESETS}
    found["memory"], found["killed"] = memory(args), killed(args)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"cohort-{found['date']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    stem.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
