"""How well tissue is found: generated slides whose tissue is known, our methods and other tools', side by
side.

    python -m benchmarks.tissue --folder FOLDER --peer-python peer/bin/python --trident CHECKOUT

`--networks hest=/models/ grandqc=` has learned methods beside them, by who has their weights ("random" shows
that they run, and nothing else).

Seeds 0 to 19 are for this; method auto was made on seeds from 100. Slides, masks and truth stay in the
folder, so that a second run is quick. Truth: blurred and folded tissue is tissue, pen is not, even over
tissue; pixels of outlines are ignored; all at 8 µm/px. Results and contact sheets go to results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.common import HERE, RESULTS, Row, machine
from slide2vec.choices import learned_methods
from slide2vec.config import SegmentationConfig
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
from slide2vec.synthetic.thumbnails import CASES, THUMBNAIL_SPACING_UM, make_thumbnail
from slide2vec.tiling.segment import segment_tissue
from slide2vec.tiling.tissue_methods import chosen

Mask = NDArray[np.bool_]

OURS = ("auto", "hsv", "otsu")
PEERS = {"trident": "TRIDENT's otsu", "lazyslide": "LazySlide"}
#: Side of a tile, px of 8 µm: 256 px at 0.5 µm/px. A tile is kept from so much tissue, as slide2vec's
#: settings say.
TILE_PX, KEPT_FROM = 16, 0.1
#: Files have a level of 8 and one of 16 µm/px, which is what HS2P's downsample of 64 is on a slide of 0.25
#: µm/px.
DOWNSAMPLE = 2.0


class Slide(NamedTuple):
    """A generated slide and its truth."""

    case: str
    seed: int
    path: Path
    tissue: Mask
    ignored: Mask

    @property
    def pixels(self) -> NDArray[np.uint8]:
        import tifffile

        return np.asarray(tifffile.imread(self.path, level=0))


def slides(folder: Path, cases: Iterable[str], seeds: int) -> list[Slide]:
    """The slides, drawn where they are not yet there."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for case in cases:
        for seed in range(seeds):
            path, truth = folder / f"{case}-{seed}.tif", folder / f"{case}-{seed}.npz"
            if not truth.exists():
                drawn = make_thumbnail(case, seed)
                _write(path, drawn.pixels)
                np.savez_compressed(truth, tissue=drawn.tissue, ignored=drawn.ignored)
            known = np.load(truth)
            made.append(Slide(case, seed, path, known["tissue"], known["ignored"]))
        print(f"{case}: {seeds} slides", flush=True)
    return made


def _write(path: Path, pixels: NDArray[np.uint8]) -> None:
    """A pyramid of two levels, lossless."""
    import tifffile

    half = cv2.resize(pixels, None, fx=1 / DOWNSAMPLE, fy=1 / DOWNSAMPLE, interpolation=cv2.INTER_AREA)
    with tifffile.TiffWriter(path) as file:
        for level, subifds in ((pixels, 1), (half, 0)):
            per_cm = 1e4 / THUMBNAIL_SPACING_UM * len(level) / len(pixels)
            file.write(
                level,
                tile=(256, 256),
                compression="zlib",
                photometric="rgb",
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=0 if subifds else 1,
            )


def found_by_us(slide: Slide, method: str, weights: str | None = None) -> tuple[Mask, float]:
    """The mask of a method of ours at 8 µm/px, and its CPU seconds, the reading included."""
    if method in learned_methods():
        config = SegmentationConfig(method=method, weights=weights, device="cpu")
        chosen(config)  # loaded once, and not counted
    else:
        downsample = 64.0 if method == "auto" else DOWNSAMPLE
        config = SegmentationConfig(method=method, downsample=downsample)
    with open_slide(as_slide(slide.path, THUMBNAIL_SPACING_UM)) as reader:
        begun = time.process_time()
        mask = segment_tissue(reader, slide.path.stem, THUMBNAIL_SPACING_UM, config).mask
        seconds = time.process_time() - begun
    return _at_8_um(mask, slide), seconds


