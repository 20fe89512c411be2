"""Make a synthetic H&E slide: python tools/synthetic_slide.py slide.svs --size 24000 --seed 1"""

from __future__ import annotations

import argparse
from pathlib import Path

from slide2vec.synthetic import write_synthetic_slide


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the slide."""
    parser = argparse.ArgumentParser(description="Write a synthetic H&E slide (Aperio SVS) made from a seed.")
    parser.add_argument("path", type=Path, help="file to write, ending in .svs")
    parser.add_argument("--size", type=_size, default=(8192, 8192), help="side in px, or WIDTHxHEIGHT (8192)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another slide (0)")
    parser.add_argument("--tile", type=int, default=256, help="side of the file's tiles in px (256)")
    parser.add_argument("--quality", type=int, default=80, help="JPEG quality, 1 to 100 (80)")
    parser.add_argument("--spacing", type=float, default=0.25, help="µm/px of level 0 (0.25)")
    parser.add_argument("--levels", type=int, help="pyramid levels, each 4 times smaller (as many as useful)")
    chosen = parser.parse_args(arguments)
    path = write_synthetic_slide(
        chosen.path,
        size_px=chosen.size,
        seed=chosen.seed,
        tile_px=chosen.tile,
        quality=chosen.quality,
        spacing_um=chosen.spacing,
        levels=chosen.levels,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height or width)


if __name__ == "__main__":
    main()
