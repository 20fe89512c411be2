"""Tissue, contours, the grid and coverage, on made-up slides whose answer is known."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from numpy.typing import NDArray
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.errors import ConfigError, SpacingError
from slide2vec.geometry import tile_geometry
from slide2vec.tiling import Tiling, TissueMask, segment, tile_slide
from slide2vec.tiling.contours import find_pieces, smallest_area
from slide2vec.tiling.grid import coverage, tissue_tiles
from slide2vec.tiling.types import Segmentation

FULL = (0, 0, 400, 300)


def tiles_of(tiling: Tiling) -> list[tuple[int, int]]:
    return list(zip(tiling.x.tolist(), tiling.y.tolist(), strict=True))


def test_the_grid_begins_at_the_bounding_box_of_each_piece_and_is_sorted() -> None:
    reader = ArrayReader([blank(1000, 800, (37, 21, 200, 150), (503, 400, 120, 60))])
    config = settings(requested_tile_size_px=50, tissue_threshold=1.0)
    tiling, tissue = tile_slide(reader, a_slide(), 0.5, config)
    first = [(x, y) for x in (37, 87, 137, 187) for y in (21, 71, 121)]
    second = [(x, 400) for x in (503, 553)]
    assert tiles_of(tiling) == first + second
    assert tiling.x.dtype == tiling.y.dtype == np.int64
    assert tiling.tissue_fractions.tolist() == [1.0] * 14
    assert len(tissue.pieces) == 2 and tissue.scale == (1.0, 1.0)


def test_a_tile_that_overhangs_tissue_and_slide_counts_the_whole_tile() -> None:
    reader = ArrayReader([blank(400, 300, (340, 250, 60, 50))])
    tiling, _ = tile_slide(reader, a_slide(), 0.5, settings(requested_tile_size_px=100))
    assert tiles_of(tiling) == [(340, 250)]
    assert tiling.tissue_fractions.tolist() == [np.float32(60 * 50 / 100**2)]


@pytest.mark.parametrize(
    ("threshold", "width", "count"),
    [(0.0, 10, 4), (0.1, 10, 4), (0.11, 10, 2), (1.0, 10, 2), (0.7, 70, 4), (0.71, 70, 2), (0.3, 30, 4)],
)
def test_the_threshold_is_inclusive_in_single_precision(threshold: float, width: int, count: int) -> None:
    """In double precision 0.7 is larger than the fraction 0.7 of single precision."""
    # The second column holds `width` px of tissue of 100.
    reader = ArrayReader([blank(400, 300, (0, 0, 100 + width, 200))])
    config = settings(requested_tile_size_px=100, tissue_threshold=threshold)
    assert len(tile_slide(reader, a_slide(), 0.5, config)[0]) == count


def test_overlap_and_a_coarser_level() -> None:
    levels = [blank(1600, 1200, FULL), blank(400, 300, (0, 0, 100, 75))]
    config = settings(requested_spacing_um=2.0, requested_tile_size_px=50, overlap=0.5)
    tiling, _ = tile_slide(ArrayReader(levels), a_slide(), 0.5, config)
    assert tiling.geometry.read_level == 1
    assert (tiling.geometry.tile_size_lv0, tiling.geometry.step_px_lv0) == (200, 100)
    assert tiles_of(tiling) == [(x, y) for x in (0, 100, 200, 300) for y in (0, 100, 200)]


@pytest.mark.parametrize("method", ["hsv", "otsu", "threshold"])
def test_a_slide_without_tissue_has_no_tiles(method: str) -> None:
    reader = ArrayReader([np.full((300, 400, 3), 255, np.uint8)])
    tiling, tissue = tile_slide(reader, a_slide(), 0.5, settings(segmentation={"method": method}))
    assert len(tiling) == 0 == len(tissue.pieces)
    assert tiling.x.dtype == np.int64 and tiling.tissue_fractions.dtype == np.float32


@pytest.mark.parametrize("method", ["hsv", "otsu", "threshold"])
def test_a_slide_smaller_than_a_tile(method: str) -> None:
    reader = ArrayReader([blank(40, 30, (5, 5, 30, 20))])
    config = settings(segmentation={"method": method, "close": 0, "mthresh": 1})
    tiling, _ = tile_slide(reader, a_slide(), 0.5, config)
    assert tiles_of(tiling) == [(5, 5)]
    assert tiling.tissue_fractions[0] == np.float32(30 * 20 / 224**2)


def test_holes_are_not_tissue_and_islands_in_them_are_pieces_of_their_own() -> None:
    image = blank(400, 400, (0, 0, 300, 300))
    image[50:250, 50:250] = blank(200, 200, (70, 70, 60, 60))
    config = settings(requested_tile_size_px=300, tissue_threshold=0.0)
    tiling, tissue = tile_slide(ArrayReader([image]), a_slide(), 0.5, config)
    ring = (300**2 - 200**2) / 300**2
    found = dict(zip(tiles_of(tiling), tiling.tissue_fractions.tolist(), strict=True))
    assert found == {(0, 0): pytest.approx(ring), (120, 120): pytest.approx(60**2 / 300**2)}
    assert sorted(len(piece.holes) for piece in tissue.pieces) == [0, 1]


def test_pieces_smaller_than_the_area_threshold_are_dropped() -> None:
    reader = ArrayReader([blank(800, 600, (0, 0, 200, 200), (400, 300, 20, 20))])
    for a_t, count in ((0, 2), (1, 2), (2, 1), (200, 0)):
        config = settings(filtering={"a_t": a_t, "ref_tile_size": 16}, requested_tile_size_px=64)
        tiling, tissue = tile_slide(reader, a_slide(), 0.5, config)
        # 20 px of tissue span 19 px between the middles of their first and last pixels.
        assert len(tissue.pieces) == count, a_t
        assert tiling.filtering.ref_tile_size == 16


def test_the_area_threshold_scales_with_the_read_spacing_and_the_mask() -> None:
    geometry = tile_geometry(
        requested_tile_size_px=224,
        requested_spacing_um=1.0,
        base_spacing_um=0.25,
        downsamples=[1.0, 4.0, 16.0],
    )
    assert smallest_area(4, 16, geometry, (16.0, 16.0)) == 4 * 4 * 4
    assert smallest_area(4, 10, geometry, (16.0, 16.0)) == 4 * 6  # 2.5 * 2.5, without its fraction


def random_mask(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    small = rng.random((25, 31)) < 0.45
    mask = np.kron(small, np.ones((4, 4))).astype(bool)
    mask ^= rng.random(mask.shape) < 0.03
    return (mask * 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dimensions", [(1984, 1600), (1990, 1603), (1984, 1200)])
def test_coverage_equals_counting_pixels_one_by_one(seed: int, dimensions: tuple[int, int]) -> None:
    mask = random_mask(seed)
    scale = (dimensions[0] / mask.shape[1], dimensions[1] / mask.shape[0])
    geometry = tile_geometry(
        requested_tile_size_px=97,
        requested_spacing_um=0.5,
        base_spacing_um=0.5,
        downsamples=[1.0],
        overlap=0.3,
    )
    pieces, _ = find_pieces(mask, 0.0)
    tissue = TissueMask(mask=mask, pieces=pieces, scale=scale, segmentation=SEGMENTATION)
    x, y, fractions = tissue_tiles(tissue, geometry, dimensions, 0.0)
    found = dict(zip(zip(x.tolist(), y.tolist(), strict=True), fractions.tolist(), strict=True))
    assert len(found) == len(x) and list(found) == sorted(found)
    expected = counted(mask, dimensions, geometry.tile_size_lv0, geometry.step_px_lv0)
    assert set(found) == set(expected)
    for tile, fraction in found.items():
        # A tile that several pieces share holds the tissue of one of them.
        assert any(fraction == pytest.approx(other, abs=1e-6) for other in expected[tile])


SEGMENTATION = Segmentation(method="hsv", requested_downsample=64, downsample=16, level=0, spacing_um=8.0)


def counted(
    mask: NDArray[np.uint8], dimensions: tuple[int, int], side: int, step: int
) -> dict[tuple[int, int], list[float]]:
    """Level-0 tiles of every 8-connected piece with an area, and their tissue, by brute force."""
    scale_x, scale_y = mask.shape[1] / dimensions[0], mask.shape[0] / dimensions[1]
    window_x, window_y = round(side * scale_x), round(side * scale_y)
    found: dict[tuple[int, int], list[float]] = {}
    for rows, columns in flooded(mask):
        if (np.ptp(rows) == 0) or (np.ptp(columns) == 0) or not has_area(rows, columns):
            continue
        inside = set(zip(columns.tolist(), rows.tolist(), strict=True))
        x0, x1 = int(columns.min() / scale_x), int(columns.max() / scale_x)
        y0, y1 = int(rows.min() / scale_y), int(rows.max() / scale_y)
        for x in range(x0, min(x1 + 1, dimensions[0]), step):
            for y in range(y0, min(y1 + 1, dimensions[1]), step):
                left, top = int(x * scale_x), int(y * scale_y)
                count = sum(
                    (column, row) in inside
                    for column in range(left, left + window_x)
                    for row in range(top, top + window_y)
                )
                found.setdefault((x, y), []).append(count / (window_x * window_y))
    return found


@pytest.mark.parametrize("dimensions", [(1984, 1600), (1990, 1203)])
@pytest.mark.parametrize("side", [97, 30, 5])
def test_what_a_mask_covers_of_tiles_equals_counting_its_pixels(
    dimensions: tuple[int, int], side: int
) -> None:
    """Anywhere on the slide and over its edges; a tile smaller than a pixel of the mask is what that is."""
    mask = random_mask(0) // 255
    geometry = tile_geometry(
        requested_tile_size_px=side, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1.0]
    )
    scales = [mask.shape[1] / dimensions[0], mask.shape[0] / dimensions[1]]
    rng = np.random.default_rng(1)
    x, y = (np.append(rng.integers(0, size, 40), [0, size - 3, size - 40]) for size in dimensions)
    found = coverage(mask, x, y, geometry, dimensions)
    wide, high = (max(1, round(side * scale)) for scale in scales)
    expected = []
    for left, top in zip(x.tolist(), y.tolist(), strict=True):
        column, row = int(left * scales[0]), int(top * scales[1])
        expected.append(int(mask[row : row + high, column : column + wide].sum()) / (wide * high))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_last_pixel_of_tissue_begins_a_tile() -> None:
    reader = ArrayReader([blank(400, 300, (37, 21, 51, 30))])
    config = settings(requested_tile_size_px=50, tissue_threshold=0.0)
    tiling, _ = tile_slide(reader, a_slide(), 0.5, config)
    assert tiles_of(tiling) == [(37, 21), (87, 21)]
    assert tiling.tissue_fractions[1] == np.float32(30 / 50**2)


def coverage_of_a_block(dimensions_px: int, tile_px: int) -> dict[tuple[int, int], float]:
    """Of a mask of 10 x 10 px, tissue in 3 to 5 of both axes, and a slide that is as wide as high."""
    mask = np.zeros((10, 10), np.uint8)
    mask[3:6, 3:6] = 255
    scale = dimensions_px / 10
    tissue = TissueMask(
        mask=mask, pieces=find_pieces(mask, 0.0)[0], scale=(scale, scale), segmentation=SEGMENTATION
    )
    geometry = tile_geometry(
        requested_tile_size_px=tile_px, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1]
    )
    x, y, fractions = tissue_tiles(tissue, geometry, (dimensions_px, dimensions_px), 0.0)
    return dict(zip(zip(x.tolist(), y.tolist(), strict=True), fractions.tolist(), strict=True))


def test_a_tile_smaller_than_a_pixel_of_the_mask_is_what_that_pixel_is() -> None:
    starts = range(3 * 64, 5 * 64 + 1, 16)
    assert coverage_of_a_block(640, 16) == {(x, y): 1.0 for x in starts for y in starts}


def test_a_tile_that_begins_before_the_box_of_its_piece_counts_nothing_there() -> None:
    """A pixel of the mask is 2.5 px: the box begins at 7.5, the first tile at 7, in the pixel before."""
    found = coverage_of_a_block(25, 2)
    assert found == {(x, y): float(x > 7 and y > 7) for x in (7, 9, 11) for y in (7, 9, 11)}


def flooded(mask: NDArray[np.uint8]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    import cv2

    count, labels = cv2.connectedComponents(mask, connectivity=8)
    return [np.nonzero(labels == label) for label in range(1, count)]  # type: ignore[misc]


def has_area(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> bool:
    """Whether OpenCV's contour of the pixels, minus its holes, has an area."""
    alone = np.zeros((rows.max() + 2, columns.max() + 2), np.uint8)
    alone[rows, columns] = 255
    return bool(find_pieces(alone, 0.0)[0])


