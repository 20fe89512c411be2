"""How a run shares the CPUs among its stations: by itself, and set by hand; see README.md.

`python -m benchmarks.budget --slides FOLDER` writes results/budget-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, RESULTS, Row, machine

#: Encoders, how many of the slides, and how often they are run through: a ViT-S, and one that costs little.
PRESETS = {"prost40m": (1, 1), "scattering": (3, 2)}
SLIDES = ("CMU-1-Small-Region.svs", "aperio-jpeg-pyramid.svs", "generic-jpeg-bigtiff-pyramid.tiff")
THREADS = (1, 2, 4)
AUTOMATIC = "automatic"
#: A manual setting: threads that read, plan and encode.
Setting = tuple[int, int, int]


def embed(preset: str, slides: list[Path], repeat: int, readers: int, planners: int) -> Row:
    """One run in this process; 0 threads = automatic. SLIDE2VEC_CPUS says how many encode."""
    from benchmarks.common import configs
    from slide2vec import ExecutionOptions, Model, cpus

    if readers:
        cpus.SMALL_GFLOPS = 0.0  # an encoder has the threads it is given, however small it is
    model = Model.from_preset(preset, weights="random", device="cpu", allow_non_recommended_settings=True)
    options = ExecutionOptions(
        num_workers=readers or None, num_preprocessing_workers=planners or None, engine="torch"
    )
    given = [
        {"sample_id": f"{number}-{slide.stem}", "image_path": slide, "spacing_at_level_0": 0.5}
        for number in range(repeat)
        for slide in slides
    ]
    model.embed_slides(given[:1], configs(), options)  # warm
    started = time.perf_counter()
    tiles = sum(result.num_tiles for result in model.embed_slides(given, configs(), options))
    return {"tiles": tiles, "seconds": time.perf_counter() - started}


def run(preset: str, args: argparse.Namespace, setting: Setting | None) -> Row:
    """A run in its own process, on the CPUs asked for."""
    readers, planners, encoder = setting or (0, 0, 0)
    environ = {key: value for key, value in os.environ.items() if key != "SLIDE2VEC_CPUS"}
    if setting is not None:
        environ["SLIDE2VEC_CPUS"] = str(encoder)
    pinned = ["taskset", "-c", args.cpus] if args.cpus else []
    part = [preset, str(args.slides), str(args.repeat), str(readers), str(planners)]
    command = [*pinned, sys.executable, "-m", "benchmarks.budget", "--part", *part]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row | {"tiles_per_s": row["tiles"] / row["seconds"]}


def name_of(setting: Setting) -> str:
    return "{} read, {} plan, {} encode".format(*setting)


def sweep(preset: str, args: argparse.Namespace) -> Iterator[dict[str, list[Row]]]:
    """Every setting once per round, the automatic one too; what was found so far, after each round."""
    rivals: dict[str, Callable[[], Row]] = {AUTOMATIC: partial(run, preset, args, None)}
    for setting in itertools.product(THREADS, THREADS, THREADS) if args.all else args.settings:
        rivals[name_of(setting)] = partial(run, preset, args, setting)
    rows: dict[str, list[Row]] = {name: [] for name in rivals}
    for number in range(args.rounds):
        for name, rival in rivals.items():
            rows[name].append(rival())
            print(
                f"  round {number + 1}: {name:<26} {rows[name][-1]['tiles_per_s']:7.1f} tiles/s", flush=True
            )
        yield rows


def compared(rows: dict[str, list[Row]]) -> Row:
    """Median speeds, and the median over rounds of the automatic setting's / the other's."""
    found: Row = {}
    for name, runs in rows.items():
        speeds = [row["tiles_per_s"] for row in runs]
        ratios = [a["tiles_per_s"] / b["tiles_per_s"] for a, b in zip(rows[AUTOMATIC], runs, strict=True)]
        found[name] = {
            "tiles": runs[0]["tiles"],
            "tiles_per_s": statistics.median(speeds),
            "automatic_over_it": statistics.median(ratios),
            "runs": speeds,
            "ratios": ratios,
        }
    return found


def report(found: Row) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in found["machine"]["packages"].items() if v)
    lines = [
        f"# CPU budget, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, {packages}.",
        "Medians; ratios are taken round by round, settings in turns.",
    ]
    for title, part in found["parts"].items():
        lines += [
            "",
            f"## {title}, {part[AUTOMATIC]['tiles']:,} tiles, {len(part[AUTOMATIC]['runs'])} rounds",
            "",
            "| threads | tiles/s | automatic / it | its range |",
            "|---|---|---|---|",
        ]
        for name, row in sorted(part.items(), key=lambda item: -item[1]["tiles_per_s"]):
            spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
            lines.append(
                f"| {name} | {row['tiles_per_s']:,.1f} | {row['automatic_over_it']:.2f} | {spread} |"
            )
    return "\n".join(lines) + "\n"


def a_setting(text: str) -> Setting:
    readers, planners, encoder = map(int, text.split(","))
    return readers, planners, encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--slides", type=Path, help=f"folder with {', '.join(SLIDES)}")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--settings", nargs="*", type=a_setting, default=[], metavar="READ,PLAN,ENCODE")
    parser.add_argument("--all", action="store_true", help=f"every setting of {THREADS} threads")
    parser.add_argument("--repeat", type=int, default=1, help="times the slides of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", help="run on these only, as taskset names them: 0")
    args = parser.parse_args()
    if args.part:
        preset, folder, repeat, readers, planners = args.part
        count, times = PRESETS[preset]
        paths = [Path(folder) / name for name in SLIDES[:count]]
        print(json.dumps(embed(preset, paths, times * int(repeat), int(readers), int(planners))))
        return
    found: dict[str, Any] = {"date": f"{datetime.date.today()}", "machine": machine(), "parts": {}}
    stem = RESULTS / f"budget-{found['date']}"
    if stem.with_suffix(".json").exists():  # parts measured earlier the same day stay
        found["parts"] = json.loads(stem.with_suffix(".json").read_text())["parts"]
    for preset in args.presets:
        where = f"CPU {args.cpus} only" if args.cpus else "all CPUs"
        title = f"{preset}, {where}, {'every setting' if args.all else 'some settings'}"
        for rows in sweep(preset, args):
            found["parts"][title] = compared(rows)
            stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
            stem.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
