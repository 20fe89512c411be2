"""The GPU's stream, station by station and end to end, against what peers do; see README.md.

    python -m benchmarks.gpu [--presets virchow2 prost40m] [--size 24000] [--rounds 3] [--quick]

Parts that need a package that is not installed are reported as not run. `--device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, generated, installed
from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.cpus import job_cpus
from slide2vec.errors import Slide2VecError
from slide2vec.prepare import choose_preparer
from slide2vec.progress import NullReporter, RunFinished, RunSummary, activate_progress_reporter
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, plan_slide
from slide2vec.stream.decode_paths import DeviceTransfer

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

Row = dict[str, Any]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def measured(device: torch.device, row: Row) -> Iterator[None]:
    """Adds seconds, the share of the host's CPUs, and of the time that the GPU was busy."""
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
    return plan_slide(Slide(sample_id="s", image_path=slide), config)


def decode(args: argparse.Namespace) -> dict[str, Row]:
    """Every tile of the slide into the device's memory, by each decode path."""
    rows = {}
    for decode_path in ("raw + nvimgcodec", "cucim", "uploaded"):
        uploaded = decode_path == "uploaded"
        transfer = DeviceTransfer(args.device, not uploaded and "auto", () if uploaded else (decode_path,))
        plan = transfer.bind(planned(args.slide))
        if plan.decode_path not in (f"{decode_path} on the device", f"{plan.source.backend}, {decode_path}"):
            rows[decode_path] = {"not_run": f"left for {plan.decode_path}, or not installed; see the log"}
            continue
        row = rows[decode_path] = {"tiles": len(plan.tiling)}
        with measured(args.device, row):
            _place_all(plan, args.device)
        plan.source.close()
    return rows


def _place_all(plan: SlidePlan, device: torch.device) -> None:
    """With the threads that a stream would have."""
    from concurrent.futures import ThreadPoolExecutor

    def place(number: int) -> None:
        count = len(plan.source.blocks[number])
        tiles = torch.empty((count, TILE_PX, TILE_PX, 3), dtype=torch.uint8, device=device)
        plan.source.place(number, plan.source.fetch(number), list(tiles))

    with ThreadPoolExecutor(job_cpus()) as pool:
        list(pool.map(place, range(len(plan.source.blocks))))


def prepare(args: argparse.Namespace) -> dict[str, Row]:
    """Tiles in the device's memory to the encoder's input, by each preparer."""
    transform = Model.from_preset(args.presets[-1], weights="random", device="cpu").recipe.transform
    rows: dict[str, Row] = {}
    for side in (transform.resize, transform.resize * 8 // 7):
        tiles = torch.randint(0, 256, (64, side, side, 3), dtype=torch.uint8, device=args.device)
        for name in ("torch", "dali", "triton"):
            row = rows[f"{name}, {side} px"] = {}
            try:
                preparer = choose_preparer(name, transform, args.device, "float32_nchw", side)
            except Slide2VecError as error:
                row["not_run"] = str(error)
                continue
            preparer.prepare(tiles)
            row["tiles"] = 64 * args.repeat
            with measured(args.device, row):
                for _ in range(args.repeat):
                    preparer.prepare(tiles)
    return rows


def encode(args: argparse.Namespace, model: Model, batch_size: int) -> Row:
    """The engine alone, on tensors in the device's memory: what all else is compared with."""
    engine = model._tile_embedder.select(ExecutionOptions()).engine
    crop = model.recipe.transform.crop
    shape = (batch_size, crop, crop, 3) if engine.layout == "uint8_nhwc" else (batch_size, 3, crop, crop)
    dtype = torch.uint8 if engine.layout == "uint8_nhwc" else torch.float32
    pixels = torch.zeros(shape, dtype=dtype, device=args.device)
    pixels.random_(0, 255) if dtype is torch.uint8 else pixels.normal_()
    for _ in range(3):
        engine.run(pixels)
    row: Row = {"tiles": batch_size * args.repeat}
    with measured(args.device, row):
        for _ in range(args.repeat):
            engine.run(pixels)
    return row


class Listener(NullReporter):
    """Keeps the summary."""

    summary: RunSummary | None = None

    def emit(self, event: Any) -> None:
        if isinstance(event, RunFinished):
            self.summary = event.summary


def end_to_end(args: argparse.Namespace, model: Model, batch_size: int) -> Row:
    """`Model.iter_slides` over the slide, several times."""
    slides = [{"sample_id": str(number), "image_path": args.slide} for number in range(args.slides)]
    config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=TILE_PX)
    listener, row = Listener(), {}
    with activate_progress_reporter(listener), measured(args.device, row):
        outcomes = list(model.iter_slides(slides, config, ExecutionOptions(batch_size=batch_size)))
    row["tiles"] = sum(outcome.embedded.num_tiles for outcome in outcomes if outcome.embedded)
    row["summary"] = str(listener.summary)
    return row