def test_a_large_level_is_averaged_down_in_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = blank(2000, 1400, (320, 320, 640, 480))
    monkeypatch.setattr(segment, "MAX_MASK_PX", 1_000_000)
    monkeypatch.setattr("slide2vec.tiling.levels.BLOCK_PX", 256)
    reader = ArrayReader([image])
    config = settings(segmentation={"close": 0, "downsample": 32}, requested_tile_size_px=160)
    with caplog.at_level(logging.INFO):
        tiling, tissue = tile_slide(reader, a_slide(), 0.5, config)
    assert tissue.mask.shape == (44, 63)
    assert tissue.segmentation.downsample == 32 and tissue.segmentation.spacing_um == 16.0
    assert len(tiling) == 4 * 3
    assert reader.largest_read_px <= 256 * 256
    assert "slide s: level 0" in caplog.text
    # The mask overhangs the slide by less than one of its pixels.
    np.testing.assert_allclose([tiling.x[0], tiling.y[0]], 320, atol=32)


def test_a_large_level_is_never_left_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "MAX_MASK_PX", 10_000)
    reader = ArrayReader([blank(400, 300, FULL)])
    _, tissue = tile_slide(reader, a_slide(), 0.5, settings(segmentation={"downsample": 1}))
    assert tissue.mask.size <= 10_000


