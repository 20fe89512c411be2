"""GeoJSON as QuPath and others write it, and as it should not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.errors import MaskError
from slide2vec.tiling import geojson, tile_slide
from slide2vec.tiling.geojson import read_areas

SQUARE = [[400, 200], [800, 200], [800, 600], [400, 600], [400, 200]]
HOLE = [[500, 300], [600, 300], [600, 400], [500, 400], [500, 300]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
MULTI = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [[[0, 0], [9.5, 0], [0, 9]]]]}


def feature(geometry: Any = POLYGON, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "id": "1", "geometry": geometry, "properties": properties}


def tumor(geometry: Any = POLYGON) -> dict[str, Any]:
    return feature(geometry, objectType="annotation", classification={"name": "Tumor", "color": [200, 0, 0]})


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


LAYOUTS: dict[str, Any] = {
    "collection": {"type": "FeatureCollection", "features": [tumor()]},
    "list": [tumor()],
    "one feature": tumor(),
    "collection in a list": [{"type": "FeatureCollection", "features": [tumor()]}],
    "collection of geometries": tumor({"type": "GeometryCollection", "geometries": [POLYGON]}),
    "with a height": tumor({"type": "Polygon", "coordinates": [[[*p, 0.5] for p in SQUARE], HOLE]}),
    "other way round": tumor({"type": "Polygon", "coordinates": [SQUARE[::-1], HOLE]}),
    "not closed": tumor({"type": "Polygon", "coordinates": [SQUARE[:-1], HOLE[:-1]]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_area(layout: str, tmp_path: Path) -> None:
    (area,) = read_areas(written(tmp_path / "a.geojson", LAYOUTS[layout]))
    assert area.label == "Tumor" and area.where == "feature 1"
    outline, hole = area.rings
    assert {tuple(point) for point in outline} == {tuple(point) for point in SQUARE} and len(outline) == 4
    assert hole.tolist() == HOLE[:-1] and hole.dtype == np.float64


def test_parts_children_and_bare_geometries(tmp_path: Path) -> None:
    child = feature(POLYGON, classification={"names": ["Tumor", "Positive"]}, name="inner")
    content = [feature(MULTI, childObjects=[child], classification="Stroma", name="outer"), POLYGON]
    areas = read_areas(written(tmp_path / "a.json", content))
    assert [(area.label, area.where) for area in areas] == [
        ("Stroma", "feature 1 (outer)"),
        ("Stroma", "feature 1 (outer)"),
        ("Tumor: Positive", "feature 2 (inner)"),
        (None, "geometry 3"),
    ]
    assert [len(area.rings) for area in areas] == [2, 1, 2, 2]


POINT = {"type": "Point", "coordinates": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is no JSON, or cut short"),
        (json.dumps([tumor()])[:-9], "it is no JSON, or cut short"),
        ("{}", "it holds an object of type None where GeoJSON has features. QuPath writes such files"),
        ("[]", "it holds no areas. QuPath writes such files"),
        ("[" * 100_000, "it is nested too deeply for GeoJSON"),
        ([tumor(), 5], "it holds 5 after feature 1 where GeoJSON has features"),
        ({"type": "FeatureCollection"}, "the file's FeatureCollection has no list of features"),
        (feature(None), "feature 1 has no geometry"),
        (
            [tumor(), feature(POINT, name="cell")],
            r"feature 2 \(cell\) is a Point, which has no area; delete it",
        ),
        (POINT, "geometry 1 is a Point"),
        (feature({"type": "LineString", "coordinates": SQUARE}), "feature 1 is a LineString"),
        (feature([1, 2]), "feature 1 is no geometry of GeoJSON"),
        (feature({"type": "Polygon", "coordinates": []}), "feature 1 has a polygon without an outline"),
        (feature({"type": "Polygon"}), "feature 1 has no list of coordinates"),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [0, 0]]]}), "an outline of 2 points"),
        (feature({"type": "Polygon", "coordinates": SQUARE}), r"an outline that is no list of \[x, y\]"),
        (feature({"type": "Polygon", "coordinates": [["ab", "cd", "ef"]]}), r"no list of \[x, y\]"),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1], [2, 2]]]}), r"no list of \[x, y\]"),
        (feature({"type": "Polygon", "coordinates": [[{"x": 1}] * 3]}), r"no list of \[x, y\]"),
        (
            '{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2]]]}',
            "geometry 1 has a point that is on no slide",
        ),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1e12, 1], [2, 2]]]}), "on no slide"),
        (feature(classification={"name": 5}), "feature 1 has the classification 5, no name"),
        (feature(childObjects=3), "feature 1 has no list of childObjects"),
    ],
)
def test_what_is_wrong_is_said(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_areas(written(tmp_path / "a.geojson", content))


def test_files_that_are_no_text_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.geojson").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no UTF-8 text"):
        read_areas(tmp_path / "a.geojson")
    monkeypatch.setattr(geojson, "MOST_BYTES", 2**20)
    (tmp_path / "a.geojson").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ValueError, match=r"more than 1 MB; export the annotations alone"):
        read_areas(tmp_path / "a.geojson")


def test_areas_are_tissue(tmp_path: Path) -> None:
    reader = ArrayReader([blank(1600, 1200), blank(200, 150)])
    path = written(tmp_path / "m.geojson", [feature({"type": "Polygon", "coordinates": [SQUARE]})])
    config = settings(requested_tile_size_px=200, tissue_threshold=0.5)
    tiling, tissue = tile_slide(reader, a_slide(mask_path=path), 0.5, config)
    assert tiling.x.tolist() == [400, 400, 600, 600] and tiling.y.tolist() == [200, 400, 200, 400]
    assert tissue.mask.shape == (150, 200) and (tissue.mask == 255).sum() == 50 * 50
    assert tiling.segmentation.mask_backend == "geojson" and tiling.segmentation.tissue_value == 1
    written(path, [tumor()])
    with pytest.raises(
        MaskError, match=r"slide s: .*m\.geojson cannot be used: feature 1 has the class 'Tumor'"
    ):
        tile_slide(reader, a_slide(mask_path=path), 0.5, config)


def test_areas_are_classes(tmp_path: Path) -> None:
    reader = ArrayReader([blank(1600, 1200), blank(200, 150)])
    path = written(tmp_path / "m.json", [tumor({"type": "Polygon", "coordinates": [SQUARE]})])
    masks = {"pixel_mapping": {"tumor": 1}, "min_coverage": {"tumor": 0.5}}
    slide = a_slide(sample_id="tumor/s", annotation="tumor", mask_path=path)
    tiling, _ = tile_slide(reader, slide, 0.5, settings(requested_tile_size_px=200, masks=masks))
    assert tiling.x.tolist() == [400, 400, 600, 600] and tiling.segmentation.tissue_value is None
