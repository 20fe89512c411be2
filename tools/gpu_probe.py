"""What a GPU does with this project's decode paths and encoders: pixels, races, speeds, kernels.

    python -m tools.gpu_probe --out probe.json [--presets virchow2 …] [--slide FILE …] [--device cpu]

Every item is kept as soon as it is there, the most telling first; one that fails does not stop the others.
tools/gpu_plan.sh runs this; docs/gpu.md says what the file holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import generated
from benchmarks.gpu import Row, decode, in_a_row, model_of, planned, wait
from slide2vec.compile import BuildOptions, EngineStore, build_engine
from slide2vec.compile.batch_size import batch_size_for
from slide2vec.compile.export_module import torch_engine
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine
from slide2vec.runtime.torch_engine import TorchEngine
from slide2vec.stream import SlidePlan
from slide2vec.stream.decode_paths import DECODE_PATHS, DeviceTransfer

#: Threads that launch small copies beside an encoder, as readers do.
BUSY_THREADS = 8
#: Blocks of a slide that are decoded to find a race.
TURNS = 30
#: What a plan is built for to see whether it runs on a GPU that TensorRT-RTX does not name.
RTX_TARGETS = ("sm80", "sm89", "sm120")
#: Compressed tiles that are decoded at once.
AT_ONCE = (64, 512)


class Findings:
    """A JSON file that is written again after every item."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, dict[str, Any]()

    def keep(self, name: str, find: Callable[[], Any]) -> None:
        """What an item found, or why it failed."""
        start = time.perf_counter()
        try:
            self._found[name] = find()
        except Exception as error:
            self._found[name] = f"FAILED {type(error).__name__}: {error}"[:600]
        text = json.dumps(self._found[name], default=str)
        print(f"[{time.perf_counter() - start:5.1f} s] {name}: {text[:1200]}", flush=True)
        self._path.write_text(json.dumps(self._found, indent=1, default=str) + "\n")


