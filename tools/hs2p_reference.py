"""Reference coordinates from the published HS2P, for tests/tiling/test_hs2p_reference.py.

Run in an environment with hs2p 6.1.0, openslide-python and tifffile (not slide2vec's own: hs2p pins
other versions), from the root of the repository:

    python tools/hs2p_reference.py SLIDES GENERATED [--output tests/fixtures/hs2p/reference.npz]

SLIDES is the folder of test slides, GENERATED a slide that slide2vec's own environment made with
`python tools/synthetic_slide.py GENERATED --size 6000 --seed 7`. The tests import `pattern`, `pyramid`
and `mask_raster` from here, so that both sides see the same pixels without a slide file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

PATTERN = "pattern"
GENERATED, GENERATED_PX, GENERATED_SEED = "generated", 6000, 7
PATTERN_SPACING_UM = 0.25
PATTERN_SIZE = (5003, 4001)

#: Ellipses of the pattern: centre, half axes, colour, amplitude of the texture.
BACKGROUND = (244, 243, 245)
ELLIPSES = (
    ((1300, 1200), (1000, 900), (196, 140, 190), 60),
    ((1500, 1250), (420, 300), BACKGROUND, 4),  # a hole,
    ((1520, 1260), (180, 140), (180, 120, 175), 50),  # with an island
    ((700, 900), (120, 90), BACKGROUND, 4),
    ((3600, 1100), (900, 700), (212, 170, 205), 6),  # blurred
    ((3700, 2900), (1000, 800), (172, 168, 173), 20),  # gray
    ((3300, 2700), (350, 300), (12, 11, 14), 8),  # ink
    ((1100, 3100), (800, 620), (236, 224, 237), 10),  # pale
    ((4950, 3950), (300, 280), (190, 130, 185), 50),  # over the corner
    ((2450, 2300), (60, 50), (180, 110, 170), 40),  # specks
    ((2300, 2500), (25, 20), (180, 110, 170), 40),
    ((2600, 200), (90, 60), (180, 110, 170), 40),
)


def pattern() -> Pixels:
    """A made-up slide, (h, w, 3) uint8: the same pixels with any version of any library."""
    width, height = PATTERN_SIZE
    y, x = np.ogrid[:height, :width]
    noise = _noise(x.astype(np.uint32), y.astype(np.uint32))
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BACKGROUND
    for (cx, cy), (a, b), color, amplitude in ELLIPSES:
        rows, columns = slice(max(0, cy - b), cy + b), slice(max(0, cx - a), cx + a)
        dx, dy = x[:, columns].astype(np.int64) - cx, y[rows].astype(np.int64) - cy
        inside = dx * dx * b * b + dy * dy * a * a <= a * a * b * b
        texture = (noise[rows, columns].astype(np.int32) - 128) * amplitude // 256
        colored = np.clip(np.array(color) + texture[..., None], 0, 255).astype(np.uint8)
        part = image[rows, columns]
        part[inside] = colored[inside]
    return image


def _noise(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> Pixels:
    """Values that look random, 0 to 255, constant over 3 x 3 px so that they survive averaging."""
    value = (x // 3) * np.uint32(73856093) ^ (y // 3) * np.uint32(19349663)
    value = (value ^ (value >> np.uint32(13))) * np.uint32(1274126177)
    return (value >> np.uint32(16)).astype(np.uint8)


def pyramid(image: Pixels) -> list[Pixels]:
    """The image and its means over 4 x 4 and 16 x 16 px, cropped to whole ones (uneven downsamples)."""
    levels = [image]
    for factor in (4, 16):
        height, width = image.shape[0] // factor, image.shape[1] // factor
        blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
        means = blocks.sum((1, 3), dtype=np.uint32) // (factor * factor)
        levels.append(means.astype(np.uint8))
    return levels


def mask_raster(kind: str) -> Pixels:
    """A made-up tissue mask of the pattern, (h, w) uint8 of 0 and 1."""
    factor = {"fine": 8, "coarse": 40}[kind]
    width, height = (round(side / factor) for side in PATTERN_SIZE)
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for cx, cy, radius, value in (
        (150, 150, 120, 1),
        (150, 150, 60, 0),
        (150, 150, 25, 1),
        (480, 380, 90, 1),
    ):
        inside = (x * factor - cx * 8) ** 2 + (y * factor - cy * 8) ** 2 <= (radius * 8) ** 2
        mask[inside] = value
    return mask


def _case(slide: str, **changes: Any) -> dict[str, Any]:
    case = {
        "slide": slide,
        "base_spacing_um": PATTERN_SPACING_UM if slide == PATTERN else None,
        "mask": None,
        "requested_spacing_um": 0.5,
        "requested_tile_size_px": 224,
        "region_tile_multiple": None,
        "overlap": 0.0,
        "tissue_threshold": 0.1,
        "tolerance": 0.05,
        "segmentation": {},
        "filtering": {"ref_tile_size": 16},
    }
    return {**case, **changes}


def cases() -> list[dict[str, Any]]:
    """What is compared: settings under slide2vec's names."""
    found = []
    for spacing, size in itertools.product((0.25, 0.26, 0.5, 0.6, 1.0, 2.0, 4.0), (64, 224, 256)):
        found.append(_case(PATTERN, requested_spacing_um=spacing, requested_tile_size_px=size))
    for method, overlap in itertools.product(("hsv", "otsu", "threshold"), (0.0, 0.25, 0.5, 0.9)):
        found.append(_case(PATTERN, overlap=overlap, segmentation={"method": method}))
    for threshold in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0):
        found.append(_case(PATTERN, tissue_threshold=threshold))
    for segmentation in (
        {"downsample": 4},
        {"downsample": 1},
        {"downsample": 16, "close": 0},
        {"close": 9},
        {"method": "threshold", "sthresh": 20, "sthresh_up": 200, "mthresh": 3},
        {"method": "otsu", "mthresh": 11, "downsample": 4},
        {"sthresh_up": 0},
    ):
        found.append(_case(PATTERN, segmentation=segmentation))
    for filtering in ({"a_t": 0}, {"a_t": 1}, {"a_t": 40, "ref_tile_size": 64}, {"a_t": 1000}):
        found.append(_case(PATTERN, filtering={"ref_tile_size": 16, **filtering}))
    for filtering in (
        {"filter_white": True},
        {"filter_white": True, "white_threshold": 200, "fraction_threshold": 0.5, "qc_spacing_um": 1.0},
        {"filter_black": True, "fraction_threshold": 0.3},
        {"filter_grayspace": True},
        {"filter_grayspace": True, "grayspace_saturation_threshold": 0.1, "qc_spacing_um": 0.1},
        {"filter_blur": True, "blur_threshold": 5.0},
        {"filter_blur": True, "blur_threshold": 150.0, "qc_spacing_um": 0.5},
        {"filter_white": True, "filter_black": True, "filter_grayspace": True, "filter_blur": True},
    ):
        changes = {"segmentation": {"method": "threshold"}, "overlap": 0.25}
        found.append(_case(PATTERN, filtering={"ref_tile_size": 16, **filtering}, **changes))
        found.append(_case(PATTERN, filtering={"ref_tile_size": 16, **filtering}, requested_spacing_um=0.6))
    for mask, threshold in itertools.product(("fine", "coarse"), (0.01, 0.5)):
        found.append(_case(PATTERN, mask=mask, tissue_threshold=threshold))
    found.append(_case(PATTERN, mask="fine", segmentation={"downsample": 1}, requested_spacing_um=2.0))
    for slide in (
        "CMU-1-Small-Region.svs",
        "aperio-jpeg-pyramid.svs",
        "generic-jpeg-bigtiff-pyramid.tiff",
        "generic-lzw-pyramid.tiff",
        "rationai-CMU-1-small.tiff",
        "camelyon-jpeg.dcm",
        "fluorescence-dapi.ndpi",
        GENERATED,
    ):
        found += _slide_cases(slide)
    return found + _region_cases()


