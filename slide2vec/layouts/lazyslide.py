"""LazySlide: `<slide>.zarr`, the store of `wsidata.open_wsi(slide, store=…)`.

Tiles are the shapes "tiles" (of further geometries "tiles_448px_0.5um"), each encoder's features the table
"<encoder>_<tiles>", what tiles are like the attribute "tile_spec" (wsidata/_model/tile.py). A store is what
people go on working with: one that is there is never replaced.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.places import Kind
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import atomic_folder, is_remote
from slide2vec.frames import SlideFrame, element_name, needing, squares, table_of
from slide2vec.geometry import TileGeometry
from slide2vec.layouts.item import Item

__all__ = ["DTYPE", "EMPTY", "KINDS", "TOGETHER", "write"]

KINDS: Sequence[Kind] = ("tile",)
#: What LazySlide writes, and AnnData reckons with.
DTYPE: Dtype | None = "fp32"
#: SpatialData has no shapes without rows.
EMPTY = False
TOGETHER = True


def write(items: Sequence[Item]) -> Path:
    """See `LayoutModule`."""
    with needing("spatialdata", "the layout lazyslide"):
        from spatialdata import SpatialData
    first = items[0]
    store = first.below(first.run) / f"{Path(first.tiles.image_path.name).stem or first.sample_id}.zarr"
    if is_remote(store):
        raise ConfigError(f"{store} is behind a URL: the layout lazyslide is written to local storage")
    if store.exists():
        raise ArtifactError(
            f"slide {first.name}: {store} is there already, and LazySlide may have added to it: remove it, "
            "or name another --output"
        )
    keys: dict[TileGeometry, str] = {}
    shapes: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for item in items:
        key = keys.setdefault(item.tiles.geometry, _key(item.tiles.geometry, first=not keys))
        table = _table(item)
        if key not in shapes:
            shapes[key] = squares(table)
        tables[f"{element_name(item.encoder)}_{key}"] = _features(table, key)
    specs = {key: _specification(first, geometry) for geometry, key in keys.items()}
    width, height = first.tiles.dimensions
    properties = {"shape": [height, width], "mpp": first.tiles.geometry.base_spacing_um}
    data = SpatialData(
        shapes=shapes, tables=tables, attrs={"tile_spec": specs, "slide_properties": properties}
    )
    with atomic_folder(store) as path, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zarr v3 autosharding")  # of AnnData
        data.write(path)
    return store


def _key(geometry: TileGeometry, *, first: bool) -> str:
    size, spacing = geometry.requested_tile_size_px, geometry.requested_spacing_um
    overlap = f"_overlap{geometry.overlap:g}" if geometry.overlap else ""
    return "tiles" if first else f"tiles_{size}px_{spacing:g}um{overlap}"


def _table(item: Item) -> SlideFrame:
    tiling = item.tiles
    return SlideFrame(
        sample_id=item.sample_id,
        features=item.values.numpy(),
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        columns={"tissue_fraction": tiling.tissue_fractions, **tiling.artefacts},
    )


def _features(table: SlideFrame, key: str) -> Any:
    """As wsidata's `add_features` makes it."""
    from anndata import AnnData
    from pandas import DataFrame

    ids = np.arange(len(table.x))
    return table_of(AnnData(X=table.features, obs=DataFrame(index=ids.astype(str))), key, ids, "library_id")


def _specification(item: Item, geometry: TileGeometry) -> Mapping[str, Any]:
    """A TileSpec, whose sizes LazySlide cuts down to whole px after multiplying them."""
    size, spacing = geometry.requested_tile_size_px, geometry.requested_spacing_um
    base = _factor(size, geometry.tile_size_lv0)
    read = _factor(size, geometry.read_tile_size_px)
    step = _step(geometry, base, read)
    if step is None:
        raise ArtifactError(
            f"slide {item.name}: its tiles are {geometry.step_px_lv0} px apart at level 0, and LazySlide "
            f"takes steps of whole px at {spacing:g} um/px: none is right; take another overlap"
        )
    return {
        "height": size,
        "width": size,
        "stride_height": step,
        "stride_width": step,
        "mpp": spacing,
        "ops_level": geometry.read_level,
        "ops_downsample": read,
        "base_level": 0,
        "base_downsample": base,
        "tissue_name": None,
    }


def _factor(size: int, wanted: int) -> float:
    """The least factor that gives the wanted px, cut down to a whole number."""
    factor = wanted / size
    return factor if int(size * factor) == wanted else math.nextafter(factor, math.inf)


def _step(geometry: TileGeometry, base: float, read: float) -> int | None:
    """The step, px of the requested spacing, that is the true one at level 0 and at the level read."""
    near = round(geometry.step_px_lv0 / base)
    wanted = geometry.step_px_lv0, geometry.read_step_px
    steps = range(max(1, near - 1), near + 2)
    return next((step for step in steps if (int(step * base), int(step * read)) == wanted), None)
