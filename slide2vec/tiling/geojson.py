"""Areas in GeoJSON files, as QuPath and others write them: polygons in level-0 px, with the names of their
classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.files import open_plain

__all__ = ["SUFFIXES", "Area", "read_areas"]

SUFFIXES = frozenset({".geojson", ".json"})
#: Python takes about fifteen times as much memory for what is in such a file.
MOST_BYTES = 256 * 2**20
#: Level-0 px that no slide reaches.
_FARTHEST_PX = 2**31
_EXPORT = (
    "QuPath writes such files: File > Export objects as GeoJSON, of annotations that are areas (rectangles, "
    "polygons, brushed ones)"
)


@dataclass(frozen=True, eq=False)
class Area:
    """A polygon.

    Attributes:
        label: name of its class; None where it has none.
        rings: (n, 2) float64 each, x and y in level-0 px: its outline, then its holes; not closed.
        where: which feature it is of, for errors.
    """

    label: str | None
    rings: tuple[NDArray[np.float64], ...]
    where: str


def read_areas(path: Path) -> list[Area]:
    """The polygons of a file: of a FeatureCollection, of features or geometries in a list, of collections of
    geometries, of child objects; a MultiPolygon gives several.

    Raises:
        ValueError: naming the feature that is not an area, or what else is wrong with the file.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"it has more than {MOST_BYTES // 2**20} MB; export the annotations alone, without cells and "
            "other detections"
        )
    try:
        content = json.loads(data.decode("utf-8-sig"))
        areas = list(_Features().of(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON, or cut short: {error}; export it again") from None
    except RecursionError:
        raise ValueError("it is nested too deeply for GeoJSON; export it again") from None
    if not areas:
        raise ValueError(f"it holds no areas. {_EXPORT}")
    return areas


class _Features:
    """Goes through the features of a file, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, content: Any) -> Iterator[Area]:
        """The areas of a list, a collection, a feature or a geometry."""
        if isinstance(content, list):
            for item in content:
                yield from self.of(item)
            return
        kind = content.get("type") if isinstance(content, dict) else None
        if kind == "FeatureCollection":
            yield from self.of(_list(content, "features", "the file's FeatureCollection"))
        elif kind == "Feature":
            yield from self._feature(content)
        elif isinstance(kind, str) and isinstance(content, dict) and _GEOMETRY.keys() & content.keys():
            self._count += 1
            yield from _polygons(content, None, f"geometry {self._count}")
        else:
            shown = f"an object of type {kind!r}" if isinstance(content, dict) else repr(content)[:60]
            after = f" after feature {self._count}" if self._count else ""
            raise ValueError(f"it holds {shown}{after} where GeoJSON has features. {_EXPORT}")

    def _feature(self, feature: dict[str, Any]) -> Iterator[Area]:
        self._count += 1
        properties = feature.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        name = properties.get("name")
        where = f"feature {self._count}" + (f" ({name})" if isinstance(name, str) and name else "")
        if feature.get("geometry") is None:
            raise ValueError(f"{where} has no geometry; delete it, and export the others")
        yield from _polygons(feature["geometry"], _label(properties, where), where)
        if "childObjects" in properties:
            yield from self.of(_list(properties, "childObjects", where))


def _label(properties: dict[str, Any], where: str) -> str | None:
    """The name of a feature's class: `classification.name`, or QuPath's `names` of derived classes."""
    given = properties.get("classification")
    if isinstance(given, dict):
        names = given.get("names")
        given = ": ".join(map(str, names)) if isinstance(names, list) and names else given.get("name")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise ValueError(f"{where} has the classification {given!r}, no name; classify it again")
    return given


#: Types of geometries by what their content is called.
_GEOMETRY = {"coordinates": ("Polygon", "MultiPolygon"), "geometries": ("GeometryCollection",)}


def _polygons(geometry: Any, label: str | None, where: str) -> Iterator[Area]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for each in _list(geometry, "geometries", where):
            yield from _polygons(each, label, where)
    elif kind in _GEOMETRY["coordinates"]:
        found = _list(geometry, "coordinates", where)
        for polygon in found if kind == "MultiPolygon" else [found]:
            if not isinstance(polygon, list) or not polygon:
                raise ValueError(f"{where} has a polygon without an outline; draw it again")
            yield Area(label, tuple(_ring(ring, where) for ring in polygon), where)
    else:
        what = f"a {kind}" if isinstance(kind, str) else "no geometry of GeoJSON"
        raise ValueError(f"{where} is {what}, which has no area; delete it, or draw it as a polygon")


def _ring(points: Any, where: str) -> NDArray[np.float64]:
    """A ring as (n, 2), without its last point if that is the first again."""
    try:
        ring = np.asarray([point[:2] for point in points])
    except (TypeError, ValueError, KeyError, OverflowError):
        ring = np.empty(0)
    if ring.ndim != 2 or ring.shape[1] != 2 or ring.dtype.kind not in "iuf":
        raise ValueError(f"{where} has an outline that is no list of [x, y]; draw it again")
    ring = ring.astype(np.float64)
    if not (np.abs(ring) < _FARTHEST_PX).all():  # neither is what is no number
        raise ValueError(f"{where} has a point that is on no slide; coordinates are level-0 px")
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise ValueError(f"{where} has an outline of {len(ring)} points, which has no area; delete it")
    return ring


def _list(content: dict[str, Any], key: str, where: str) -> Sequence[Any]:
    found = content.get(key)
    if not isinstance(found, list):
        raise ValueError(f"{where} has no list of {key}; export it again")
    return found
