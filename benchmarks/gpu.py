"""The GPU's stream, station by station and end to end, against what peers do; see README.md.

    python -m benchmarks.gpu [--presets virchow2 uni prost40m] [--slide FILE …] [--quick]

Results are written after every part. What needs a package that is not installed is reported as not run.
`--device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, generated, installed
from benchmarks.gpu_report import report
from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.compile.batch_size import batch_size_for
from slide2vec.cpus import job_cpus
from slide2vec.errors import Slide2VecError
from slide2vec.prepare import choose_preparer
from slide2vec.progress import NullReporter, RunFinished, RunSummary, activate_progress_reporter
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, plan_slide
from slide2vec.stream.decode_paths import DECODE_PATHS, DeviceTransfer

SPACING_UM, TILE_PX = 0.5, 224
PACKAGES = (
    "torch",
    "timm",
    "cucim-cu13",
    "nvidia-nvimgcodec-cu13",
    "nvidia-dali-cuda130",
    "tensorrt",
    "triton",
)
#: Tiles whose pixels are compared with those of the CPU's strict decoder.
COMPARED = 48
#: After so many slides memory is noted.
SLIDES_NOTED = (2, 5, 10, 20)

Row = dict[str, Any]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def measured(device: torch.device, row: Row) -> Iterator[None]:
    """Adds seconds, the share of the host's CPUs, and of the time that the GPU was busy. The device is waited
    for before and after, never between."""
    samples: list[int] = []
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(device, samples, done))
    sampler.start()
    wait(device)
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    try:
        yield
        wait(device)
    finally:
        row["seconds"] = time.perf_counter() - start
        row["host_cpu_share"] = (sum(os.times()[:4]) - cpu) / row["seconds"] / job_cpus()
        done.set()
        sampler.join()
        row["gpu_utilisation"] = statistics.mean(samples) / 100 if samples else None


def _sample(device: torch.device, samples: list[int], done: threading.Event) -> None:
    """NVML's figure, ten times a second; none without nvidia-ml-py."""
    while device.type == "cuda" and not done.wait(0.1):
        try:
            samples.append(torch.cuda.utilization(device))
        except (ModuleNotFoundError, RuntimeError):
            return


def planned(slide: Path) -> SlidePlan:
    config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=TILE_PX)
    return plan_slide(Slide(sample_id=slide.stem, image_path=slide), config)


class Said(logging.Handler):
    """Keeps what the project logs, which says why a decode path was left."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def listening() -> Iterator[Said]:
    said, logger = Said(), logging.getLogger("slide2vec")
    before = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(said)
        logger.setLevel(before)


def decode(args: argparse.Namespace, slide: Path) -> Iterator[tuple[str, Row]]:
    """Every tile of a slide into the device's memory, by each decode path; and how far its pixels are from
    the strict decoder's."""
    expected = placed(planned(slide), torch.device("cpu"), COMPARED)
    for name in (*DECODE_PATHS, "uploaded"):
        yield name, _decoded_by(name, args, slide, expected)


def _decoded_by(name: str, args: argparse.Namespace, slide: Path, expected: torch.Tensor) -> Row:
    with listening() as said:
        try:
            uploaded = name == "uploaded"
            transfer = DeviceTransfer(args.device, False if uploaded else "auto", () if uploaded else (name,))
            plan = transfer.bind(planned(slide))
        except (Slide2VecError, RuntimeError) as error:
            return {"not_run": str(error)}
    if name not in str(plan.decode_path):
        plan.source.close()
        return {"not_run": f"left for {plan.decode_path}: {' '.join(said.messages[-1:])}"}
    row: Row = {"decode_path": plan.decode_path, "tiles": 0}
    found = placed(plan, args.device, COMPARED)
    difference = (found.cpu().int() - expected.int()).abs().float().mean(dim=(1, 2, 3))
    row["mean_difference"], row["worst_tile"] = float(difference.mean()), float(difference.max())
    with measured(args.device, row):
        start = time.perf_counter()
        while not row["tiles"] or time.perf_counter() - start < args.seconds:
            place_all(plan, args.device)
            row["tiles"] += len(plan.tiling)
    row["decoded_by"] = dict(plan.decoded_by())  # as it happened
    plan.source.close()
    return row


