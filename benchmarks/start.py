"""From the start of a process to its first tile: `python -m benchmarks.start --rounds 5 [--peer-python …]`.

Whole processes of `slide2vec embed` in turns, on one generated slide with weights from a file: in PyTorch,
and with the engine that the store has (of `--precision`; one is built first where there is none), both as
they start for the first time with these weights ("new weights") and later. Beside them slide2vec 7.1.4,
if `--peer-python` names an environment that has it (`peer_start.py`). The slide has few tiles: the
process is little more than its start. Seconds of the CPU, over all threads, depend less on what else the
machine does.

Results go to `results/start-<date>.md` and `.json`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime
import io
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
from typing import Any

from benchmarks.common import HERE, PRESET, RESULTS, Row, generated, machine

SIZE_PX = 2048
#: Figures of a row, and what they are.
FIGURES = {
    "first_tile_s": "first tile, s",
    "first_tile_cpu_s": "CPU s until then",
    "process_s": "whole process, s",
    "process_cpu_s": "CPU s",
}


class FirstTile:
    """A reporter that notes when the first batch is encoded, the seconds of the CPU until then, and the tiles
    and seconds of the batches after it."""

    def __init__(self) -> None:
        from slide2vec.progress import TilesEncoded

        self.found: Row = {}
        self._encoded = TilesEncoded

    def emit(self, event: object) -> None:
        if not isinstance(event, self._encoded):
            return
        now, found = time.monotonic(), self.found
        if not found:
            cpu_s = time.process_time()
            found.update(first_tile_at=now, first_tile_cpu_s=cpu_s, later_tiles=0, later_s=0.0)
            return
        found["later_tiles"] += event.count
        found["later_s"] = now - found["first_tile_at"]

    def close(self) -> None:
        pass


def embed(slide: str, preset: str, weights: str, engine: str, precision: str, folder: str) -> None:
    """`slide2vec embed` as this process, which ends as the command does; its figures are printed then."""
    from slide2vec.__main__ import main as command
    from slide2vec.progress import lines

    first, printed = FirstTile(), io.StringIO()
    lines.LineReporter = lambda *_: first  # type: ignore[assignment, misc]
    given = ["--engine", engine, "--precision", precision, "--output", folder, "--json"]
    sys.argv = ["slide2vec", "embed", slide, "--preset", preset, "--weights", weights, *given]
    atexit.register(_tell, first, printed)
    with contextlib.redirect_stdout(printed):
        command()


def _tell(first: FirstTile, printed: io.StringIO) -> None:
    found = json.loads(printed.getvalue())
    encoder = found["encoder"]
    tiles = sum(made["num_tiles"] for made in found["slides"])
    row = {**first.found, "tiles": tiles, "runs_on": f"{encoder['runtime']}, {encoder['precision']}"}
    print(json.dumps(row), file=sys.__stdout__, flush=True)


def whole_process(*command: str, cache: bool = True) -> Row:
    """One process, which is told a folder to write into: seconds until its first tile and until it has ended.

    Args:
        cache: what earlier processes have found out about weights is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {} if cache else {"XDG_CACHE_HOME": folder}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **own}
        before, cpu = time.monotonic(), children_cpu_s()
        done = subprocess.run(
            [*command, f"{folder}/out"], capture_output=True, text=True, cwd=HERE.parent, env=environment
        )
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


def weights_of(preset: str, folder: Path) -> Path:
    """A file of random weights as the preset publishes them (of timm's encoders), made once."""
    path = folder / f"start-{preset}.safetensors"
    if not path.exists():
        from safetensors.torch import save_file

        from slide2vec import Model

        trunk: Any = Model.from_preset(preset, weights="random", device="cpu").encoder.trunk
        save_file({name: value.contiguous() for name, value in trunk.state_dict().items()}, path)
    return path


def build(preset: str, weights: Path, precision: str) -> None:
    """An engine for this CPU, unless there is one."""
    command = [sys.executable, "-m", "slide2vec", "build-engine", "--preset", preset, "--device", "cpu"]
    given = ["--weights", str(weights), "--precision", precision, "--runtime", "openvino"]
    subprocess.run([*command, *given], check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)


def medians(runs: list[Row]) -> Row:
    """The median of every figure, and what the first run says in words."""
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


def report(found: dict[str, Row], rounds: int, load: float, where: Row) -> str:
    """The results as a page."""
    lines = [
        f"# From the start of a process to its first tile, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.start`, {rounds} rounds in turns, medians; {where['cpu']}, "
        f"{where['cpus']} CPUs, Python {where['python']}, PyTorch {where['packages']['torch']}; "
        f"{load:.1f} processes at work at the end.",
        "",
        f"| | {' | '.join(FIGURES.values())} | tiles | by |",
        f"|---|{'---|' * (len(FIGURES) + 2)}",
    ]
    for name, row in found.items():
        cells = [f"{row[key]:.1f}" if key in row else "" for key in FIGURES]
        said = [str(row.get(key, "")) for key in ("tiles", "runs_on")]
        lines.append(f"| {' | '.join([name, *cells, *said])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default=PRESET, help="of timm's encoders")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--engines", nargs="+", default=["torch", "auto"])
    parser.add_argument("--peer-python", help="Python of an environment with slide2vec 7.1.4")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=6, metavar="ARG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        embed(*args.child)
        return
    found, rows = measure(args)
    load, where = os.getloadavg()[0], machine()
    page = report(found, args.rounds, load, where)
    print(page)
    path = RESULTS / f"start-{datetime.date.today()}"
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    kept = {"machine": where, "load": load, "medians": found, "runs": rows}
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1), encoding="utf-8")


def measure(args: argparse.Namespace) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """Medians, and all runs."""
    from slide2vec.recipes import load_recipe

    slide, weights = generated(args.folder, SIZE_PX), weights_of(args.preset, args.folder)
    if set(args.engines) - {"torch"}:
        build(args.preset, weights, args.precision)
        os.environ.setdefault("SLIDE2VEC_ENGINES", str(engines()))
    pieces = {
        "import torch": partial(imported, "import torch"),
        "import timm, by itself": partial(imported, "import timm"),
        "import timm, by slide2vec": partial(imported, "import slide2vec.encoders.timm"),
    }
    own = sys.executable, "-m", "benchmarks.start", "--child", str(slide), args.preset, str(weights)
    for engine in args.engines:
        ours = partial(whole_process, *own, engine, args.precision)
        pieces |= {f"engine {engine}, new weights": partial(ours, cache=False), f"engine {engine}": ours}
    if args.peer_python:
        encoder = load_recipe(args.preset).encoder
        asked = str(slide), args.preset, str(weights), encoder.arch, json.dumps(encoder.kwargs)
        peer = args.peer_python, str(HERE / "peer_start.py"), *asked
        pieces["slide2vec 7.1.4"] = partial(whole_process, *peer)
    for engine in args.engines:
        whole_process(*own, engine, args.precision)  # its weights are known from here on
    rows: dict[str, list[Row]] = {name: [] for name in pieces}
    for number in range(args.rounds):
        for name, run in pieces.items():
            rows[name].append(run())
            print(f"  round {number + 1}: {name:<28} {rows[name][-1]}", flush=True)
    return {name: medians(runs) for name, runs in rows.items()}, rows


def engines() -> Path:
    from slide2vec.compile.store import default_root

    return default_root()


if __name__ == "__main__":
    main()
