"""The measured pieces, each run in a process of its own: `python -m benchmarks.parts PART …`.

Prints one JSON object: tiles, seconds (without start-up), peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import PRESET, THREADS, TILE_PX, NullEngine, configs


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of the block, and those of the CPU: less noisy where others use the machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def transfer(slide: Path, repeat: int, backend: str = "auto") -> dict[str, Any]:
    """Plan, read, cut and resize every tile of so many slides; the encoder's transform is left to `encode`.

    Seconds begin before the stream does; those until the first batch is there are reported apart, too.
    """
    from slide2vec.config import ExecutionOptions
    from slide2vec.progress import NullReporter
    from slide2vec.slides import Slide
    from slide2vec.stream import Planner, Stream, plan_slide

    class Untransformed:
        def prepare(self, tiles: Any) -> Any:
            return tiles

    engine = NullEngine()

    def once(count: int) -> int:
        stream = Stream(
            engine,
            Untransformed(),
            batch_size=32,
            tile_size_px=TILE_PX,
            readers=THREADS,
            planners=THREADS,
            ahead=4,
            reporter=NullReporter(),
        )
        slides = [Slide(sample_id=str(i), image_path=slide) for i in range(count)]
        planner = Planner(config, ExecutionOptions())
        return sum(o.embedded.num_tiles for o in stream.run(slides, planner))  # type: ignore[union-attr]

    config = configs(backend)
    plan = plan_slide(Slide(sample_id="warm-up", image_path=slide), config)  # imports, page cache
    found: dict[str, Any] = {"backend": plan.source.backend}
    plan.source.close()
    started = time.perf_counter()
    with timed(found):
        found["tiles"] = once(repeat)
    return found | {"first_batch_s": (engine.first or started) - started}


def decode(
    slide: Path, repeat: int, *, strict: bool = True, reuse: bool = True, lot: int = 1
) -> dict[str, float]:
    """Decode every JPEG tile that the slide's tiles touch, once, and drop it: the limit of feeding.

    Args:
        strict: as our back end does.
        reuse: into the same memory, as our back end does and of the same alignment; else into memory of its
            own each.
        lot: tiles that a thread decodes per task.
    """
    import os
    import threading

    import numpy as np
    import simplejpeg
    import tifffile

    from slide2vec.readers.codecs import tile_memory
    from slide2vec.slides import Slide
    from slide2vec.stream import plan_slide

    plan = plan_slide(Slide(sample_id="s", image_path=slide), configs())
    plan.source.close()
    side = plan.tiling.geometry.tile_size_lv0
    with tifffile.TiffFile(slide) as file:
        page: Any = file.pages[0]
        (width, height), tables = (page.tilewidth, page.tilelength), page.jpegtables
        across = -(-page.imagewidth // width)
        rows = np.concatenate(
            [[x // width, y // height] for x, y in _touched(plan.tiling, side, width, height)]
        )
        needed = np.unique(rows.reshape(-1, 2), axis=0)
        spans = [
            (page.dataoffsets[c + r * across], page.databytecounts[c + r * across])
            for c, r in needed
            if c < across
        ]
    own = threading.local()

    def buffer() -> Any:
        if reuse and not hasattr(own, "buffer"):
            own.buffer = tile_memory(height, width)
        return own.buffer if reuse else None

    found: dict[str, float] = {"tiles": len(plan.tiling.x) * repeat}
    with slide.open("rb", buffering=0) as raw, ThreadPoolExecutor(THREADS) as pool, timed(found):
        fd = raw.fileno()

        def decode_all(spans: list[tuple[int, int]]) -> None:
            for offset, count in spans:
                data = os.pread(fd, count, offset)
                jpeg = tables[:-2] + data[2:] if tables else data
                simplejpeg.decode_jpeg(jpeg, buffer=buffer(), strict=strict)

        lots = [spans[start : start + lot] for start in range(0, len(spans), lot)]
        for _ in range(repeat):
            list(pool.map(decode_all, lots))
    return found


def _touched(tiling: Any, side: int, width: int, height: int) -> Any:
    for x, y in zip(tiling.x.tolist(), tiling.y.tolist(), strict=True):
        for column in range(x // width, (x + side - 1) // width + 1):
            for row in range(y // height, (y + side - 1) // height + 1):
                yield column * width, row * height


def encode(
    slide: Path, repeat: int, engine: str = "torch", precision: str = "fp32", batch_size: int = 32
) -> dict[str, Any]:
    """The whole stream with a ViT-S; a compiled engine has to be there."""
    import torch

    from slide2vec import ExecutionOptions, Model

    torch.set_num_threads(THREADS)
    model = Model.from_preset(PRESET, weights="random", device="cpu")
    slides = [{"sample_id": str(i), "image_path": slide} for i in range(repeat)]
    options = ExecutionOptions(
        num_workers=THREADS,
        batch_size=batch_size,
        engine=engine,
        precision=precision,
    )
    model.identity(options)  # loads the engine
    start = time.perf_counter()
    results = model.embed_slides(slides, configs(), options)
    return {
        "tiles": sum(r.num_tiles for r in results),
        "seconds": time.perf_counter() - start,
        "encoder": model.engine_in_words(options),
    }


def bare(slide: Path, repeat: int) -> dict[str, float]:
    """The same encoder over random tensors, as many as the slide has tiles."""
    import torch

    from slide2vec import Model
    from slide2vec.slides import Slide
    from slide2vec.stream import plan_slide

    torch.set_num_threads(THREADS)
    encoder = Model.from_preset(PRESET, weights="random", device="cpu").encoder
    plan = plan_slide(Slide(sample_id="s", image_path=slide), configs())
    plan.source.close()
    tiles = len(plan.tiling.x) * repeat
    pixels = torch.randn(32, 3, TILE_PX, TILE_PX)
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, tiles, 32):
            encoder(pixels[: min(32, tiles - first)])
    return {"tiles": tiles, "seconds": time.perf_counter() - start}


def prepare(name: str, side: int) -> Callable[[Path, int], dict[str, float]]:
    """Tiles to the encoder's input, without a resize or with one; seconds of CPU time, in a single thread."""

    def run(_: Path, repeat: int) -> dict[str, float]:
        import torch

        from slide2vec.prepare import choose_preparer
        from slide2vec.recipes import load_recipe

        torch.set_num_threads(1)
        transform = load_recipe(PRESET).transform
        preparer = choose_preparer(name, transform, torch.device("cpu"), "float32_nchw", side)
        tiles = torch.randint(0, 256, (8, side, side, 3), dtype=torch.uint8)
        preparer.prepare(tiles)
        start = time.process_time()
        for _ in range(50 * repeat):
            preparer.prepare(tiles)
        return {"tiles": 400 * repeat, "seconds": time.process_time() - start}

    return run


PARTS: dict[str, Any] = {
    "feed": transfer,
    "feed_cucim": partial(transfer, backend="cucim"),
    "decode": decode,
    "decode_in_lots": partial(decode, lot=64),
    "decode_as_before": partial(decode, strict=False, reuse=False),
    "encode": encode,
    "bare": bare,
    **{f"prepare_{name}_{side}": prepare(name, side) for name in ("torch", "dali") for side in (224, 256)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--engine", default="torch", help="of encode")
    parser.add_argument("--precision", default="fp32", help="of encode")
    parser.add_argument("--batch-size", type=int, default=32, help="of encode")
    args = parser.parse_args()
    more = {name: getattr(args, name) for name in ("engine", "precision", "batch_size")}
    measured = PARTS[args.part](args.slide, args.repeat, **(more if args.part == "encode" else {}))
    measured["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