def placed(plan: SlidePlan, device: torch.device, limit: int) -> torch.Tensor:
    """The first tiles of a plan, (n, S, S, 3) uint8, in the device's memory."""
    count = min(limit, len(plan.tiling))
    tiles = torch.zeros((count, TILE_PX, TILE_PX, 3), dtype=torch.uint8, device=device)
    spare = torch.zeros_like(tiles[0])
    wait(device)
    for number, block in enumerate(plan.source.blocks):
        targets = [tiles[tile] if tile < count else spare for tile in block]
        if any(tile < count for tile in block):
            data = plan.source.fetch(number)
            on_host = device.type == "cpu" and plan.decode_path is None
            plan.source.place(number, data, [each.numpy() for each in targets] if on_host else targets)
    wait(device)
    return tiles


def place_all(plan: SlidePlan, device: torch.device) -> None:
    """With the threads that a stream would have."""

    def place(number: int) -> None:
        count = len(plan.source.blocks[number])
        tiles = torch.empty((count, TILE_PX, TILE_PX, 3), dtype=torch.uint8, device=device)
        plan.source.place(number, plan.source.fetch(number), list(tiles))

    with ThreadPoolExecutor(job_cpus()) as pool:
        list(pool.map(place, range(len(plan.source.blocks))))


def prepare(args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Tiles in the device's memory to the encoder's input, by each preparer."""
    transform = Model.from_preset(args.presets[-1], weights="random", device="cpu").recipe.transform
    for side in (transform.resize, transform.resize * 8 // 7):
        tiles = torch.randint(0, 256, (64, side, side, 3), dtype=torch.uint8, device=args.device)
        for name in ("torch", "dali", "triton"):
            try:
                preparer = choose_preparer(name, transform, args.device, "float32_nchw", side)
            except Slide2VecError as error:
                yield f"{name}, {side} px", {"not_run": str(error)}
                continue
            yield f"{name}, {side} px", in_a_row(lambda at=tiles, by=preparer: by.prepare(at), 64, args)


def in_a_row(run: Callable[[], Any], tiles: int, args: argparse.Namespace) -> Row:
    """How fast a call is, over and over, for about args.seconds."""
    for _ in range(3):
        run()
    wait(args.device)
    start = time.perf_counter()
    for _ in range(args.trial):
        run()
    wait(args.device)
    count = max(1, round(args.seconds * args.trial / (time.perf_counter() - start)))
    row: Row = {"tiles": tiles * count}
    with measured(args.device, row):
        for _ in range(count):
            run()
    return row


@cache
def model_of(preset: str, device: torch.device) -> Model:
    """Made once: random weights of a large encoder take seconds."""
    precision = "fp32" if device.type == "cpu" else "bf16"
    return Model.from_preset(preset, weights="random", device=device, precision=precision)


def encode(args: argparse.Namespace, model: Model, batch_size: int) -> Row:
    """The engine alone, on tensors in the device's memory: what all else is compared with."""
    engine = model._tile_embedder.select(ExecutionOptions()).engine
    crop = model.recipe.transform.crop
    shape = (batch_size, crop, crop, 3) if engine.layout == "uint8_nhwc" else (batch_size, 3, crop, crop)
    dtype = torch.uint8 if engine.layout == "uint8_nhwc" else torch.float32
    pixels = torch.zeros(shape, dtype=dtype, device=args.device)
    pixels.random_(0, 255) if dtype is torch.uint8 else pixels.normal_()
    return in_a_row(lambda: engine.run(pixels), batch_size, args)


class Listener(NullReporter):
    """Keeps the summary."""

    summary: RunSummary | None = None

    def emit(self, event: Any) -> None:
        if isinstance(event, RunFinished):
            self.summary = event.summary


def embed(args: argparse.Namespace, model: Model, batch_size: int, slide: Path, count: int) -> Row:
    """`Model.iter_slides` over a slide, several times; memory on the way. The speed from the first complete
    slide to the last one is that of a long run."""
    slides = [{"sample_id": str(number), "image_path": slide} for number in range(count)]
    config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=TILE_PX)
    execution = ExecutionOptions(batch_size=batch_size)
    listener, came = Listener(), list[tuple[float, int]]()
    row: Row = {"tiles": 0, "slides": count, "memory_mb": {}}
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    with activate_progress_reporter(listener), measured(args.device, row):
        for number, outcome in enumerate(model.iter_slides(slides, config, execution), 1):
            row["tiles"] += outcome.embedded.num_tiles if outcome.embedded else 0
            came.append((time.perf_counter(), row["tiles"]))
            if number in SLIDES_NOTED:
                row["memory_mb"][number] = memory(args.device)
    (begun, before), (ended, after) = came[0], came[-1]
    if ended > begun:
        row["running_tiles_per_s"] = (after - before) / (ended - begun)
    summary = listener.summary
    row["summary"], row["stations"] = str(summary), asdict(summary)["stations"] if summary else []
    return row


