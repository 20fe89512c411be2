"""The CPU table, by one command:

    python -m benchmarks.cpu_table --slide2vec-python PY --trident-python PY --lazyslide-python PY

Whole processes in turns, each of which embeds one generated slide of 226 tiles with a ViT-S, whose weights
are in a file: ours in PyTorch and with an engine of the store (OpenVINO, fp32 and bf16; built first where
there is none), slide2vec 7.1.4, TRIDENT and LazySlide in environments of their own (those given), and a loop
by hand around OpenVINO over the engine's own files, on tiles that are in memory. "Tiles/s" is that of the
batches after the first, so that no start is in it; a ratio is taken round by round, and its median told.

Environments: `pip install slide2vec==7.1.4`; `pip install lazyslide "pandas<3"` (with pandas 3 it
cannot write its result); TRIDENT from its checkout; `python -m compileall` in each, as pip does. Results go
to `results/cpu-table-<date>.md` and `.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import HERE, PRESET, RESULTS, TILE_PX, Row, generated, machine
from benchmarks.start import build, embed, weights_of, whole_process

#: Side of the slide, whose tissue has 226 tiles.
SIZE_PX = 8832
PRECISIONS = ("fp32", "bf16")
PEERS = {"slide2vec": "slide2vec 7.1.4", "trident": "TRIDENT", "lazyslide": "LazySlide"}


def ours(precision: str) -> str:
    return f"ours, engine {precision}"


def by_hand(precision: str) -> str:
    return f"loop by hand, {precision}"


def loop_by_hand(file: str, precision: str, tiles: int, size: int) -> Row:
    """An engine's file, compiled and run by OpenVINO's own API: as many tiles as a run has, in batches."""
    import numpy as np
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    pixels = np.random.default_rng(0).integers(0, 255, (size, TILE_PX, TILE_PX, 3), np.uint8)
    first = 0.0
    for start in range(0, tiles, size):
        request.infer({0: pixels[: tiles - start]}, share_inputs=True)[0].copy()
        first = first or time.monotonic()
    later = time.monotonic() - first if tiles > size else 0.0
    return {"first_tile_at": first, "later_tiles": max(0, tiles - size), "later_s": later, "tiles": tiles}


def engine_here(preset: str, weights: Path, precision: str) -> tuple[str, str]:
    """The file of the engine that a run with these weights takes, and the batch size of that run."""
    from slide2vec import Model
    from slide2vec.compile.engine_choice import find_engine
    from slide2vec.compile.engine_key import EngineTarget
    from slide2vec.compile.store import EngineStore

    tiles = Model.from_preset(preset, weights=str(weights), device="cpu").tile_encoding
    target = EngineTarget(tiles.recipe, tiles.variant, tiles.device, lambda: tiles.weights_digest)
    found = find_engine(EngineStore(), target, precision, ("openvino",)).matching
    record = found[0].record
    return str(found[0].directory / record.file), str(record.profile.opt)


def competitors(args: argparse.Namespace, slide: Path, weights: Path) -> dict[str, Callable[[], Row]]:
    """Whole processes, by name."""
    from slide2vec.recipes import load_recipe

    own = sys.executable, "-m", "benchmarks.cpu_table", "--child"
    found: dict[str, Callable[[], Row]] = {}
    for engine, precision, name in [
        ("torch", "fp32", "ours, PyTorch fp32"),
        *(("auto", precision, ours(precision)) for precision in PRECISIONS),
    ]:
        found[name] = partial(
            whole_process, *own, "ours", str(slide), args.preset, str(weights), engine, precision
        )
    encoder = load_recipe(args.preset).encoder
    built = encoder.arch, json.dumps(encoder.kwargs)
    if args.slide2vec_python:
        script = args.slide2vec_python, str(HERE / "peer_start.py")
        found[PEERS["slide2vec"]] = partial(
            whole_process, *script, str(slide), args.preset, str(weights), *built
        )
    for tool in ("trident", "lazyslide"):
        if python := getattr(args, f"{tool}_python"):
            script = python, str(HERE / "peer_start_others.py")
            found[PEERS[tool]] = partial(whole_process, *script, tool, str(slide), str(weights), *built)
    tiles = found[ours("fp32")]()["tiles"]  # and the weights are known from here on
    for precision in PRECISIONS:
        file, size = engine_here(args.preset, weights, precision)
        found[by_hand(precision)] = partial(whole_process, *own, "loop", file, precision, str(tiles), size)
    return found


def child(kind: str, *given: str) -> None:
    """Prints what it measured."""
    if kind == "ours":
        embed(*given)
        return
    file, precision, tiles, size, _ = given
    print(json.dumps(loop_by_hand(file, precision, int(tiles), int(size))))


def report(rows: dict[str, list[Row]], load: float, where: Row) -> str:
    """The results as a page."""
    rounds = max(map(len, rows.values()))
    packages = ", ".join(f"{name} {where['packages'][name]}" for name in ("torch", "openvino", "timm"))
    peers = [name for name in PEERS.values() if name in rows]
    lines = [
        f"# The CPU table, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.cpu_table`, {rounds} rounds in turns, medians; {where['cpu']}, "
        f"{where['cpus']} CPUs, Python {where['python']}, {packages}; {load:.1f} processes at work at "
        "the end.",
        "",
        "| | tiles | tiles/s | first tile, s | whole process, s | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        cells = [str(runs[0]["tiles"]), f"{statistics.median(map(tiles_per_s, runs)):.1f}"]
        cells += [f"{median(runs, key):.1f}" for key in ("first_tile_s", "process_s", "process_cpu_s")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", "| ratio, median of rounds | | aim |", "|---|---|---|"]
    for precision, aim, share in (("fp32", "1.2", "0.6"), ("bf16", "3.3", "0.5")):
        mine = rows[ours(precision)]
        loop = ratio(mine, rows[by_hand(precision)], tiles_per_s)
        lines.append(f"| tiles/s, {ours(precision)} / loop by hand | {loop} | 0.97 or more |")
        for peer in peers:
            speed = ratio(mine, rows[peer], tiles_per_s)
            lines.append(f"| tiles/s, {ours(precision)} / {peer} | {speed} | {aim} or more |")
            whole = ratio(mine, rows[peer], lambda run: float(run["process_s"]))
            lines.append(f"| whole process, {ours(precision)} / {peer} | {whole} | {share} or less |")
    return "\n".join([*lines, ""])


def tiles_per_s(run: Row) -> float:
    """Of the batches after the first; NaN where there was one."""
    return float(run["later_tiles"] / run["later_s"]) if run["later_s"] else float("nan")


def median(runs: list[Row], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def ratio(ours: list[Row], theirs: list[Row], figure: Callable[[Row], float]) -> str:
    """Median over the rounds, and all of them."""
    found = sorted(figure(one) / figure(other) for one, other in zip(ours, theirs, strict=True))
    return f"{statistics.median(found):.2f} ({', '.join(f'{each:.2f}' for each in found)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default=PRESET, help="of timm's encoders")
    parser.add_argument("--size", type=int, default=SIZE_PX, help="side of the slide, px")
    for tool, name in PEERS.items():
        parser.add_argument(f"--{tool}-python", help=f"Python of an environment with {name}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs="+", metavar="ARG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    slide, weights = generated(args.folder, args.size), weights_of(args.preset, args.folder)
    for precision in PRECISIONS:
        build(args.preset, weights, precision)
    found = competitors(args, slide, weights)
    rows: dict[str, list[Row]] = {name: [] for name in found}
    for number in range(args.rounds):
        for name, run in found.items():
            rows[name].append(run())
            print(f"  round {number + 1}: {name:<22} {rows[name][-1]}", flush=True)
    load, where = os.getloadavg()[0], machine()
    page = report(rows, load, where)
    print(page)
    path = RESULTS / f"cpu-table-{datetime.date.today()}"
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({"machine": where, "load": load, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