def _region_cases() -> list[dict[str, Any]]:
    """Regions, which the original slide2vec has HS2P lay out as tiles of their size. At spacings where
    nothing is rounded: elsewhere it reads regions of another size than their tiles make up."""
    settings: list[tuple[str, dict[str, Any]]] = [
        (PATTERN, {"requested_tile_size_px": 64, "region_tile_multiple": 3}),
        (PATTERN, {"requested_tile_size_px": 112, "region_tile_multiple": 6, "tissue_threshold": 0.01}),
        (PATTERN, {"requested_spacing_um": 0.25, "region_tile_multiple": 2, "tissue_threshold": 0.5}),
        (PATTERN, {"requested_spacing_um": 1.0, "requested_tile_size_px": 50, "region_tile_multiple": 4}),
        (PATTERN, {"requested_tile_size_px": 64, "region_tile_multiple": 2, "mask": "fine"}),
        (PATTERN, {"requested_tile_size_px": 64, "region_tile_multiple": 3, "filtering": _FILTERS}),
        ("CMU-1-Small-Region.svs", {"region_tile_multiple": 2}),
        ("CMU-1-Small-Region.svs", {"requested_tile_size_px": 64, "region_tile_multiple": 6}),
        (GENERATED, {"region_tile_multiple": 6, "tissue_threshold": 0.01}),
    ]
    return [_case(slide, **changes) for slide, changes in settings]