def ceilings(args: argparse.Namespace) -> Row:
    """What this card does at all: bf16 products, copies in its memory."""
    side = 8192 if args.device.type == "cuda" else 256
    left, right = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    products = in_a_row(lambda: left @ right, 1, args)
    source = torch.empty(side * side * 16, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    copies = in_a_row(lambda: target.copy_(source), 1, args)
    return {
        "bf16 TFLOP/s": 2 * side**3 * products["tiles"] / products["seconds"] / 1e12,
        "copy TB/s": 2 * source.numel() * copies["tiles"] / copies["seconds"] / 1e12,
    }


def decoding(args: argparse.Namespace, slide: Path) -> Row:
    """Pixels and tiles/s of each decode path."""
    rows = {}
    for name, row in decode(args, slide):
        rows[name] = row
        if "seconds" in row:
            row["tiles_per_s"] = row["tiles"] / row["seconds"]
    return rows


def races(args: argparse.Namespace, slide: Path) -> Row:
    """Tiles that another stream reads as soon as a decode path's own says that they are there, against the
    same tiles after the device was waited for."""
    return {name: _races(name, args, slide) for name in DECODE_PATHS}


def _races(name: str, args: argparse.Namespace, slide: Path) -> Any:
    transfer = DeviceTransfer(args.device, "auto", (name,))
    plan = transfer.bind(planned(slide))
    if name not in str(plan.decode_path):
        return f"not run: left for {plan.decode_path}"
    early = 0
    for turn in range(TURNS):
        number = turn % len(plan.source.blocks)
        first, last = _twice(plan, number, transfer)
        early += not torch.equal(first, last)
    plan.source.close()
    return {"read too early": early, "of": TURNS}


def _twice(plan: SlidePlan, number: int, transfer: DeviceTransfer) -> tuple[Tensor, Tensor]:
    count = len(plan.source.blocks[number])
    tiles = transfer.allocate((count, 224, 224, 3))
    plan.source.place(number, plan.source.fetch(number), list(tiles))
    written = transfer.stream.record()
    if transfer.device.type != "cuda":
        return tiles.clone(), tiles
    lane = torch.cuda.Stream(transfer.device)
    lane.wait_event(written)
    with torch.cuda.stream(lane):
        first = tiles.clone()
    torch.cuda.synchronize(transfer.device)
    return first, tiles


def encoders(args: argparse.Namespace, preset: str, *, compiled: bool = False) -> Row:
    """A preset's encoder in PyTorch, in each way that it can run: speed, closeness to fp32, kernels;
    compiled by itself, which takes half a minute."""
    embedder = model_of(preset, args.device)._tile_embedder
    recipe, encoder, precision = embedder.recipe, embedder.encoder, embedder.precision
    size = args.batch_size or batch_size_for(recipe.gflops, args.device)
    how: Row = {"device": args.device, "feature_dim": recipe.variants[embedder.variant].dim}
    crop = recipe.transform.crop
    pixels = torch.randn(size, 3, crop, crop, device=args.device)
    few = pixels[:8]
    exact = TorchEngine(encoder, precision="fp32", cuda_graphs=False, **how).run(few)
    typed = partial(torch_engine, encoder, recipe, precision, **how)
    ways: dict[str, Callable[[], Engine]] = {
        "as a run has it": typed,
        "kernel by kernel": partial(typed, cuda_graphs=False),
        "under autocast, kernel by kernel": partial(
            TorchEngine, encoder, precision=precision, cuda_graphs=False, **how
        ),
    }
    if compiled:
        ways = {"blocks compiled": partial(typed, compiled=True)}
    row: Row = {"batch": size, "precision": precision, "GFLOP a tile": recipe.gflops}
    for name, build in ways.items():
        try:
            row[name] = _speeds(build(), pixels, exact, args)
        except Exception as error:  # the next way may do
            row[name] = f"FAILED {type(error).__name__}: {error}"[:300]
        print(f"    {preset}, {name}: {row[name]}", flush=True)
    if args.device.type == "cuda":
        row["kernels"] = _kernels(list(ways.values())[-1 if compiled else 1](), pixels)
    return row


def _speeds(engine: Engine, pixels: Tensor, exact: Tensor, args: argparse.Namespace) -> Row:
    start = time.perf_counter()
    cosine = torch.nn.functional.cosine_similarity(engine.run(pixels)[: len(exact)].float(), exact)
    wait(args.device)
    row: Row = {"first batch, s": round(time.perf_counter() - start, 2), "least cosine": float(cosine.min())}
    row["tiles/s"] = _rate(engine, pixels, args)
    with busy_threads(args.device):
        row[f"tiles/s beside {BUSY_THREADS} busy threads"] = _rate(engine, pixels, args)
    engine.close()
    return row


def _rate(engine: Engine, pixels: Tensor, args: argparse.Namespace) -> float:
    row = in_a_row(lambda: engine.run(pixels), len(pixels), args)
    return round(row["tiles"] / row["seconds"], 1)


@contextmanager
def busy_threads(device: torch.device) -> Iterator[None]:
    """Python threads that launch small copies, each on a stream of its own."""
    stop = threading.Event()

    def work() -> None:
        pixels = torch.zeros(512, 512, 3, dtype=torch.uint8, device=device)
        lane = torch.cuda.Stream(device) if device.type == "cuda" else None
        while not stop.is_set():
            with torch.cuda.stream(lane):
                pixels[3:40, 5:50] = pixels[103:140, 105:150]
            if lane is None:
                stop.wait(0.01)  # a trial on a CPU

    threads = [
        threading.Thread(target=work, daemon=True)
        for _ in range(BUSY_THREADS if device.type == "cuda" else 1)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _kernels(engine: Engine, pixels: Tensor) -> Row:
    """Of one batch: how many, and which take the longest."""
    from torch.profiler import ProfilerActivity, profile

    engine.run(pixels)
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        engine.run(pixels)
        torch.cuda.synchronize()
    rows = sorted(traced.key_averages(), key=lambda each: -each.self_device_time_total)
    return {
        "launches": sum(each.count for each in rows),
        "longest": {each.key[:90]: f"{each.count} x, {each.self_device_time_total} us" for each in rows[:8]},
    }


def back_ends(args: argparse.Namespace, slide: Path) -> Row:
    """nvImageCodec's own decoders over the slide's compressed tiles: which refuses, with which pixels, how
    fast. This decides what `NvimgcodecDecoder` asks for."""
    import cv2
    import numpy as np
    from nvidia import nvimgcodec as library

    jpegs = compressed_tiles(slide, max(AT_ONCE))
    expected = [cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR_RGB) for each in jpegs[:32]]
    kinds = library.BackendKind
    on_gpu = args.device.type == "cuda"
    wanted = [None, kinds.HW_GPU_ONLY, kinds.HYBRID_CPU_GPU, kinds.GPU_ONLY] if on_gpu else [kinds.CPU_ONLY]
    index = (args.device.index or 0) if on_gpu else library.NVIMGCODEC_DEVICE_CPU_ONLY
    params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
    rows: Row = {}
    for kind in wanted:
        chosen = {} if kind is None else {"backends": [library.Backend(kind)]}
        decoder = library.Decoder(device_id=index, options=":fancy_upsampling=1", **chosen)

        def run(batch: list[bytes], by: Any = decoder) -> Any:
            return by.decode([library.CodeStream(each) for each in batch], params=params)

        images = run(jpegs[:32])
        refused = sum(image is None for image in images)
        row: Row = {"refused": refused}
        rows[str(kind)] = row
        found = [np.asarray(image.cpu()) for image in images if image is not None]
        if found and not refused:
            apart = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(found, expected, strict=True)]
            row["mean difference"], row["worst tile"] = sum(apart) / len(apart), max(apart)
            for size in AT_ONCE:
                batch = (jpegs * (size // len(jpegs) + 1))[:size]
                timed = in_a_row(lambda now=batch, by=run: by(now), size, args)
                row[f"JPEG tiles/s, {size} at once"] = round(timed["tiles"] / timed["seconds"])
    return rows


def rtx(args: argparse.Namespace, preset: str) -> Row:
    """A TensorRT-RTX plan that was built for other GPUs, without one: does it run on this, and how fast?"""
    embedder = model_of(preset, args.device)._tile_embedder
    recipe, encoder, variant = embedder.recipe, embedder.encoder, embedder.variant
    size = args.batch_size or batch_size_for(recipe.gflops, args.device)
    options = BuildOptions(runtime="tensorrt-rtx", precision="bf16", batch_size=size, targets=RTX_TARGETS)
    store = EngineStore(args.work_dir / "rtx-engines")
    start = time.perf_counter()
    built = build_engine(encoder, recipe, variant, torch.device("cpu"), options, store=store)
    row: Row = {"for": RTX_TARGETS, "built in, s": round(time.perf_counter() - start, 1), "batch": size}
    try:
        engine = load_engine(built.directory, args.device)
        side = recipe.transform.crop
        shape = (size, side, side, 3) if engine.layout == "uint8_nhwc" else (size, 3, side, side)
        pixels = torch.randint(0, 256, shape, device=args.device)
        pixels = pixels.to(torch.uint8) if engine.layout == "uint8_nhwc" else pixels / 64 - 2
        row["finite"] = bool(engine.run(pixels).isfinite().all())
        row["tiles/s"] = _rate(engine, pixels, args)
    except Exception as error:  # what the library says of this GPU is the finding
        row["does not run"] = f"{type(error).__name__}: {error}"[:600]
    return row


def compressed_tiles(slide: Path, limit: int) -> list[bytes]:
    """JPEG tiles of the slide's first level, each whole."""
    import tifffile

    with tifffile.TiffFile(slide) as tiff:
        page = tiff.pages[0]
        tables, found = page.jpegtables, []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if count and len(found) < limit:
                tiff.filehandle.seek(offset)
                data = tiff.filehandle.read(count)
                found.append(data[:2] + (tables[2:-2] if tables else b"") + data[2:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--presets", nargs="*", default=["virchow2", "prost40m", "uni"])
    parser.add_argument("--slide", type=Path, nargs="+", default=[], help="slides besides the generated one")
    parser.add_argument("--size", type=int, default=12_288, help="side of the generated slide, px")
    parser.add_argument("--batch-size", type=int, help="tiles a forward pass (default: as a run has it)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each figure is measured for, about")
    parser.add_argument("--trial", type=int, default=6, help="calls that tell how long one takes")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "slide2vec-bench")
    parser.add_argument("--rtx", action="store_true", help="TensorRT-RTX, and nothing else")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.rtx:
        findings = Findings(args.out)
        for preset in args.presets:
            findings.keep(f"TensorRT-RTX {preset}", lambda name=preset: rtx(args, name))
        return
    slide, findings = generated(args.work_dir, args.size), Findings(args.out)
    findings.keep("ceilings", lambda: ceilings(args))
    findings.keep(f"decoding {slide.name}", lambda: decoding(args, slide))
    for preset in args.presets:
        findings.keep(f"encoder {preset}", lambda name=preset: encoders(args, name))
    findings.keep("races", lambda: races(args, slide))
    findings.keep("nvImageCodec's back ends", lambda: back_ends(args, slide))
    for other in args.slide:
        findings.keep(f"decoding {other.name}", lambda name=other: decoding(args, name))
    for preset in args.presets if args.device.type == "cuda" else ():  # a CPU's compiler takes a minute
        findings.keep(f"encoder {preset}, compiled", lambda name=preset: encoders(args, name, compiled=True))


if __name__ == "__main__":
    main()