class PerTile(torch.utils.data.Dataset[torch.Tensor]):
    """One OpenSlide read, Pillow resize and transform per tile: what peers do."""

    def __init__(self, path: Path, plan: SlidePlan, transform: Any) -> None:
        self._path, self._tiling, self._transform, self._slide = path, plan.tiling, transform, None

    def __len__(self) -> int:
        return len(self._tiling)

    def __getitem__(self, tile: int) -> torch.Tensor:
        import openslide
        from PIL import Image

        if self._slide is None:
            self._slide = openslide.OpenSlide(self._path)
        geometry = self._tiling.geometry
        corner = int(self._tiling.x[tile]), int(self._tiling.y[tile])
        size = geometry.read_tile_size_px
        image = self._slide.read_region(corner, geometry.read_level, (size, size)).convert("RGB")
        image = image.resize((self._transform.crop, self._transform.crop), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (self._transform.mean, self._transform.std))
        return (pixels - mean) / std


def data_loader(args: argparse.Namespace, model: Model, batch_size: int) -> Row:
    """A DataLoader over single tiles, feeding the same engine."""
    plan = planned(args.slide)
    plan.source.close()
    data = PerTile(args.slide, plan, model.recipe.transform)
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch_size, num_workers=job_cpus(), pin_memory=args.device.type == "cuda"
    )
    encoder = model._tile_embedder.select(ExecutionOptions()).engine
    if encoder.layout != "float32_nchw":
        return {"not_run": "the engine normalises by itself, which a peer's loader does not expect"}
    row: Row = {"tiles": len(data)}
    with measured(args.device, row):
        for pixels in loader:
            encoder.run(pixels.to(args.device, non_blocking=True)).cpu()
    return row


def of_preset(args: argparse.Namespace, preset: str) -> dict[str, Row]:
    """Engine alone, end to end and the peers' way, in turns; each against the engine of its round."""
    precision = "fp32" if args.device.type == "cpu" else "bf16"
    model = Model.from_preset(preset, weights="random", device=args.device, precision=precision)
    batch_size = args.batch_size
    parts: dict[str, Callable[..., Row]] = {
        "encode": encode,
        "end to end": end_to_end,
        "OpenSlide DataLoader": data_loader,
    }
    rounds = [
        {name: part(args, model, batch_size) for name, part in parts.items()} for _ in range(args.rounds)
    ]
    return {name: _median([found[name] for found in rounds], rounds) for name in parts}


def _median(rows: list[Row], rounds: list[dict[str, Row]]) -> Row:
    if "not_run" in rows[0]:
        return rows[0]
    speeds = [row["tiles"] / row["seconds"] for row in rows]
    alone = [found["encode"]["tiles"] / found["encode"]["seconds"] for found in rounds]
    shares = [speed / encoder for speed, encoder in zip(speeds, alone, strict=True)]
    middle = dict(rows[speeds.index(statistics.median_low(speeds))])
    return {**middle, "runs": speeds, "share_of_encoder": statistics.median(shares)}


def report(found: Row) -> str:
    lines = [f"# GPU benchmark, {found['date']}", "", f"{found['gpu']}, {found['cpus']} CPUs, "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
    for name, rows in found["parts"].items():
        lines += ["", f"## {name}", "", "| what | tiles/s | of the encoder alone | GPU busy | host CPU |"]
        lines += ["|---|---|---|---|---|", *(_line(what, row) for what, row in rows.items())]
        lines += [f"\n{row['summary']}" for row in rows.values() if "summary" in row]
    return "\n".join(lines) + "\n"


def _line(what: str, row: Row) -> str:
    if "not_run" in row:
        return f"| {what} | not run: {row['not_run']} | | | |"
    share, busy = row.get("share_of_encoder"), row.get("gpu_utilisation")
    return (
        f"| {what} | {row['tiles'] / row['seconds']:,.0f} | {f'{share:.2f}' if share else ''} | "
        f"{f'{busy:.0%}' if busy is not None else 'not measured'} | {row['host_cpu_share']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", nargs="+", default=["virchow2", "prost40m"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slides", type=int, default=3, help="times that the slide is embedded in a round")
    parser.add_argument("--repeat", type=int, default=50, help="batches that prepare and encode measure")
    parser.add_argument("--size", type=int, default=24_000, help="side of the generated slide, px")
    parser.add_argument("--quick", action="store_true", help="a small slide, one round, the smaller encoder")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    args = parser.parse_args()
    if args.quick:
        args.presets, args.rounds, args.slides, args.repeat, args.size = ["prost40m"], 1, 1, 5, 6144
    args.device = torch.device(args.device)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.slide = generated(args.work_dir, args.size)
    cuda = args.device.type == "cuda"
    found: Row = {
        "date": f"{datetime.date.today()}",
        "gpu": torch.cuda.get_device_name(args.device) if cuda else "no GPU (a trial of the script)",
        "cpus": job_cpus(),
        "packages": {name: installed(name) for name in PACKAGES},
        "parts": {"decode": decode(args), "prepare": prepare(args)},
    }
    for preset in args.presets:
        found["parts"][preset] = of_preset(args, preset)
    print(report(found))
    if cuda:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"gpu-{found['date']}"
        stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        stem.with_suffix(".md").write_text(report(found))


if __name__ == "__main__":
    main()
