"""Other tools' tissue masks of a folder of slides, for benchmarks.tissue: run by a Python that has them.

    peer/bin/python benchmarks/tissue_peers.py lazyslide SLIDES MASKS
    peer/bin/python benchmarks/tissue_peers.py trident SLIDES MASKS --trident CHECKOUT

SLIDES are TIFF files of one level at 8 µm/px or a pyramid whose first level is; MASKS gets a PNG (0, 255) and
the seconds of each. Needs nothing of slide2vec.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

TILE_PX = 512  # of TRIDENT's segmentation, at 1.25x: 8 µm/px


def lazyslide(path: Path) -> Any:
    """`find_tissues` with its defaults."""
    import lazyslide as zs
    from wsidata import open_wsi

    slide = open_wsi(str(path), store=None)
    width, height = slide.properties.level_shape[0][::-1]
    mask = np.zeros((height, width), np.uint8)
    zs.pp.find_tissues(slide)
    if "tissues" not in slide.shapes:
        return mask
    for shape in slide.shapes["tissues"].geometry:
        for polygon in getattr(shape, "geoms", [shape]):
            rings = [polygon.exterior, *polygon.interiors]
            cv2.fillPoly(mask, [np.round(np.asarray(ring.coords)).astype(np.int32) for ring in rings], 255)
    return mask


def trident(checkout: Path) -> Callable[[Path], Any]:
    """Its Otsu segmenter, tile by tile as `segment_tissue` gives them to it, holes filled as by default."""
    home = checkout / "trident/segmentation_models/model_zoo/otsu.py"
    spec = importlib.util.spec_from_file_location("trident_otsu", home)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def segment(path: Path) -> Any:
        import tifffile

        picture = tifffile.imread(path, level=0)
        height, width = picture.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        for top in range(0, height, TILE_PX):
            for left in range(0, width, TILE_PX):
                part = picture[top : top + TILE_PX, left : left + TILE_PX]
                tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
                tile[: part.shape[0], : part.shape[1]] = part
                tissue = 1 - module.apply_otsu_thresholding(tile)
                mask[top : top + TILE_PX, left : left + TILE_PX] = tissue[: part.shape[0], : part.shape[1]]
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return cv2.drawContours(np.zeros_like(mask), outlines, -1, 255, cv2.FILLED)

    return segment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=("lazyslide", "trident"))
    parser.add_argument("slides", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--trident", type=Path, help="a checkout of mahmoodlab/TRIDENT")
    asked = parser.parse_args()
    cv2.setNumThreads(1)
    segment = lazyslide if asked.tool == "lazyslide" else trident(asked.trident)
    asked.masks.mkdir(parents=True, exist_ok=True)
    notes = asked.masks / "seconds.json"
    done = json.loads(notes.read_text()) if notes.exists() else {"seconds": {}, "failed": {}}
    for path in sorted(asked.slides.glob("*.tif")):
        if path.stem in done["seconds"] or not path.with_suffix(".npz").exists():
            continue
        begun = time.process_time()
        try:
            mask = segment(path)
        except Exception as error:  # a slide that a tool fails on is a result, too
            done["failed"][path.stem] = f"{type(error).__name__}: {error}"
            continue
        done["seconds"][path.stem] = time.process_time() - begun
        cv2.imwrite(str(asked.masks / f"{path.stem}.png"), mask)
        notes.write_text(json.dumps(done, indent=1))
    notes.write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
