"""From one worker to a thousand: simulated, and two measured; see README.md.

`python -m benchmarks.scaling --simulate` writes results/scaling-simulation-<date>.md, .json and .png;
`--measure` results/scaling-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, RESULTS, Row, compared, in_turns, machine
from benchmarks.scheduling import BEST, MEAN_TILES, MIXES, POLICIES, Setting, Simulation, cohort, scaling_plot

# simulated ----------------------------------------------------------------------------------------

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SLIDES, MANY, SEEDS = 10_000, 100_000, 5
USUAL = Setting()
#: What is changed, one at a time, for 64 workers.
OTHERWISE = {
    "as above": USUAL,
    "no losses": replace(USUAL, losses_per_h=0.0),
    "losses: 0.5 per hour and worker": replace(USUAL, losses_per_h=0.5),
    "sizes exact": replace(USUAL, sizes_sigma=0.0),
    "sizes: sigma 0.6": replace(USUAL, sizes_sigma=0.6),
    "sizes not known": replace(USUAL, sizes_sigma=math.inf),
    "speeds: 20 % apart": replace(USUAL, speeds=0.2),
    "planning 5 s a slide": replace(USUAL, plan_s=5.0),
    "planning 10 s a slide": replace(USUAL, plan_s=10.0),
    "one planner": replace(USUAL, planners=1),
    "messages take 1 s": replace(USUAL, message_s=1.0),
}
#: Which policies the runs of `MANY` slides compare.
FEW = ("Schedule", "pulled one by one", "split by tiles")


def simulated(policy: str, mix: str, slides: int, workers: int, setting: Setting = USUAL) -> Row:
    """Medians and ranges over the seeds."""
    rows = []
    for seed in range(SEEDS):
        given = cohort(mix, slides, setting.sizes_sigma, seed)
        simulation = Simulation(policy, given, workers, setting, seed)
        seconds, ideal = simulation.run(), simulation.ideal
        rows.append(
            {
                "ideal_s": ideal,
                "makespan_s": seconds,
                "efficiency": ideal / (seconds - setting.start_s),
                "with_start": ideal / seconds,
                "best": min(1.0, ideal / simulation.longest),
                "lost": simulation.lost,
                "failed": simulation.failed,
            }
        )
    found: Row = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found | {"range": [fold(row["efficiency"] for row in rows) for fold in (min, max)]}


def simulate() -> Row:
    found: Row = {"setting": asdict(USUAL), "slides": SLIDES, "seeds": SEEDS, "mixes": {}, "many": {}}
    for mix in MIXES:
        found["mixes"][mix] = {policy: {} for policy in POLICIES}
        for policy, rows in found["mixes"][mix].items():
            for workers in WORKERS:
                rows[workers] = simulated(policy, mix, SLIDES, workers)
            print(f"  {mix}, {policy}: {[round(row['efficiency'], 3) for row in rows.values()]}", flush=True)
    found["otherwise"] = {
        mix: {name: simulated("Schedule", mix, SLIDES, 64, setting) for name, setting in OTHERWISE.items()}
        for mix in MIXES
    }
    print("  otherwise", flush=True)
    for workers in (64, 1000):
        found["many"][workers] = {policy: simulated(policy, "recorded", MANY, workers) for policy in FEW}
        print(f"  {MANY:,} slides, {workers} workers", flush=True)
    return found


def spread(row: Row) -> str:
    return f"{row['efficiency']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f})"


def mix_table(rows: dict[str, dict[int, Row]]) -> list[str]:
    rivals = [policy for policy in rows if policy != "Schedule"]
    lines = [
        f"| workers | ideal, s | at best | Schedule | with start-up | {' | '.join(rivals)} |",
        "|---" * (5 + len(rivals)) + "|",
    ]
    for workers, ours in rows["Schedule"].items():
        others = " | ".join(f"{rows[policy][workers]['efficiency']:.3f}" for policy in rivals)
        lines.append(
            f"| {int(workers):,} | {ours['ideal_s']:,.0f} | {ours['best']:.3f} | {spread(ours)} "
            f"| {ours['with_start']:.3f} | {others} |"
        )
    return lines


def simulation_report(found: Row, picture: str) -> str:
    lines = [
        f"# Scaling, simulated, {found['date']}",
        "",
        f"{found['slides']:,} slides; the coordinator's own `Scheduler` and rivals, workers simulated. "
        f"Median (range) of {found['seeds']} seeds.",
        "Efficiency: the time that all tiles would take if no worker ever waited (ideal), over the time of "
        f"the run without its first {found['setting']['start_s']:g} s, in which workers start; with "
        "start-up: over all of it. At best: where the largest slide alone takes longer than the ideal, no "
        "more is possible.",
        "",
        "Sizes, recorded: of the files of 258 TCGA colon slides (8 MB to 2.8 GB). Made up: biopsies and a "
        "few large resections. Numbers of tiles are not recorded: they are taken in proportion to the bytes, "
        f"but for a log-normal error, with a mean of {MEAN_TILES:,.0f} as published for Prov-GigaPath. "
        "Sources are in benchmarks/scheduling.py. Speeds, latencies and losses are assumed:",
        "",
        *(f"- {name}: {value:g}" for name, value in found["setting"].items()),
        "",
        "Split by tiles: as slide2vec 7.1.4 does it, once all slides are tiled; that time is not counted. "
        "A split's lost worker is replaced, and goes on with its part. Pulled one by one: nothing is planned "
        "ahead.",
        "",
        f"![Efficiency over workers]({picture})",
    ]
    for mix, rows in found["mixes"].items():
        lines += ["", f"## Sizes {mix}", "", *mix_table(rows)]
    lines += [
        "",
        "## 64 workers, one thing changed",
        "",
        "| | recorded | made up | lost |",
        "|---|---|---|---|",
    ]
    for name, row in found["otherwise"]["recorded"].items():
        other = found["otherwise"]["made up"][name]
        lines.append(f"| {name} | {spread(row)} | {spread(other)} | {row['lost']:g} |")
    lines += ["", f"## {MANY:,} slides, sizes recorded", ""]
    lines += [f"| workers | ideal, s | {' | '.join(FEW)} |", "|---" * (2 + len(FEW)) + "|"]
    for workers, rows in found["many"].items():
        shown = " | ".join(spread(rows[policy]) for policy in FEW)
        lines.append(f"| {int(workers):,} | {rows['Schedule']['ideal_s']:,.0f} | {shown} |")
    return "\n".join(lines) + "\n"


def draw(found: Row, path: Path) -> None:
    mixes = {}
    for mix, policies in found["mixes"].items():
        lines = {
            policy: [(int(workers), row["efficiency"], *row["range"]) for workers, row in rows.items()]
            for policy, rows in policies.items()
        }
        best = [(int(workers), row["best"], 0.0, 0.0) for workers, row in policies["Schedule"].items()]
        mixes[f"efficiency, {found['slides']:,} slides, sizes {mix} (dashed: 0.97)"] = lines | {BEST: best}
    scaling_plot(mixes, path)


# measured -----------------------------------------------------------------------------------------

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


# both ---------------------------------------------------------------------------------------------


def written(found: Row, stem: Path, text: str) -> None:
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--slides", type=int, help=f"to measure; {PRESETS} by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.part:
        kind, preset, folder, count = args.part
        print(json.dumps(embed(kind, preset, Path(folder), int(count))))
        return
    date = f"{datetime.date.today()}"
    if args.simulate:
        found: dict[str, Any] = {"date": date} | simulate()
        stem = args.results / f"scaling-simulation-{date}"
        draw(found, stem.with_suffix(".png"))
        written(found, stem, simulation_report(found, f"{stem.name}.png"))
    if args.measure:
        found = {"date": date} | measure(args)
        written(found, args.results / f"scaling-{date}", measured_report(found))


if __name__ == "__main__":
    main()
