"""The CPU path against its rivals, in turns; see README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import HERE, RESULTS, Row, child, compared, configs, generated, in_turns, machine

#: Slides in the stream that feeds, and that its rivals read: what is paid once hardly shows.
SLIDES = 12


def part(name: str, slide: Path, repeat: int = 1) -> Row:
    return child(sys.executable, "-m", "benchmarks.parts", name, str(slide), "--repeat", str(repeat))


def transfer(args: argparse.Namespace) -> Row:
    rivals: dict[str, Callable[[], Row]] = {
        "ours": lambda: part("feed", args.slide, SLIDES),
        "decode each tile once, strictly, into one buffer": lambda: part("decode", args.slide, SLIDES),
        "the same, without a task for each tile": lambda: part("decode_in_lots", args.slide, SLIDES),
        "decode each tile once, not strictly": lambda: part("decode_as_before", args.slide, SLIDES),
        "ours, with cuCIM": lambda: part("feed_cucim", args.slide, SLIDES),
    }
    if args.peer_python:
        folder = coordinates(args.slide)
        peer = str(HERE / "peer_slide2vec.py")
        rivals["slide2vec 7.1.4"] = lambda: child(
            args.peer_python, peer, str(args.slide), str(folder), str(SLIDES)
        )
    return compared(in_turns(rivals, args.rounds), "ours")


def prepare(args: argparse.Namespace) -> Row:
    found: Row = {}
    for side in (224, 256):
        ours, theirs = f"PyTorch, {side} px", f"DALI, {side} px"
        rivals: dict[str, Callable[[], Row]] = {
            ours: lambda side=side: part(f"prepare_torch_{side}", args.slide),  # type: ignore[misc]
            theirs: lambda side=side: part(f"prepare_dali_{side}", args.slide),  # type: ignore[misc]
        }
        found |= compared(in_turns(rivals, args.rounds), ours)
    return found


def coordinates(slide: Path) -> Path:
    """Our coordinate files of the slide, which the peer loads: both feed the same tiles."""
    from slide2vec.slides import Slide
    from slide2vec.stream import plan_slide
    from slide2vec.tiling import write_coordinates

    folder = Path(tempfile.mkdtemp(prefix="coordinates-"))
    plan = plan_slide(Slide(sample_id=slide.stem, image_path=slide), configs())
    plan.source.close()
    write_coordinates(folder, plan.tiling)
    return next(folder.rglob("*.coordinates.npz")).parent


def encode(args: argparse.Namespace) -> Row:
    rivals = {
        "ours": lambda: part("encode", args.slide),
        "bare encoder loop": lambda: part("bare", args.slide),
    }
    return compared(in_turns(rivals, args.rounds), "ours")


def memory(args: argparse.Namespace) -> Row:
    found = {}
    for count in (1, 20):
        row = part("encode", args.small_slide, count)
        found[f"{count} slides"] = {"peak_mb": row["peak_mb"], "tiles": row["tiles"]}
        print(f"  {count} slides: {row['peak_mb']:.0f} MB", flush=True)
    return found


def start(args: argparse.Namespace) -> Row:
    commands = {
        "empty python": [sys.executable, "-c", "pass"],
        "import slide2vec": [sys.executable, "-c", "import slide2vec"],
        "slide2vec --help": [str(Path(sys.executable).parent / "slide2vec"), "--help"],
    }
    found = {}
    for name, command in commands.items():
        seconds = []
        for _ in range(7):
            before = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - before)
        found[name] = {"median_s": statistics.median(seconds), "runs": seconds}
        print(f"  {name}: {statistics.median(seconds):.3f} s", flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "feed": transfer,
    "prepare": prepare,
    "encode": encode,
    "memory": memory,
    "start": start,
}


def report(found: Row) -> str:
    lines = [
        f"# CPU benchmark, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, ",
    ]
    lines[-1] += ", ".join(
        f"{name} {number}" for name, number in found["machine"]["packages"].items() if number
    )
    for name, part_found in found["parts"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| what | figure | ours / it | per CPU second | ours / it | memory | first batch |",
            "|---|---|---|---|---|---|---|",
        ]
        for rival, row in part_found.items():
            ratio, per_cpu = row.get("ours_over_it", {}).get("median"), row.get("ours_over_it_per_cpu_s")
            cells = [rival, figure(row), f"{ratio:.2f}" if ratio else ""]
            cells += [f"{row['tiles_per_cpu_s']:,.0f} tiles" if "tiles_per_cpu_s" in row else ""]
            cells += [f"{per_cpu:.2f}" if per_cpu else ""]
            cells += [f"{row['memory_mb']:,.0f} MB" if "memory_mb" in row else ""]
            cells += [f"after {row['first_batch_s']:.2f} s" if "first_batch_s" in row else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(row: Row) -> str:
    if "tiles_per_s" in row:
        return f"{row['tiles_per_s']:,.1f} tiles/s ({row['tiles']:,} tiles)"
    if "peak_mb" in row:
        return f"{row['peak_mb']:,.0f} MB ({row['tiles']:,} tiles)"
    return f"{row['median_s']:.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=24_000, help="side of the generated slide, px")
    parser.add_argument("--peer-python", help="Python of an environment with slide2vec 7.1.4")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    args = parser.parse_args()
    args.slide, args.small_slide = generated(args.work_dir, args.size), generated(args.work_dir, 6_000)
    found: Row = {
        "date": f"{datetime.date.today()}",
        "machine": machine(),
        "slide_px": args.size,
        "parts": {},
    }
    stem = RESULTS / f"cpu-{found['date']}"
    if stem.with_suffix(".json").exists():  # parts measured earlier the same day stay
        found["parts"] = json.loads(stem.with_suffix(".json").read_text())["parts"]
    for name in args.parts:
        print(f"{name}:", flush=True)
        found["parts"][name] = PARTS[name](args)
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    stem.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