def memory(device: torch.device) -> Row:
    """Peaks so far: of tensors on the device, of this process on the host; MB."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) >> 20
    return found


class PerTile(torch.utils.data.Dataset[torch.Tensor]):
    """One OpenSlide read, Pillow resize and transform per tile: what peers do. Tiles come again and again."""

    def __init__(self, path: Path, plan: SlidePlan, transform: Any, count: int) -> None:
        self._path, self._tiling, self._transform, self._slide = path, plan.tiling, transform, None
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> torch.Tensor:
        import openslide
        from PIL import Image

        if self._slide is None:
            self._slide = openslide.OpenSlide(self._path)
        geometry, tile = self._tiling.geometry, number % len(self._tiling)
        corner = int(self._tiling.x[tile]), int(self._tiling.y[tile])
        size = geometry.read_tile_size_px
        image = self._slide.read_region(corner, geometry.read_level, (size, size)).convert("RGB")
        image = image.resize((self._transform.crop, self._transform.crop), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (self._transform.mean, self._transform.std))
        return (pixels - mean) / std


def data_loader(args: argparse.Namespace, model: Model, batch_size: int, slide: Path) -> Row:
    """A DataLoader over single tiles, feeding the same engine; timed from its first batch on, when its
    workers have started."""
    encoder = model._tile_embedder.select(ExecutionOptions()).engine
    if encoder.layout != "float32_nchw":
        return {"not_run": "the engine normalises by itself, which a peer's loader does not expect"}
    plan = planned(slide)
    plan.source.close()
    data = PerTile(slide, plan, model.recipe.transform, 10**7)
    pinned = args.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        data, batch_size=min(batch_size, 64), num_workers=job_cpus(), pin_memory=pinned
    )
    row: Row = {"tiles": 0}
    batches, features = iter(loader), list[torch.Tensor]()
    encoder.run(next(batches).to(args.device)).cpu()
    with measured(args.device, row):
        start = time.perf_counter()
        while not row["tiles"] or time.perf_counter() - start < args.seconds:
            pixels = next(batches)
            features.append(encoder.run(pixels.to(args.device, non_blocking=True)))
            row["tiles"] += len(pixels)
        torch.cat(features).cpu()
    del batches
    return row


def of_preset(args: argparse.Namespace, preset: str) -> Iterator[tuple[str, Row]]:
    """Engine alone, end to end and the peers' way, in turns; each against the engine of its round."""
    model = model_of(preset, args.device)
    batch_size = args.batch_size or batch_size_for(model.recipe.gflops, args.device)
    tiles = len(planned(args.slides[0]).tiling)
    embed(args, model, batch_size, args.slides[0], 1)  # what is built for the first batch

    def end_to_end(args: argparse.Namespace, model: Model, size: int) -> Row:
        # as long as the others measure, if the encoder sets the pace; from two slides on
        count = max(2, round(args.seconds * rounds[-1]["encode"]["tiles_per_s"] / tiles))
        return embed(args, model, size, args.slides[0], min(count, args.most_slides))

    parts: dict[str, Callable[..., Row]] = {
        "encode": encode,
        "end to end": end_to_end,
        "OpenSlide DataLoader": lambda *how: data_loader(*how, args.slides[0]),
    }
    rounds: list[dict[str, Row]] = []
    for _ in range(args.rounds):
        rounds.append({})
        for name, part in parts.items():
            rounds[-1][name] = with_speed(part(args, model, batch_size))
            done = [found[name] for found in rounds]
            yield name, {**_median(done, rounds), "batch_size": batch_size}
    for slide in args.slides[1:]:
        count = min(20, args.most_slides)
        yield f"end to end, {slide.name}", with_speed(embed(args, model, batch_size, slide, count))
    if args.most_slides >= SLIDES_NOTED[-1]:
        yield "20 slides", with_speed(embed(args, model, batch_size, args.slides[0], SLIDES_NOTED[-1]))


