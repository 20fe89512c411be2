"""Compiled engines against PyTorch, in turns: `python -m benchmarks.engines`.

- runtimes: the encoder alone, runtimes x precisions x batch sizes (as `slide2vec bench`): tiles/s,
  milliseconds per batch, memory, cosine.
- layouts: normalisation inside the engine or before it.
- end: `Model.embed_slides` over a generated slide, with PyTorch and with each engine.

Writes `results/engines-<date>.{json,md,png}`. Engines are built into a store of its own.
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
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import HERE, PRESET, RESULTS, Row, child, compared, generated, in_turns, machine
from slide2vec.runtime.base import Layout

PARTS = ("runtimes", "end", "layouts")
ENGINES = (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"))
COLOURS = {
    "torch": (150, 150, 150),
    "openvino": (0, 113, 178),
    "inductor": (213, 94, 0),
    "tensorrt": (0, 158, 115),
}


def runtimes(args: argparse.Namespace) -> list[Row]:
    """Rows of `slide2vec bench`."""
    command = [
        sys.executable,
        "-m",
        "slide2vec",
        "bench",
        "--preset",
        args.preset,
        "--weights",
        "random",
        "--json",
    ]
    command += [word for size in args.batch_sizes for word in ("--batch-size", str(size))]
    command += ["--rounds", str(args.rounds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    rows: list[Row] = json.loads(done.stdout)
    return rows


def end_to_end(args: argparse.Namespace) -> Row:
    """The whole stream; PyTorch in fp32 is the rival."""

    def one(engine: str, precision: str) -> Row:
        options = ["--engine", engine, "--precision", precision, "--batch-size", "8"]
        return child(sys.executable, "-m", "benchmarks.parts", "encode", str(args.slide), *options)

    rivals = {f"{e} {p}": (lambda e=e, p=p: one(e, p)) for e, p in ENGINES}
    rows = in_turns(rivals, args.rounds)
    found = compared(rows, "torch fp32")
    for name, runs in rows.items():
        over = [b["tiles_per_s"] / a["tiles_per_s"] for a, b in zip(rows["torch fp32"], runs, strict=True)]
        found[name] |= {
            "over_torch_fp32": sorted(over)[len(over) // 2],
            "peak_mb": max(r["peak_mb"] for r in runs),
        }
        found[name].pop("ours_over_it", None)
    return found


def layouts(args: argparse.Namespace) -> list[Row]:
    """OpenVINO with the normalisation inside the engine and before it, preparing counted, in turns."""
    from slide2vec import Model
    from slide2vec.compile import BuildOptions, EngineStore, build_engine
    from slide2vec.compile.comparison_tiles import tissue_pixels
    from slide2vec.prepare.torch_preparer import TorchPreparer
    from slide2vec.runtime.loading import load_engine

    model = Model.from_preset(args.preset, weights="random", device="cpu")
    tiles = tissue_pixels(model.recipe, 8)
    steps: dict[tuple[str, Layout], Callable[[], object]] = {}
    for precision in ("fp32", "bf16"):
        for layout in get_args(Layout):
            options = BuildOptions(runtime="openvino", precision=precision, layout=layout)
            built = build_engine(
                model.encoder, model.recipe, model.variant, model.device, options, store=EngineStore()
            )
            engine = load_engine(built.directory, model.device)
            preparer = TorchPreparer(model.recipe.transform, model.device, layout)
            steps[precision, layout] = lambda e=engine, p=preparer: e.run(p.prepare(tiles))
            steps[precision, layout]()
    seconds: dict[tuple[str, Layout], list[float]] = {key: [] for key in steps}
    for _ in range(5 * args.rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    return [
        {"precision": key[0], "layout": key[1], "tiles_per_s": len(tiles) / statistics.median(found)}
        for key, found in seconds.items()
    ]


def report(found: Row) -> str:
    packages = ", ".join(
        f"{name} {number}" for name, number in found["machine"]["packages"].items() if number
    )
    lines = [
        f"# Engines, {found['preset']} (random weights), {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, {packages}",
        "",
        "Medians over the rounds; ratios to PyTorch in fp32 at the same batch size, taken round by round.",
    ]
    if "runtimes" in found:
        lines += ["", "## The encoder alone", ""]
        lines += [
            "| runs in | batch | tiles/s | times torch fp32 | ms a batch | least cosine | peak MB | start s |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in found["runtimes"]:
            lines.append(
                f"| {row['runtime']} {row['precision']} | {row['batch_size']} | {row['tiles_per_s']:.1f} | "
                f"{row['times_torch_fp32']:.2f} | {row['ms_per_batch']:.0f} | {row['min_cosine']:.6f} | "
                f"{row['peak_mb']} | {row['start_s']} |"
            )
        lines += ["", f"![tiles/s](engines-{found['date']}.png)"]
    if "end to end" in found:
        lines += ["", "## End to end: Model.embed_slides, batches of 8", ""]
        lines += ["| runs in | tiles/s | times PyTorch fp32 | peak MB |", "|---|---|---|---|"]
        for name, row in found["end to end"].items():
            lines.append(
                f"| {name} | {row['tiles_per_s']:.1f} ({row['tiles']:,} tiles) | "
                f"{row['over_torch_fp32']:.2f} | {row['peak_mb']:,.0f} |"
            )
    if "layouts" in found:
        lines += ["", "## Normalisation inside the engine or before it: OpenVINO, batches of 8", ""]
        lines += ["| precision | pixels | tiles/s, preparing included |", "|---|---|---|"]
        for row in found["layouts"]:
            lines.append(f"| {row['precision']} | {row['layout']} | {row['tiles_per_s']:.1f} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Bars of tiles/s, grouped by batch size."""
    font, small = ImageFont.load_default(size=22), ImageFont.load_default(size=18)
    sizes = sorted({row["batch_size"] for row in rows})
    ordered = [row for size in sizes for row in rows if row["batch_size"] == size]
    height = 90 + 30 * len(ordered) + 46 * len(sizes)
    picture = Image.new("RGB", (1100, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((24, 20), title, "black", font=font)
    scale = 640 / max(row["tiles_per_s"] for row in rows)
    y, size = 70, None
    for row in ordered:
        if row["batch_size"] != size:
            size = row["batch_size"]
            y += 12
            draw.text((24, y), f"batch of {size}", (90, 90, 90), font=small)
            y += 32
        width = max(2, round(scale * row["tiles_per_s"]))
        draw.text((40, y), f"{row['runtime']} {row['precision']}", "black", font=small)
        draw.rectangle((220, y + 2, 220 + width, y + 22), fill=COLOURS[row["runtime"]])
        label = f"{row['tiles_per_s']:.1f} tiles/s, {row['times_torch_fp32']:.2f} x"
        draw.text((230 + width, y), label, "black", font=small)
        y += 30
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=12_000, help="side of the generated slide, px")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    args = parser.parse_args()
    os.environ["SLIDE2VEC_ENGINES"] = str(args.work_dir / "engines")
    args.slide = generated(args.work_dir, args.size)
    found: Row = {"date": f"{datetime.date.today()}", "machine": machine(), "preset": args.preset}
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"engines-{found['date']}"
    if "runtimes" in args.parts:
        found["runtimes"] = runtimes(args)
        plot(found["runtimes"], f"{args.preset}: tiles/s by runtime and precision", stem.with_suffix(".png"))
    if "end" in args.parts:
        found["end to end"] = end_to_end(args)
    if "layouts" in args.parts:
        found["layouts"] = layouts(args)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    stem.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
