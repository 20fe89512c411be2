"""What a GPU's feeding costs the host: CPU time of one reading thread per tile, decoding left out.

    python -m benchmarks.feeding [--rounds 8]

Compressed tiles are read, checked and handed over as for a GPU, and the numbers of the Triton kernel are made
ready; nvImageCodec's decoding and the launch are left out, since they are the device's. What the file's pages
take to be copied and CodeStream to parse a header is in it (0.5 and 0.9 us per JPEG tile), but not under the
GIL.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slide2vec import PreprocessingConfig
from slide2vec.prepare import gather_tiles
from slide2vec.readers.decoders import NvimgcodecDecoder
from slide2vec.slides import Slide
from slide2vec.stream import plan_slide
from slide2vec.stream.decode_paths import jpeg_path
from slide2vec.stream.tile_sources import TileSource
from slide2vec.synthetic import write_synthetic_slide

#: Of a slide with 0.25 µm/px at level 0: 1:1, halved, by a fraction, by a quarter of the next level.
SPACINGS_UM = (0.25, 0.5, 0.35, 0.75)
TILE_PX = 224


class Undecoded:
    """In the place of nvImageCodec's decoder: gives the images that are to be written, as they are."""

    def decode(self, streams: Any, *, images: Any, **_: Any) -> Any:
        return images


class Launched:
    """In the place of a Triton kernel: does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def seconds(source: TileSource, rounds: int) -> tuple[int, float]:
    """Tiles, and the least CPU time of this thread for all of them, of several rounds."""
    tiles = torch.zeros((256, TILE_PX, TILE_PX, 3), dtype=torch.uint8)
    count, total = 0, 0.0
    for number, block in enumerate(source.blocks):
        best = float("inf")
        for _ in range(rounds):
            started = time.thread_time()
            source.place(number, source.fetch(number), list(tiles[: len(block)]))
            best = min(best, time.thread_time() - started)
        count, total = count + len(block), total + best
    return count, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    decoder = NvimgcodecDecoder(torch.device("cpu"))
    decoder._decoder = Undecoded()
    gather_tiles._kernel = Launched  # type: ignore[assignment]
    path = jpeg_path(decoder, gather_tiles.gather_by_kernel)
    print("| µm/px | px read per px | tiles | µs of one thread per tile | tiles/s of one thread |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        slide = Slide(
            sample_id="s", image_path=write_synthetic_slide(Path(folder) / "s.svs", size_px=8192, seed=3)
        )
        for spacing in SPACINGS_UM:
            config = PreprocessingConfig(
                requested_spacing_um=spacing, requested_tile_size_px=TILE_PX, tissue_threshold=0.0
            )
            plan = plan_slide(slide, config)
            reader = path.open(plan.source.reader.probe)  # type: ignore[attr-defined]
            count, took = seconds(path.source(plan.source, reader), rounds)  # type: ignore[arg-type]
            ratio = plan.tiling.geometry.read_tile_size_px / TILE_PX
            print(f"| {spacing} | {ratio:.3g} | {count} | {1e6 * took / count:.1f} | {count / took:,.0f} |")
            plan.source.close()
            reader.close()


if __name__ == "__main__":
    main()
