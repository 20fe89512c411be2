"""Method "auto": on generated slides whose tissue is known, on made-up pictures, and on real slides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from tiling_helpers import ArrayReader, a_slide, settings

from slide2vec.config import SegmentationConfig
from slide2vec.errors import ConfigError
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
from slide2vec.synthetic.thumbnails import Thumbnail, make_thumbnail
from slide2vec.tiling import tile_slide
from slide2vec.tiling.auto_tissue import AUTO
from slide2vec.tiling.previews import thumbnail

TISSUE, PEN, UNSCANNED = (AUTO.names.index(name) for name in ("tissue", "pen", "unscanned"))
#: benchmarks/tissue.py has the medians over 20 slides of each case; these are single small ones.
LEAST_IOU = 0.85
SIZE = (450, 350)
CASES = (
    *("he", "dab", "pale", "tint", "pen", "black-marks", "coverslip", "black-border", "biopsy", "cytology"),
    *("fluorescence", "clinic"),
)


@cache
def generated(case: str, seed: int = 203) -> Thumbnail:
    return make_thumbnail(case, seed, SIZE)


@cache
def labels_of(case: str, seed: int = 203) -> NDArray[np.uint8]:
    return AUTO.segment(generated(case, seed).pixels, 8.0)


def overlap(found: NDArray[np.bool_], truth: NDArray[np.bool_], ignored: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((found & truth & ~ignored).sum() / max(1, ((found | truth) & ~ignored).sum()))


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("dab", "tint", "pen", "clinic") else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_tissue_of_generated_slides_is_found(case: str) -> None:
    slide = generated(case)
    assert slide.tissue.mean() > 0.02, "nothing to be found: take another seed"
    assert overlap(labels_of(case) == TISSUE, slide.tissue, slide.ignored) > LEAST_IOU


@pytest.mark.parametrize("case", ["pen", "black-marks"])
def test_pen_has_a_class_of_its_own(case: str) -> None:
    slide = generated(case)
    pen = slide.marks["pen"]
    assert pen.mean() > 0.02
    assert overlap(np.isin(labels_of(case), (PEN, UNSCANNED)), pen, slide.ignored) > 0.99


def test_black_borders_are_unscanned() -> None:
    slide = generated("black-border")
    assert overlap(labels_of("black-border") == UNSCANNED, slide.marks["border"], slide.ignored) > 0.95


def test_bare_glass_and_flat_pictures_hold_no_tissue() -> None:
    glass = np.random.default_rng(0).normal((236, 228, 214), 1.5, (200, 300, 3)).clip(0, 255)
    for picture in (glass, np.zeros((50, 60, 3)), np.full((50, 60, 3), 255), np.full((1, 1, 3), 240)):
        assert not AUTO.segment(picture.astype(np.uint8), 8.0).any()


def scanned(density: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """A picture of what has this optical density, (H, W), on glass, with a camera's noise."""
    noise = np.random.default_rng(0).normal(0, 1, (*density.shape, 3))
    return (240 * 10.0 ** -density[..., None] + noise).clip(0, 255).astype(np.uint8)


def test_the_rim_of_a_bubble_that_is_out_of_focus_is_no_tissue() -> None:
    rim = cv2.circle(np.zeros((350, 450), np.float32), (225, 175), 120, 1, 7)
    assert not AUTO.segment(scanned(0.15 * cv2.GaussianBlur(rim, (0, 0), 4)), 8.0).any()


def test_what_is_faint_is_tissue_where_it_goes_on_from_tissue() -> None:
    texture = cv2.blur(np.random.default_rng(1).normal(0, 0.018, (300, 400)), (3, 3))
    density = np.zeros((300, 400))
    density[100:200, 100:300] = 0.02 + texture[100:200, 100:300]
    alone = scanned(density)
    assert not AUTO.segment(alone, 8.0).any()
    beside = alone.copy()
    beside[100:200, 60:100] = (200, 120, 180)
    found = AUTO.segment(beside, 8.0) == TISSUE
    assert found[110:190, 70:290].mean() > 0.95 and found[:, 310:].sum() == found[:90].sum() == 0


def test_a_tint_and_a_lamp_do_not_matter() -> None:
    slide = generated("he")
    lamp = np.linspace(0.93, 1.0, SIZE[0], dtype=np.float32)[None, :, None]
    tinted = (slide.pixels * lamp * np.float32([1.0, 0.9, 0.8])).astype(np.uint8)
    assert overlap(AUTO.segment(tinted, 8.0) == TISSUE, labels_of("he") == TISSUE, slide.ignored) > 0.97


