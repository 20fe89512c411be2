"""What `slide2vec plan` says a run will take, against the run: `python -m benchmarks.estimates --rounds 5`.

For cohorts of several shapes, in turns: the plan (a process, with its trial of 10 s), then the run (a
process of its own, random weights, PyTorch on the CPU), whose seconds are those of the whole process, and
those of the summary (from its first slide to its last). A ratio above 1: the plan said too much. Results
go to `results/estimates-<date>.md` and `.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, RESULTS, Row, machine

#: Slides of each cohort by their side in px, and the encoders.
SHAPES = {
    "one large slide": ([8192], "prost40m"),
    "twelve small slides": ([2048] * 12, "prost40m"),
    "small and large": ([2048] * 4 + [6144], "prost40m"),
    "two encoders": ([2048] * 4, "prost40m,lunit"),
}


def slide2vec(*command: object) -> tuple[Any, float]:
    """What a subcommand prints as JSON, and the seconds of its process."""
    before = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "slide2vec", *map(str, command), "--json"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    if done.returncode:
        raise SystemExit(f"slide2vec {' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout), time.perf_counter() - before


def manifest(folder: Path, sizes: list[int]) -> Path:
    """A manifest of generated slides, each made once."""
    from slide2vec.synthetic import write_synthetic_slide

    lines = ["sample_id,image_path"]
    for seed, size in enumerate(sizes):
        path = folder / f"estimate-{size}-{seed}.svs"
        if not path.exists():
            write_synthetic_slide(path, size_px=size, seed=seed)
        lines.append(f"{path.stem},{path}")
    file = folder / f"estimate-{'-'.join(map(str, sizes))}.csv"
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return file


def compared(slides: Path, presets: str) -> Row:
    """The plan of a cohort, and its run."""
    common = "--preset", presets, "--weights", "random", "--device", "cpu", "--engine", "torch"
    plan, took = slide2vec("plan", slides, *common)
    here = next((row for row in plan["machines"] if row["machine"] == "this machine"), None)
    with tempfile.TemporaryDirectory() as folder:
        run, process_s = slide2vec("run", "--manifest", slides, *common, "--output", f"{folder}/out")
    planned = None if here is None else here["hours"] * 3600
    ended = [each["summary"] for each in run.get("encoders", {"": run}).values()]
    seconds = max(summary["seconds"] for summary in ended)  # they begin together
    return {
        "tiles": sum(summary["tiles"] for summary in ended),
        "planned_s": planned,
        "run_s": seconds,
        "process_s": process_s,
        "plan_took_s": took,
        "ratio": None if planned is None else planned / process_s,
    }


def report(rows: dict[str, list[Row]], load: float, where: Row) -> str:
    """The results as a page."""
    lines = [
        f"# What a plan says, and what the run takes, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.estimates`, medians of {max(map(len, rows.values()))} rounds; "
        f"{where['cpu']}, {where['cpus']} CPUs; {load:.1f} processes at work at the end. Planned / process "
        "above 1: the plan said too much.",
        "",
        "| cohort | encoders | tiles | planned, s | whole process, s | ratio | of it for slides, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        figures = {key: median(runs, key) for key in runs[0]}
        cells = [f"{figures[key]:.0f}" for key in ("tiles", "planned_s", "process_s")]
        spread = " … ".join(f"{run['ratio']:.2f}" for run in sorted(runs, key=lambda run: run["ratio"]))
        cells += [f"{figures['ratio']:.2f} ({spread})", f"{figures['run_s']:.0f}"]
        lines.append(f"| {name} | {SHAPES[name][1]} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def median(runs: list[Row], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    rows: dict[str, list[Row]] = {name: [] for name in args.shapes}
    for number in range(args.rounds):
        for name in args.shapes:
            sizes, presets = SHAPES[name]
            row = compared(manifest(args.folder, sizes), presets)
            print(f"  round {number + 1}: {name:<22} {row}", flush=True)
            if row["ratio"] is not None:
                rows[name].append(row)
    load, where = os.getloadavg()[0], machine()
    page = report({name: runs for name, runs in rows.items() if runs}, load, where)
    print(page)
    path = RESULTS / f"estimates-{datetime.date.today()}"
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    path.with_suffix(".json").write_text(
        json.dumps({"machine": where, "load": load, "runs": rows}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