_FILTERS = {"ref_tile_size": 16, "filter_white": True, "filter_grayspace": True}


def _slide_cases(slide: str) -> list[dict[str, Any]]:
    base = {
        "generic-lzw-pyramid.tiff": 2.0,
        "rationai-CMU-1-small.tiff": 3.19,
        "camelyon-jpeg.dcm": 29.0,
    }.get(slide, 0.5)
    settings: list[dict[str, Any]] = [
        {},
        {"requested_spacing_um": 2 * base, "overlap": 0.5},
        {"requested_spacing_um": 4 * base, "requested_tile_size_px": 64},
        {"requested_tile_size_px": 256, "segmentation": {"method": "otsu"}, "tissue_threshold": 0.5},
        {"requested_tile_size_px": 64, "segmentation": {"method": "threshold"}, "overlap": 0.25},
        {
            "requested_tile_size_px": 64,
            "filtering": {
                "ref_tile_size": 16,
                "filter_white": True,
                "filter_grayspace": True,
                "filter_blur": True,
                "qc_spacing_um": 2 * base,
            },
        },
    ]
    return [_case(slide, **{"requested_spacing_um": base, **changes}) for changes in settings]


def write_pattern(path: Path, levels: list[Pixels]) -> None:
    """A tiled pyramid that OpenSlide opens, lossless."""
    import tifffile

    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=1 if number else 0,
            )


def _reference(case: dict[str, Any], path: Path, mask: Path | None) -> Any:
    from hs2p.tiling.single import preprocess_slide

    segmentation = {
        {"method": "tissue_method", "downsample": "seg_downsample"}.get(name, name): value
        for name, value in case["segmentation"].items()
    }
    filtering = dict(case["filtering"])
    return preprocess_slide(
        image_path=path,
        sample_id="slide",
        tissue_mask_path=mask,
        backend="openslide",
        spacing_override=case["base_spacing_um"],
        requested_tile_size_px=case["requested_tile_size_px"] * (case["region_tile_multiple"] or 1),
        requested_spacing_um=case["requested_spacing_um"],
        min_tissue_fraction=case["tissue_threshold"],
        overlap=case["overlap"],
        tolerance=case["tolerance"],
        ref_tile_size_px=filtering.pop("ref_tile_size"),
        a_h=filtering.pop("a_h", 2),
        **filtering,
        **segmentation,
    )


def main() -> None:
    """Write the fixture."""
    from hs2p.tiling.io import _build_tiling_metadata
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slides", type=Path)
    parser.add_argument("generated", type=Path)
    parser.add_argument("--output", type=Path, default=Path("tests/fixtures/hs2p/reference.npz"))
    arguments = parser.parse_args()
    levels = pyramid(pattern())
    found, x, y, fractions = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "pattern.tiff"
        write_pattern(slide, levels)
        paths = {PATTERN: slide, GENERATED: arguments.generated}
        for case in cases():
            mask = None
            if case["mask"]:
                mask = Path(folder) / f"{case['mask']}.png"
                Image.fromarray(mask_raster(case["mask"])).save(mask)
            path = paths.get(case["slide"], arguments.slides / case["slide"])
            result = _reference(case, path, mask)
            metadata = _build_tiling_metadata(result)
            for section in ("provenance", "artifact"):
                del metadata[section]
            del metadata["segmentation"]["mask_path"]
            found.append({**case, "metadata": metadata})
            x.append(result.x.astype(np.int32))
            y.append(result.y.astype(np.int32))
            fractions.append(result.tissue_fractions)
    record = {
        "checksums": [zlib.crc32(level) for level in levels],
        "generated_checksum": zlib.crc32(arguments.generated.read_bytes()),
        "cases": found,
    }
    text = json.dumps(record)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        arguments.output,
        cases=np.frombuffer(text.encode(), np.uint8),
        x=np.concatenate(x),
        y=np.concatenate(y),
        tissue_fractions=np.concatenate(fractions),
    )
    print(f"{len(found)} cases, {sum(map(len, x))} tiles: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