def test_gaps_holes_and_pieces_are_measured_in_micrometres() -> None:
    def found(spacing_um: float, side_um: float) -> NDArray[np.bool_]:
        """Tissue of 800 µm with a hole of some side, and a speck of that side beside it."""
        picture = np.full((round(1600 / spacing_um), round(2400 / spacing_um), 3), 240, np.uint8)
        low, high, side = round(400 / spacing_um), round(1200 / spacing_um), round(side_um / spacing_um)
        picture[low:high, low:high] = (200, 120, 180)
        picture[2 * low : 2 * low + side, 2 * low : 2 * low + side] = 240
        picture[low : low + side, 4 * low : 4 * low + side] = (200, 120, 180)
        rows, columns = (np.array([2.05, 1.05]) * low).astype(int), (np.array([2.05, 4.05]) * low).astype(int)
        return AUTO.segment(picture, spacing_um)[rows, columns] == TISSUE

    for spacing_um in (4.0, 8.0):
        assert found(spacing_um, 40).tolist() == [True, False]  # 1,600 µm²: filled; no piece of its own
        assert found(spacing_um, 100).tolist() == [True, True]  # 10,000 µm²: filled; a piece
        assert found(spacing_um, 200).tolist() == [False, True]  # 40,000 µm²: a hole


def test_it_looks_at_8_um_per_px_and_only_tissue_makes_tiles() -> None:
    slide = generated("pen")
    fine = slide.pixels.repeat(4, 0).repeat(4, 1)
    config = settings(
        segmentation={"method": "auto"},
        requested_spacing_um=2.0,
        requested_tile_size_px=32,
        filtering={"a_t": 0},
    )
    tiling, tissue = tile_slide(ArrayReader([fine]), a_slide(), 2.0, config)
    assert tissue.mask.shape == slide.tissue.shape and tissue.segmentation.spacing_um == 8.0
    assert tissue.names == AUTO.names and np.array_equal(tissue.mask > 0, tissue.labels == TISSUE)
    assert tiling.segmentation.method == "auto" and tiling.segmentation.downsample == 4
    centres = slide.marks["pen"][tiling.y // 4 + 4, tiling.x // 4 + 4]
    assert len(tiling) > 50 and centres.mean() < 0.05


def test_a_slide_coarser_than_8_um_per_px_is_looked_at_as_it_is() -> None:
    coarse = np.full((90, 120, 3), 240, np.uint8)
    coarse[20:60, 20:80] = (200, 120, 180)
    config = settings(segmentation={"method": "auto"}, requested_spacing_um=16.0, requested_tile_size_px=16)
    _, tissue = tile_slide(ArrayReader([coarse]), a_slide(), 16.0, config)
    assert tissue.mask.shape == (90, 120) and tissue.segmentation.spacing_um == 16.0
    assert tissue.mask[40, 50] and not tissue.mask[80, 100]


def test_options_of_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="sthresh=20 is for another method than auto"):
        SegmentationConfig(method="auto", sthresh=20)
    assert SegmentationConfig(method="auto", downsample=64).method == "auto"


@pytest.mark.parametrize(
    ("name", "spacing_um", "inside", "outside", "share"),
    [
        # in mm from the top left corner, chosen by eye; tissue's share of the slide by eye, too
        (
            "CMU-1-Small-Region.svs",
            0.499,
            [(0.5, 1.2), (0.9, 1.2), (0.55, 0.35)],
            [(0.1, 0.2), (0.2, 1.2)],
            0.4,
        ),
        ("rationai-CMU-1-small.tiff", 3.19, [(0.4, 1.1), (1.55, 0.45)], [(0.4, 0.4), (1.0, 1.3)], 0.2),
        ("fluorescence-dapi.ndpi", 0.228, [(0.4, 0.9), (0.2, 0.3)], [(0.02, 0.02)], 0.85),
    ],
)
def test_real_slides(
    real_slide: Callable[[str], Path],
    name: str,
    spacing_um: float,
    inside: list[tuple[float, float]],
    outside: list[tuple[float, float]],
    share: float,
) -> None:
    with open_slide(as_slide(real_slide(name), spacing_um)) as reader:
        labels = AUTO.segment(thumbnail(reader, 8 / spacing_um), 8.0)

    def at(places: list[tuple[float, float]]) -> list[int]:
        return [int(labels[round(y * 125), round(x * 125)]) for x, y in places]

    assert at(inside) == [TISSUE] * len(inside) and at(outside) == [0] * len(outside)
    assert abs((labels == TISSUE).mean() - share) < 0.07
