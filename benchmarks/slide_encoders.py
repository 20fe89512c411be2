"""Time and memory of slide encoders over 1,000 to 100,000 tiles; see README.md.

`python -m benchmarks.slide_encoders` writes results/slide-encoders-<date>.md, .json and .png. The time is
that of the CPU on one thread, which on a busy machine is about what it is on an idle one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import sys
import time

from benchmarks.common import RESULTS, Row, child, machine
from benchmarks.growth_plot import growth_plot

PRESETS = ("prism", "gigapath-slide", "moozy-slide", "titan")
COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000)
#: Tiles up to which passes are whole; of larger ones a part is computed, at the same memory.
WHOLE = {"prism": 100_000, "gigapath-slide": 30_000, "moozy-slide": 30_000, "titan": 30_000}
#: Layers of gigapath-slide that such a part has; all are equal.
LAYERS = 2


def embed(preset: str, count: int, layers: int | None = None) -> Row:
    """One slide in this process, with random weights and a square of tiles."""
    import torch

    from slide2vec.encoders.slide import TileBag, build_slide_encoder
    from slide2vec.recipes import load_recipe

    torch.set_num_threads(1)
    recipe = load_recipe(preset)
    kwargs = recipe.encoder.kwargs | ({"depth": layers} if layers else {})
    spec = recipe.encoder.model_copy(update={"kwargs": kwargs})
    recipe = recipe.model_copy(update={"encoder": spec})
    encoder = build_slide_encoder(recipe, recipe.variant(None)[1], "random")
    features = torch.randn(count, kwargs.get("in_dim") or kwargs["feat_dim"])
    at = torch.arange(count)
    side = int(count**0.5) + 1
    bag = TileBag(features, torch.stack([at // side, at % side], dim=1) * 512, 512)
    before = _peak_mb()
    with torch.inference_mode():
        wall, started = time.perf_counter(), time.process_time()
        assert encoder(bag).embedding.isfinite().all()
        seconds, wall = time.process_time() - started, time.perf_counter() - wall
    return {"tiles": count, "seconds": seconds, "wall_s": wall, "peak_mb": _peak_mb(), "before_mb": before}


def part(preset: str, count: int) -> Row:
    """A pass over all tiles in which only some of LongNet's layers, or one block of rows of each attention
    of the others, are computed; the time that all of them take is that of those, times their number."""
    if preset == "gigapath-slide":
        row = embed(preset, count, LAYERS)
        return {**row, "seconds": row["seconds"] * 12 / LAYERS, "measured_s": row["seconds"]}
    from slide2vec.encoders.slide import moozy, titan
    from slide2vec.encoders.slide.alibi import BLOCK_BYTES, alibi_attention
    from slide2vec.encoders.slide.blocks import rows_within

    missing = [0.0]

    def one_block(query, key, value, places, slopes):  # type: ignore[no-untyped-def]
        rows = min(query.shape[1], rows_within(BLOCK_BYTES, 8 * key.shape[1]))
        attended = query.new_zeros(query.shape)
        started = time.process_time()
        attended[:, :rows] = alibi_attention(query[:, :rows], key, value, places, slopes)
        seconds = time.process_time() - started
        missing[0] += seconds * (query.shape[1] / rows - 1)
        return attended

    (titan if preset == "titan" else moozy).alibi_attention = one_block
    row = embed(preset, count)
    return {**row, "seconds": row["seconds"] + missing[0], "measured_s": row["seconds"]}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(preset: str, count: int, whole: int | None) -> Row:
    kind = "part" if count > (whole or WHOLE[preset]) else "embed"
    row = child(sys.executable, "-m", "benchmarks.slide_encoders", "--part", kind, preset, str(count))
    print(f"  {preset}, {count:,} tiles: {figure(row)}", flush=True)
    return row


def figure(row: Row) -> str:
    about = "about " if "measured_s" in row else ""
    return f"{about}{row['seconds']:,.{0 if row['seconds'] >= 100 else 1}f} s, {row['peak_mb'] / 1024:.1f} GB"


def report(found: Row) -> str:
    packages = found["machine"]["packages"]
    counts = sorted({row["tiles"] for rows in found["presets"].values() for row in rows})
    lines = [
        f"# Slide encoders, {found['date']}",
        "",
        f"{found['machine']['cpu']}, one thread, torch {packages['torch']}, fp32, random weights. CPU time "
        "of one pass over a slide's tiles, and the peak memory of the process (weights, tile embeddings and "
        "Python included).",
        "",
        f"| preset | {' | '.join(f'{count:,} tiles' for count in counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for preset, rows in found["presets"].items():
        by_count = {row["tiles"]: figure(row) for row in rows}
        lines.append(f"| `{preset}` | {' | '.join(by_count.get(count, '') for count in counts)} |")
    if any("measured_s" in row for rows in found["presets"].values() for row in rows):
        lines += [
            "",
            "about: a pass over all the tiles, at the same memory, of which a part was computed, and its "
            f"time taken for the rest: {LAYERS} of the 12 equal layers of `gigapath-slide` (the weights of "
            "the others, 0.3 GB, are missing from its memory), one block of rows in each layer's attention "
            "of the others.",
        ]
    lines += [
        "",
        "A whole matrix of the attention biases of `titan` or `moozy-slide` would take 480 GB for 100,000 "
        "tiles (12 heads, fp32).",
        "",
        f"![CPU time and memory over the number of tiles](slide-encoders-{found['date']}.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="tiles")
    parser.add_argument("--whole", type=int, help="tiles up to which passes are whole (as in WHOLE)")
    args = parser.parse_args()
    if args.part:
        kind, preset, count = args.part
        print(json.dumps((part if kind == "part" else embed)(preset, int(count))))
        return
    for preset in args.presets:
        for count in args.counts:
            kept(preset, measured(preset, count, args.whole))


def kept(preset: str, row: Row) -> None:
    """Add a row to the results of the day, in the place of an earlier one of as many tiles."""
    date = f"{datetime.date.today()}"
    path = RESULTS / f"slide-encoders-{date}.json"
    found = json.loads(path.read_text()) if path.exists() else {"date": date, "presets": {}}
    found["machine"] = machine()
    rows = {each["tiles"]: each for each in found["presets"].get(preset, [])} | {row["tiles"]: row}
    found["presets"][preset] = [rows[count] for count in sorted(rows)]
    found["presets"] = {name: found["presets"][name] for name in PRESETS if name in found["presets"]}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    path.with_suffix(".md").write_text(report(found))
    growth_plot(found["presets"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
