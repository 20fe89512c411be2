"""From the start of a process to its first tile: `python -m benchmarks.start --rounds 5`.

Whole processes in turns, each of which embeds one generated slide with random weights: in PyTorch, and with
the engine that the store has (`--precision` says of which). The slide has few tiles: the process is little
more than its start. Seconds of the CPU, over all threads, depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.common import HERE, PRESET, Row, generated, machine

SIZE_PX = 2048


class FirstTile:
    """A reporter that notes when the first tiles are encoded, and the seconds of the CPU until then."""

    def __init__(self) -> None:
        self.found: Row = {}

    def emit(self, event: object) -> None:
        if type(event).__name__ == "TilesEncoded" and not self.found:
            self.found = {"first_tile_at": time.monotonic(), "first_tile_cpu_s": time.process_time()}

    def close(self) -> None:
        pass


def embed(slide: str, preset: str, engine: str, precision: str, folder: str) -> Row:
    """What `slide2vec embed` does, in this process."""
    from slide2vec import ExecutionOptions, Model, Pipeline
    from slide2vec.progress import activate_progress_reporter

    model = Model.from_preset(preset, weights="random", precision=precision)
    execution = ExecutionOptions(output_dir=Path(folder), engine=engine)
    first = FirstTile()
    with activate_progress_reporter(first):
        Pipeline(model=model, execution=execution).run(slides=[slide])
    return {**first.found, "runs_on": model.engine_in_words(execution)}


def whole_process(slide: Path, preset: str, engine: str, precision: str) -> Row:
    """One process: seconds until its first tile and until it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.start", "--child", str(slide), preset, engine, precision]
        before, cpu = time.monotonic(), children_cpu_s()
        done = subprocess.run([*command, folder], capture_output=True, text=True, cwd=HERE.parent)
        seconds = time.monotonic() - before
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    found["first_tile_s"] = found.pop("first_tile_at") - before
    return found | {"process_s": seconds, "process_cpu_s": children_cpu_s() - cpu}


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def imported(code: str) -> Row:
    before, cpu = time.monotonic(), children_cpu_s()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)
    return {"process_s": time.monotonic() - before, "process_cpu_s": children_cpu_s() - cpu}


def medians(runs: list[Row]) -> Row:
    """The median of every figure, and what the first run says in words."""
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--engines", nargs="+", default=["torch", "auto"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=5, metavar="ARG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(embed(*args.child)))
        return
    slide = generated(args.folder, SIZE_PX)
    pieces = {
        "import torch": partial(imported, "import torch"),
        "import timm, by itself": partial(imported, "import timm"),
        "import timm, by slide2vec": partial(imported, "import slide2vec.encoders.timm"),
    }
    pieces |= {
        f"embed, engine {engine}": partial(whole_process, slide, args.preset, engine, args.precision)
        for engine in args.engines
    }
    rows: dict[str, list[Row]] = {name: [] for name in pieces}
    for _ in range(args.rounds):
        for name, run in pieces.items():
            rows[name].append(run())
    found = {name: medians(runs) for name, runs in rows.items()}
    for name, row in found.items():
        figures = ", ".join(f"{key} {value:.2f}" for key, value in row.items() if isinstance(value, float))
        print(f"{name:<28} {figures} {row.get('runs_on', '')}", flush=True)
    print(json.dumps({"machine": machine(), "load": os.getloadavg(), "medians": found, "runs": rows}))


if __name__ == "__main__":
    main()