def with_speed(row: Row) -> Row:
    return row if "not_run" in row else {**row, "tiles_per_s": row["tiles"] / row["seconds"]}


def _median(rows: list[Row], rounds: list[dict[str, Row]]) -> Row:
    """The middle one of a part's rounds, with its share of the encoder alone, taken round by round."""
    if "not_run" in rows[0]:
        return rows[0]
    speeds = [row["tiles_per_s"] for row in rows]
    middle = dict(rows[speeds.index(statistics.median_low(speeds))])
    middle["runs"] = speeds
    pairs = list(zip(speeds, rounds, strict=True))
    middle["share_of_encoder"] = statistics.median(s / each["encode"]["tiles_per_s"] for s, each in pairs)
    if "running_tiles_per_s" in middle:
        alone = statistics.median(each["encode"]["tiles_per_s"] for each in rounds)
        middle["running_share_of_encoder"] = middle["running_tiles_per_s"] / alone
    return middle


def run_part(found: Row, name: str, rows: Iterator[tuple[str, Row]], save: Callable[[], None]) -> None:
    """The rows of a part as they come; a failure ends this part only."""
    part = found["parts"].setdefault(name, {})
    try:
        for what, row in rows:
            part[what] = with_speed(row)
            print(f"  {name}, {what}: {part[what].get('tiles_per_s', part[what])}", flush=True)
            save()
    except Exception as error:
        logging.getLogger(__name__).exception("%s", name)
        part["the rest"] = {"not_run": f"{type(error).__name__}: {error}"[:500]}
    save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--presets", nargs="*", default=["virchow2", "uni", "prost40m"])
    parser.add_argument("--parts", nargs="+", default=["decode", "prepare", "presets"])
    parser.add_argument("--slide", type=Path, nargs="+", default=[], help="slides besides the generated one")
    parser.add_argument("--size", type=int, default=24_000, help="side of the generated slide, px")
    parser.add_argument("--batch-size", type=int, help="tiles a forward pass (default: as a run has it)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="that each figure is measured for, about")
    parser.add_argument("--trial", type=int, default=8, help="batches that tell how long one takes")
    parser.add_argument("--most-slides", type=int, default=200, help="in one run")
    parser.add_argument("--quick", action="store_true", help="a small slide, one short round")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    parser.add_argument("--out", type=Path, help="stem of results (default: benchmarks/results/gpu-<date>)")
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.size = 1, 1.0, 6144
    return args


def main() -> None:
    args = arguments()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.slides = [generated(args.work_dir, args.size), *args.slide]
    cuda = args.device.type == "cuda"
    found: Row = {
        "date": f"{datetime.date.today()}",
        "gpu": torch.cuda.get_device_name(args.device) if cuda else "no GPU (a trial of the script)",
        "cpus": job_cpus(),
        "packages": {name: installed(name) for name in PACKAGES},
        "parts": {},
    }
    stem = args.out or (RESULTS / f"gpu-{found['date']}" if cuda else args.work_dir / "gpu-trial")
    stem.parent.mkdir(parents=True, exist_ok=True)
    if args.add and stem.with_suffix(".json").exists():
        found["parts"] = json.loads(stem.with_suffix(".json").read_text())["parts"]

    def save() -> None:
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(report(found))

    if "decode" in args.parts:
        for slide in args.slides:
            run_part(found, f"decode {slide.name}", decode(args, slide), save)
    if "presets" in args.parts:
        for preset in args.presets:
            run_part(found, preset, of_preset(args, preset), save)
    if "prepare" in args.parts:
        run_part(found, "prepare", prepare(args), save)
    print(report(found))


if __name__ == "__main__":
    main()
