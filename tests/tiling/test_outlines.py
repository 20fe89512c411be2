"""Masks as polygons: drawn again they are the masks, and no ring meets itself."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.tiling import tile_slide
from slide2vec.tiling.geojson import read_areas
from slide2vec.tiling.outlines import Ring, mask_rings, tile_features, tissue_features
from slide2vec.tiling.polygons import draw_areas

GREEN = (157, 219, 129)


def area(ring: Ring) -> float:
    return cv2.contourArea(np.array(ring, np.float32).reshape(-1, 1, 2), oriented=True)


def filled(rings: list[Ring], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose middles are inside, by OpenCV, which says so of one ring at a time."""
    inside = np.zeros(shape, bool)
    for ring in rings:
        points = np.array(ring, np.float32).reshape(-1, 1, 2)
        for y, x in np.ndindex(shape):
            inside[y, x] ^= cv2.pointPolygonTest(points, (x + 0.5, y + 0.5), False) > 0
    return inside


def test_polygons_of_any_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = rng.random(rng.integers(1, 9, 2)) < rng.uniform(0.2, 0.8)
        whole = np.zeros(mask.shape, int)
        for rings in mask_rings(mask):
            assert area(rings[0]) > 0 and all(area(hole) < 0 for hole in rings[1:])
            assert all(len(set(ring)) == len(ring) for ring in rings), "a ring meets itself"
            polygon = filled(rings, mask.shape)
            assert cv2.connectedComponents(polygon.astype(np.uint8), connectivity=4)[0] == 2
            assert sum(map(area, rings)) == polygon.sum()
            whole += polygon
        assert np.array_equal(whole, mask), "each pixel is of one polygon"


def test_a_hole_that_meets_the_outline_is_a_hole() -> None:
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    ((outline, *holes),) = mask_rings(mask)
    assert len(holes) == 1 and area(holes[0]) == -1 and area(outline) == 14


def test_corners_alone_do_not_connect() -> None:
    assert len(mask_rings(np.eye(3, dtype=bool))) == 3


@pytest.mark.parametrize("factor", [1, 5])
def test_what_is_written_is_read_back(factor: int, tmp_path: Path) -> None:
    """Two pieces, one with a hole, and dust that is not tiled."""
    picture = blank(1600, 1200, (200, 200, 600, 500), (1000, 600, 300, 300), (1500, 100, 8, 8))
    picture[300:400, 300:500] = 244
    levels = [picture] if factor == 1 else [picture, picture[::factor, ::factor]]
    config = settings(
        requested_tile_size_px=100,
        segmentation={"close": 0, "downsample": factor},
        filtering={"a_t": 0.5},
    )
    tiling, tissue = tile_slide(ArrayReader(levels), a_slide(), 0.5, config)
    features = list(tissue_features(tissue, "tissue", GREEN))
    assert [feature["geometry"]["type"] for feature in features] == ["Polygon", "Polygon"]
    assert sorted(len(feature["geometry"]["coordinates"]) for feature in features) == [1, 2]
    assert features[0]["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "tissue", "color": [157, 219, 129]},
    }
    path = tmp_path / "t.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    height, width = tissue.mask.shape
    drawn = draw_areas(read_areas(path), {"tissue": (1,)}, (width, height), (1600, 1200))
    kept = tissue.mask > 0
    kept[:, -200 // factor :] = False  # the dust
    assert np.array_equal(drawn > 0, kept) and kept.sum() * factor**2 == 600 * 500 - 200 * 100 + 300 * 300
    again, _ = tile_slide(ArrayReader(levels), a_slide(mask_path=path), 0.5, config)
    assert len(tiling) > 10 and np.array_equal(again.x, tiling.x) and np.array_equal(again.y, tiling.y)


def test_tiles_are_squares() -> None:
    levels = [blank(1600, 1200, (200, 200, 600, 500))]
    tiling, _ = tile_slide(ArrayReader(levels), a_slide(), 0.25, settings(requested_tile_size_px=100))
    features = list(tile_features(tiling, "tumor", (1, 2, 3)))
    assert len(features) == len(tiling) > 4
    (x, y), side = (int(tiling.x[3]), int(tiling.y[3])), 200
    assert features[3]["geometry"]["coordinates"] == [
        [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    ]
    assert features[3]["properties"] == {
        "objectType": "tile",
        "classification": {"name": "tumor", "color": [1, 2, 3]},
        "measurements": {"tile_index": 3, "tissue_fraction": float(tiling.tissue_fractions[3])},
    }
