"""Several encoders over the same slides: read once for all of them, against a run for each; see README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, SPACING_UM, THREADS, NullEngine, Row, child, generated, machine

#: Side of the generated slide and sides of the tiles, px, by what is measured. On the second slide a third of
#: the tiles are in grids that begin at odd px, so that averaged px lie on edges of compressed tiles.
FEEDING = {
    "feeding, 3 encoders of equal tiles": (16000, (224, 224, 224)),
    "feeding, tiles of 224, 256 and 448 px": (16000, (224, 256, 448)),
    "the same, a third of them at odd px": (16002, (224, 256, 448)),
}
#: Presets with random weights: two ViT-S, of patches of 14 and 8 px, and a ViT-B, all of tiles of 224 px.
ENCODERS = ("prost40m", "lunit", "phikon")
#: Side of the generated slide that they embed, px: 191 tiles.
SIDE_PX = 8192


class Untransformed:
    def prepare(self, tiles: Any) -> Any:
        return tiles


def feed(slide: Path, sizes: Sequence[int], repeat: int) -> Row:
    """What feeds encoders that cost nothing, all of them from one reading."""
    from slide2vec import ExecutionOptions, PreprocessingConfig
    from slide2vec.cohort.side_by_side import run_side_by_side
    from slide2vec.progress import NullReporter
    from slide2vec.progress.together import TogetherReporter
    from slide2vec.slides import Slide
    from slide2vec.stream import Planner, Stream
    from slide2vec.stream.shared_slides import Share

    slides = [Slide(sample_id=str(i), image_path=slide) for i in range(repeat)]

    def run(size: int, share: Share | None) -> int:
        config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=size)
        stream = Stream(
            NullEngine(),
            Untransformed(),
            batch_size=32,
            tile_size_px=size,
            readers=THREADS,
            planners=THREADS,
            ahead=4,
            reporter=NullReporter(),
        )
        planner = Planner(config, ExecutionOptions(), share=share)
        return sum(o.embedded.num_tiles for o in stream.run(slides, planner))  # type: ignore[union-attr]

    run(sizes[0], None)  # imports, page cache
    started, cpu = time.perf_counter(), time.process_time()
    if len(sizes) == 1:
        tiles = run(sizes[0], None)
    else:
        names = {f"{number}": size for number, size in enumerate(sizes)}
        tasks = {name: lambda share, size=size: run(size, share) for name, size in names.items()}
        reporter = TogetherReporter(NullReporter(), {name: [] for name in names})
        found = run_side_by_side(tasks, dict.fromkeys(names, slides), ExecutionOptions(), reporter)
        tiles = 0
        for each in found.values():
            if isinstance(each, Exception):
                raise each
            tiles += each
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"tiles": tiles, "seconds": seconds, "cpu_seconds": cpu_seconds}


def embed(slide: Path, presets: Sequence[str], repeat: int) -> Row:
    """Whole embedding with real encoders in PyTorch, loaded and warm before the clock starts."""
    import torch

    from slide2vec import ExecutionOptions, Models, PreprocessingConfig

    torch.set_num_threads(THREADS)
    models = Models.from_presets(presets, weights="random", device="cpu", allow_non_recommended_settings=True)
    slides = [{"sample_id": str(i), "image_path": slide} for i in range(repeat)]
    config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=224)
    execution = ExecutionOptions(engine="torch", build_engine="never")
    for model in models.values():
        model.identity(execution)
        model.tile_encoding.select(execution, 224).engine.run(torch.zeros((1, 3, 224, 224)))
    started, cpu = time.perf_counter(), time.process_time()
    if len(models) == 1:
        (model,) = models.values()
        found = model.embed_slides(slides, config, execution)
    else:
        together = models.embed_slides(slides, config, execution)
        found = [each for results in together.values() for each in results]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"tiles": sum(each.num_tiles for each in found), "seconds": seconds, "cpu_seconds": cpu_seconds}


def measured(kind: str, slide: Path, parts: Sequence[str], repeat: int, rounds: int) -> Row:
    """Seconds of all together, and of one after the other, round by round."""
    tiles: list[int] = []

    def run(*which: str) -> tuple[float, float]:
        command = (sys.executable, "-m", "benchmarks.several", "--part", kind, "--slide", str(slide))
        row = child(*command, "--repeat", str(repeat), "--with", ",".join(which))
        tiles.append(row["tiles"])
        return row["seconds"], row["cpu_seconds"]

    together, alone = [], []
    for _ in range(rounds):
        together.append(run(*parts))
        alone.append([run(part) for part in parts])
        print(f"  together {together[-1]}, alone {alone[-1]} (seconds, CPU seconds)", flush=True)
    row: Row = {"of": list(parts), "tiles": tiles[0]}
    for i, kind in enumerate(("", "cpu_")):
        ratios = [sum(run[i] for run in each) / whole[i] for each, whole in zip(alone, together, strict=True)]
        row |= {
            f"{kind}together_s": [each[i] for each in together],
            f"{kind}alone_s": [[run[i] for run in each] for each in alone],
            f"{kind}alone_over_together": {"median": statistics.median(ratios), "runs": ratios},
        }
    return row


def report(found: Row) -> str:
    lines = [
        f"# Several encoders in one run, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs. Seconds are medians of "
        f"{found['rounds']} rounds; the ratio is the sum of the separate runs over the run together.",
        "",
        "| what | tiles of all | together | one after the other | ratio (least to most) | by CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["parts"].items():
        alone = [statistics.median(column) for column in zip(*row["alone_s"], strict=True)]
        ratio = row["alone_over_together"]
        lines.append(
            f"| {name} | {row['tiles']:,} | {statistics.median(row['together_s']):.1f} s | "
            f"{' + '.join(f'{seconds:.1f}' for seconds in alone)} s | "
            f"**{ratio['median']:.2f}** ({min(ratio['runs']):.2f} to {max(ratio['runs']):.2f}) | "
            f"{row['cpu_alone_over_together']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/slide2vec-bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("feed", "embed"))
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, metavar="PRESET")
    parser.add_argument("--side", type=int, default=SIDE_PX, help="of the slide that they embed, px")
    parser.add_argument("--output", type=Path, help="stem of the two files of results")
    parser.add_argument("--part", choices=("feed", "embed"), help=argparse.SUPPRESS)
    parser.add_argument("--slide", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--with", dest="parts", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        parts = args.parts.split(",")
        if args.part == "feed":
            row = feed(args.slide, [int(part) for part in parts], args.repeat)
        else:
            row = embed(args.slide, parts, args.repeat)
        print(json.dumps(row))
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    found: Row = {
        "date": f"{datetime.date.today()}",
        "machine": machine(),
        "rounds": args.rounds,
        "parts": {},
    }
    if args.only != "embed":
        for name, (side, sizes) in FEEDING.items():
            print(name, flush=True)
            slide = generated(args.work_dir, side)
            found["parts"][name] = measured("feed", slide, [str(size) for size in sizes], 6, args.rounds)
    if args.only != "feed":
        slide, name = generated(args.work_dir, args.side), f"embedding, {', '.join(args.encoders)}"
        print(name, flush=True)
        found["parts"][name] = measured("embed", slide, args.encoders, 1, args.rounds)
    kind = f"-{args.only}" if args.only else ""
    out = args.output or RESULTS / f"several{kind}-{found['date']}"
    out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    out.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