def test_blocks_do_not_change_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (523, 611, 3), np.uint8)
    for method in ("hsv", "otsu", "threshold"):
        config = settings(segmentation={"method": method})
        whole = tile_slide(ArrayReader([image]), a_slide(), 0.5, config)[1].mask
        with monkeypatch.context() as patch:
            patch.setattr("slide2vec.tiling.levels.BLOCK_PX", 100)
            blocks = tile_slide(ArrayReader([image]), a_slide(), 0.5, config)[1].mask
        np.testing.assert_array_equal(whole, blocks)


def test_pixel_filters_drop_what_they_name() -> None:
    image = blank(400, 100)
    image[:, :100] = (255, 250, 255)
    image[:, 100:200] = (10, 5, 12)
    image[:, 200:300] = (128, 126, 128)
    image[:, 300:] = np.random.default_rng(0).integers(90, 200, (100, 100, 3))
    kept = {}
    for name in ("filter_white", "filter_black", "filter_grayspace", "filter_blur"):
        config = settings(
            requested_tile_size_px=100,
            tissue_threshold=0.0,
            segmentation={"method": "threshold", "sthresh": 0, "mthresh": 1, "close": 0},
            filtering={"a_t": 0, "qc_spacing_um": 0.5, name: True},
        )
        kept[name] = tile_slide(ArrayReader([image]), a_slide(), 0.5, config)[0].x.tolist()
    assert kept == {
        "filter_white": [100, 200, 300],
        "filter_black": [0, 200, 300],
        "filter_grayspace": [100, 300],
        "filter_blur": [300],
    }


def test_what_lies_outside_the_slide_does_not_count_as_black() -> None:
    image = np.full((60, 60, 3), (190, 120, 185), np.uint8)
    for qc_spacing in (0.5, 1.0):
        config = settings(filtering={"a_t": 0, "filter_black": True, "qc_spacing_um": qc_spacing})
        assert len(tile_slide(ArrayReader([image]), a_slide(), 0.5, config)[0]) == 1


def test_errors_name_the_slide() -> None:
    reader = ArrayReader([blank(400, 300, FULL)])
    with pytest.raises(SpacingError, match="slide s: "):
        tile_slide(reader, a_slide(), 0.5, settings(requested_spacing_um=0.25))
    with pytest.raises(ConfigError, match="slide s: "):
        tile_slide(reader, a_slide(), 0.5, settings(requested_tile_size_px=None))
