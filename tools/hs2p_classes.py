"""Tiles of annotation classes from the published HS2P, for tests/tiling/test_class_tiles.py.

Run beside tools/hs2p_reference.py, in the environment that it needs:

    python tools/hs2p_classes.py [--output tests/fixtures/hs2p/classes.npz]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]

#: Level-0 px of the slide, and what a pixel of the mask is there.
SIZE, FACTOR, SPACING_UM = (5003, 4001), 10, 0.25
#: Ellipses of the mask: centre, half axes (px of the mask), value.
AREAS = (
    ((150, 150), (120, 100), 1),
    ((150, 150), (60, 50), 2),
    ((160, 150), (20, 20), 0),
    ((380, 120), (90, 70), 3),
    ((360, 300), (110, 80), 2),
    ((420, 300), (60, 60), 1),
    ((60, 350), (40, 30), 3),
    ((480, 390), (50, 40), 4),
)
VOCABULARIES: tuple[dict[str, Any], ...] = (
    {
        "pixel_mapping": {"background": 0, "tumor": 1, "stroma": [2, 3], "rest": 4},
        "min_coverage": {"tumor": 0.3, "stroma": 0.05},
    },
    {
        "pixel_mapping": {"background": [0, 4], "tissue": 1, "tumor": 2, "necrosis": 3},
        "min_coverage": {"tissue": 0.5, "tumor": 0.0, "necrosis": 0.7},
    },
)


def label_raster() -> Labels:
    """A made-up annotation mask, (h, w) uint8."""
    width, height = (round(side / FACTOR) for side in SIZE)
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for (cx, cy), (a, b), value in AREAS:
        mask[(x - cx) ** 2 * b * b + (y - cy) ** 2 * a * a <= a * a * b * b] = value
    return mask


def cases() -> list[dict[str, Any]]:
    """What is compared: settings under slide2vec's names."""
    tilings = (
        {"requested_spacing_um": 0.5, "requested_tile_size_px": 224, "overlap": 0.0, "a_t": 4},
        {"requested_spacing_um": 0.5, "requested_tile_size_px": 100, "overlap": 0.5, "a_t": 0},
    )
    modes = itertools.product(("joint", "independent"), ("per_annotation", "merged"))
    return [
        {**tiling, "masks": {**words, "strategy": strategy, "output_mode": mode}}
        for (strategy, mode), words, tiling in itertools.product(modes, VOCABULARIES, tilings)
    ]


def write_slide(path: Path) -> None:
    """White, of levels 1, 4 and 16."""
    import tifffile

    with tifffile.TiffWriter(path) as file:
        for factor in (1, 4, 16):
            level = np.full((SIZE[1] // factor, SIZE[0] // factor, 3), 255, np.uint8)
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=int(factor > 1),
            )


def main() -> None:
    """Write the fixture."""
    from hs2p.api import SlideSpec
    from hs2p.configs.models import FilterConfig, MaskSamplingConfig, SegmentationConfig, TilingConfig
    from hs2p.tiling.io import _build_tiling_metadata
    from hs2p.tiling.orchestration import tile_slide
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tests/fixtures/hs2p/classes.npz"))
    output = parser.parse_args().output
    arrays: dict[str, NDArray[Any]] = {}
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        slide, mask = Path(folder) / "white.tiff", Path(folder) / "mask.png"
        write_slide(slide)
        Image.fromarray(label_raster()).save(mask)
        for number, case in enumerate(cases()):
            results = tile_slide(
                SlideSpec(sample_id="slide", image_path=slide, mask_path=mask, spacing_at_level_0=SPACING_UM),
                tiling=TilingConfig(
                    requested_spacing_um=case["requested_spacing_um"],
                    requested_tile_size_px=case["requested_tile_size_px"],
                    tolerance=0.05,
                    overlap=case["overlap"],
                    backend="openslide",
                ),
                segmentation=SegmentationConfig(method="hsv"),
                filtering=FilterConfig(ref_tile_size=case["requested_tile_size_px"], a_t=case["a_t"]),
                masks=MaskSamplingConfig(**case["masks"]),
            )
            for annotation, result in results.items():
                name = f"{number}/{annotation or 'merged'}"
                metadata = _build_tiling_metadata(result)
                recorded[name] = metadata["artifact"] | {
                    "min_tissue_fraction": metadata["tiling"]["min_tissue_fraction"],
                    "level_downsamples": metadata["slide"]["level_downsamples"],
                }
                arrays[f"{name}/xy"] = np.stack([result.x, result.y]).astype(np.int16)
                arrays[f"{name}/fractions"] = result.tissue_fractions
    text = json.dumps(recorded)
    np.savez_compressed(output, recorded=np.frombuffer(text.encode(), np.uint8), **arrays)
    print(f"{len(recorded)} classes: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