def found_by_peer(tool: str, folder: Path, python: str, trident: Path | None) -> Row:
    """Masks of another tool, in a folder of its own; seconds and failures by slide."""
    masks = folder / tool
    command = [python, str(HERE / "tissue_peers.py"), tool, str(folder), str(masks)]
    command += ["--trident", str(trident)] if trident else []
    print(f"{tool} …", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-3000:]}")
    row: Row = json.loads((masks / "seconds.json").read_text())
    return row


def _at_8_um(mask: NDArray[Any], slide: Slide) -> Mask:
    size = slide.tissue.shape[::-1]
    return np.asarray(cv2.resize((mask > 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)


def scores(mask: Mask, slide: Slide) -> Row:
    """Intersection over union, share of the tissue that was missed, share of the kept tiles without
    tissue."""
    counted = ~slide.ignored
    both, either = mask & slide.tissue & counted, (mask | slide.tissue) & counted
    truth = slide.tissue & counted
    kept = _tiles(mask).mean((1, 3)) >= KEPT_FROM
    false = kept & ~_tiles(slide.tissue).any((1, 3))
    return {
        "iou": both.sum() / max(1, either.sum()),
        "missed": (truth & ~mask).sum() / max(1, truth.sum()),
        "false_tiles": false.sum() / max(1, kept.sum()),
    }


def _tiles(mask: Mask) -> Mask:
    height, width = (side // TILE_PX for side in mask.shape)
    return mask[: height * TILE_PX, : width * TILE_PX].reshape(height, TILE_PX, width, TILE_PX)


# results --------------------------------------------------------------------------------------------


def summary(rows: list[Row], methods: list[str]) -> list[str]:
    lines = [
        "| case | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [_cell([row for row in rows if row["case"] == case and row["method"] == m]) for m in methods]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def _cell(rows: list[Row]) -> str:
    ious = [row["iou"] for row in rows]
    missed, false = median(row["missed"] for row in rows), max(row["false_tiles"] for row in rows)
    return f"{median(ious):.2f} ({min(ious):.2f}); {missed:.0%}; {false:.0%}"


def _report(rows: list[Row], methods: list[str], failed: Row, seeds: int, stem: str) -> str:
    times = {m: median(row["seconds"] for row in rows if row["method"] == m) for m in methods}
    worst = sorted((row for row in rows if row["method"] == "auto"), key=lambda row: row["iou"])[:8]
    above = [row for row in rows if row["method"] == "auto" and row["false_tiles"] > 0.05]
    lines = [
        "# Finding tissue",
        "",
        f"`python -m benchmarks.tissue`, {date.today()}: {seeds} generated slides of each case (seeds 0 to "
        f"{seeds - 1}; method auto was made on seeds from 100), 7.2 x 5.6 mm, scored at 8 µm/px. hsv and "
        "otsu look at 16 µm/px, as by default on a slide of 0.25 µm/px; other tools run with their defaults.",
        "",
        "Intersection over union: median (least); tissue that is missed: median; kept tiles that hold no "
        "tissue: the most on one slide.",
        "",
        *summary(rows, methods),
        "",
        "CPU time per slide, reading included (median): "
        + ", ".join(f"{m} {seconds * 1000:.0f} ms" for m, seconds in times.items())
        + ".",
        "",
        f"Slides with more than 5 % false tiles by auto: {len(above)} of "
        f"{sum(row['method'] == 'auto' for row in rows)}"
        + "".join(f"; {row['case']} {row['seed']}: {row['false_tiles']:.1%}" for row in above)
        + ".",
        "Least overlap by auto: "
        + ", ".join(f"{r['case']} {r['seed']} ({r['iou']:.2f})" for r in worst)
        + ".",
        "",
        *[f"{tool} failed on {len(names)} slides: {names}" for tool, names in failed.items() if names],
        f"Contact sheets: [{stem}-1.png]({stem}-1.png), [{stem}-2.png]({stem}-2.png). By row a case; the "
        "slide on which auto is worst, then the one of its median, then other methods on that. Green: truth; "
        "magenta: what was found.",
        "",
        f"{machine()['cpu']}, one thread.",
    ]
    return "\n".join(lines) + "\n"


def contact_sheets(
    made: list[Slide],
    masks: dict[tuple[str, str, int], Mask],
    rows: list[Row],
    methods: list[str],
    stem: Path,
) -> None:
    """Per case: auto's worst slide, its median slide, and the other methods on that."""
    from PIL import Image

    by_name = {(slide.case, slide.seed): slide for slide in made}
    lines = []
    for case in dict.fromkeys(slide.case for slide in made):
        of_auto = sorted(
            (row for row in rows if row["case"] == case and row["method"] == "auto"), key=lambda r: r["iou"]
        )
        chosen = of_auto[0]["seed"], of_auto[len(of_auto) // 2]["seed"]
        cells = [("auto", chosen[0]), *((method, chosen[1]) for method in methods)]
        lines.append(
            np.hstack([_drawn(by_name[case, seed], masks[m, case, seed], f"{case} {m}") for m, seed in cells])
        )
    half = (len(lines) + 1) // 2
    for number, part in ((1, lines[:half]), (2, lines[half:])):
        if part:
            sheet = Image.fromarray(np.vstack(part)).quantize(160)
            sheet.save(stem.with_name(f"{stem.name}-{number}.png"), optimize=True)


def _drawn(slide: Slide, mask: Mask, title: str) -> NDArray[np.uint8]:
    picture = slide.pixels.copy()
    for part, colour, width in ((slide.tissue, (0, 190, 0), 5), (mask, (255, 0, 255), 3)):
        outlines, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, colour, width)
    small = np.asarray(cv2.resize(picture, (270, 210), interpolation=cv2.INTER_AREA), np.uint8)
    cv2.putText(small, title, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (90, 90, 90), 1, cv2.LINE_AA)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for slides and masks: 1 MB each")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--networks",
        nargs="*",
        default=[],
        metavar="METHOD=WEIGHTS",
        help="learned methods; METHOD= of the hub",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes; times are of the CPU")
    parser.add_argument("--peer-python", help="a Python with lazyslide, scikit-image, tifffile and OpenCV")
    parser.add_argument("--trident", type=Path, help="a checkout of mahmoodlab/TRIDENT")
    asked = parser.parse_args()
    cv2.setNumThreads(1)
    made = slides(asked.folder, asked.cases, asked.seeds)
    masks: dict[tuple[str, str, int], Mask] = {}
    rows: list[Row] = []
    failed: Row = {}
    networks = {
        name: weights or None for name, _, weights in (each.partition("=") for each in asked.networks)
    }
    with ProcessPoolExecutor(asked.jobs) as pool:
        for slide, found in zip(made, pool.map(partial(_found_by_ours, networks), made), strict=True):
            for method, (mask, seconds) in found.items():
                masks[method, slide.case, slide.seed] = mask
                rows.append(_row(slide, method, mask, seconds))
    tools = [t for t in PEERS if asked.peer_python and (t != "trident" or asked.trident)]
    for tool in tools:
        done = found_by_peer(tool, asked.folder, asked.peer_python, asked.trident)
        failed[PEERS[tool]] = sorted(done["failed"])
        for slide in made:
            name = slide.path.stem
            file = asked.folder / tool / f"{name}.png"
            empty = np.zeros(slide.tissue.shape, bool)  # a slide that it fails on has no tissue
            mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) > 0 if name in done["seconds"] else empty
            masks[PEERS[tool], slide.case, slide.seed] = mask
            rows.append(_row(slide, PEERS[tool], mask, done["seconds"].get(name, 0.0)))
    methods = [*OURS, *networks, *(PEERS[tool] for tool in tools)]
    stem = RESULTS / f"tissue-{date.today()}"
    contact_sheets(made, masks, rows, methods, stem)
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine(), "rows": rows}, default=float))
    text = _report(rows, methods, failed, asked.seeds, stem.name)
    stem.with_suffix(".md").write_text(text)
    print(text)


def _found_by_ours(networks: Mapping[str, str | None], slide: Slide) -> dict[str, tuple[Mask, float]]:
    cv2.setNumThreads(1)
    asked = {**dict.fromkeys(OURS), **networks}
    return {method: found_by_us(slide, method, weights) for method, weights in asked.items()}


def _row(slide: Slide, method: str, mask: Mask, seconds: float) -> Row:
    given = {name: round(float(value), 4) for name, value in scores(mask, slide).items()}
    return {"case": slide.case, "seed": slide.seed, "method": method, **given, "seconds": round(seconds, 4)}


if __name__ == "__main__":
    main()
