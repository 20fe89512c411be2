"""What slide2vec 7.1.4 hands its encoders, for tests/prepare/test_slide2vec_reference.py.

Run in an environment with slide2vec 7.1.4 and hs2p 6.1.0 (not slide2vec's own), from the root of the
repository; nothing is downloaded, and no weights are needed:

    python tools/slide2vec_reference.py SLIDES GENERATED [--output tests/fixtures/slide2vec_714]

SLIDES is the folder of test slides, GENERATED a slide that slide2vec's own environment made with
`python tools/synthetic_slide.py GENERATED --size 3000 --seed 7`. Two files are written: `presets.json`, what
its registry and its transforms say of every tile preset (null: read from the hub, which is not asked); and
`tiles.npz`, some rows of tiles as its reader gives them, before normalisation.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

#: (slide, level, read size, requested size): several spacings and sizes; slides by their file's stem. On
#: levels whose downsample is no whole number OpenSlide, and so 7.1.4, interpolates between pixels, where we
#: give the file's own: level 1 of generic-jpeg-bigtiff-pyramid (4.002) differs by 5 grey levels on average.
READS = (
    ("CMU-1-Small-Region", 0, 224, 224),
    ("CMU-1-Small-Region", 0, 448, 224),
    ("CMU-1-Small-Region", 0, 283, 256),
    ("generic-jpeg-bigtiff-pyramid", 0, 224, 224),
    ("generated", 0, 224, 224),
    ("generated", 0, 448, 392),
    ("generated", 1, 256, 224),
)
ROWS = 24  # every how many rows are kept


def places(dimensions: tuple[int, int], lv0: int) -> list[tuple[int, int]]:
    """Level-0 corners of a tile in the middle, and of one over each far edge."""
    width, height = dimensions
    return [
        ((width - lv0) // 2, (height - lv0) // 2),
        (width - lv0 // 2, height // 2),
        (width // 3, height - lv0 // 3),
    ]


def tiles(path: Path, level: int, read: int, requested: int) -> np.ndarray[Any, Any]:
    """(3, rows, S, 3) uint8: rows of the tiles as slide2vec 7.1.4 hands them to its normalisation."""
    import torch
    from hs2p.wsi.reader import open_slide
    from slide2vec.data.tile_reader import _area_resize_tile_batch

    slide = open_slide(str(path), "openslide", require_spacing=False)
    downsample = slide.level_downsamples[level]
    ratio = downsample[0] if isinstance(downsample, tuple) else downsample
    corners = places(slide.dimensions, round(read * ratio))
    regions = [np.asarray(slide.read_region(c, level, (read, read)))[..., :3] for c in corners]
    batch = torch.from_numpy(np.stack(regions)).permute(0, 3, 1, 2).contiguous()
    batch = _area_resize_tile_batch(batch, read_size_px=read, requested_size_px=requested)
    return batch.permute(0, 2, 3, 1).numpy()[:, ::ROWS]


def presets() -> dict[str, Any]:
    """Tile presets by name: registry and statistics."""
    from slide2vec.encoders.registry import encoder_registry

    found = {}
    encoder_registry.info("lunit")  # discovers the others
    for name in sorted(encoder_registry._entries):
        info = encoder_registry.info(name)
        if info.get("level") != "tile":
            continue
        spacing = info.get("supported_spacing_um")
        found[name] = {
            "input_size": info["input_size"],
            "spacing_um": spacing if isinstance(spacing, list) or spacing is None else [spacing],
            "variable_input": info.get("supports_variable_input_size"),
            "patch_size": info.get("patch_size"),
            "tiles": transform(name, "get_normalization_transform"),
            "images": transform(name, "get_transform"),
        }
    return found


def transform(name: str, method: str) -> dict[str, Any] | None:
    """The steps of one of an encoder's transforms, without building the encoder."""
    from slide2vec.encoders.registry import encoder_registry

    kind = encoder_registry.require(name)
    encoder = object.__new__(kind)
    try:
        steps = getattr(encoder, method)()
    except Exception:
        return None  # it asks its model, or the hub
    made: dict[str, Any] = {}
    for step in getattr(steps, "transforms", []):
        what = type(step).__name__
        if what == "Normalize":
            made["mean"], made["std"] = [float(v) for v in step.mean], [float(v) for v in step.std]
        elif what == "Resize":
            made["resize"] = step.size if isinstance(step.size, int) else list(step.size)
            made["interpolation"] = getattr(step.interpolation, "value", str(step.interpolation))
        elif what == "CenterCrop":
            made["crop"] = step.size if isinstance(step.size, int) else step.size[0]
    return made or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slides", type=Path)
    parser.add_argument("generated", type=Path)
    parser.add_argument("--output", type=Path, default=Path("tests/fixtures/slide2vec_714"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "presets.json").write_text(json.dumps(presets(), indent=1, sort_keys=True) + "\n")
    rows = {}
    for name, level, read, requested in READS:
        path = args.generated
        if name != "generated":
            path = next(p for p in sorted(args.slides.iterdir()) if p.stem == name)
        rows[f"{name} {level} {read} {requested}"] = tiles(path, level, read, requested)
    np.savez_compressed(args.output / "tiles.npz", **rows)


if __name__ == "__main__":
    main()
