"""Embeddings of tiles as AnnData and SpatialData, in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ArtifactError, ExtraMissingError
from slide2vec.installation import add_extra

if TYPE_CHECKING:
    import anndata
    import spatialdata

__all__ = ["SlideFrame", "anndata_of", "element_name", "needing", "spatialdata_of", "squares", "table_of"]

#: Of the table of a SpatialData: which shapes a row is of, and which of them.
_REGION, _INSTANCE = "region", "tile_id"


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideFrame:
    """The tiles of a slide (or of a class of it).

    Attributes:
        sample_id: of the slide; of a class "tumor/a".
        features: (N, D).
        x, y: (N,) int64, top-left corners, level-0 px.
        tile_size_lv0: side of a tile, level-0 px.
        columns: (N,) each, more of every tile.
        about: of the slide, a value each; None is left out.
    """

    sample_id: str
    features: NDArray[Any]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tile_size_lv0: int
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    about: Mapping[str, str | int | float | None] = field(default_factory=dict)


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Imports of an optional package are in the block.

    Raises:
        ExtraMissingError: one of them fails; with the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ExtraMissingError(f"{what} needs an optional package ({error}): {add_extra(extra)}") from error


def anndata_of(tables: Sequence[SlideFrame], uns: Mapping[str, Any] | None = None) -> anndata.AnnData:
    """One AnnData of all tiles: `X` (N, D) float32; `obs` with sample_id, x, y, tile_size_lv0 and the columns
    of the tables; `obsm["spatial"]` (N, 2) float64, the centres of the tiles in level-0 px; `uns["slides"]` a
    table of what is known of each slide.

    Args:
        uns: more for `uns`.

    Raises:
        ArtifactError: the tables have several dimensions.
        ExtraMissingError: anndata is not installed.
    """
    with needing("anndata", "an AnnData"):
        from anndata import AnnData
    import pandas

    dims = {table.features.shape[1] for table in tables}
    if len(dims) > 1:
        raise ArtifactError(
            f"embeddings have {', '.join(map(str, sorted(dims)))} dimensions: take one encoder"
        )
    names = [table.sample_id for table in tables]
    known = pandas.DataFrame([_known(table) for table in tables], index=pandas.Index(names, name="sample_id"))
    texts = [name for name in known if not pandas.api.types.is_numeric_dtype(known[name])]
    slides = known.fillna(dict.fromkeys(texts, ""))  # files of AnnData have no text that is missing
    return AnnData(
        X=np.concatenate([np.asarray(table.features, np.float32) for table in tables]),
        obs=pandas.concat([_obs(table) for table in tables]).astype(
            {"sample_id": pandas.CategoricalDtype(list(dict.fromkeys(names)))}
        ),
        obsm={"spatial": np.concatenate([_centres(table) for table in tables])},
        uns={"slides": slides, **(uns or {})},
    )


def _known(table: SlideFrame) -> dict[str, Any]:
    known = {"tile_size_lv0": table.tile_size_lv0, **table.about}
    return {name: value for name, value in known.items() if value is not None}


def _obs(table: SlideFrame) -> Any:
    import pandas

    count = len(table.x)
    columns = {
        "sample_id": [table.sample_id] * count,
        "x": table.x,
        "y": table.y,
        "tile_size_lv0": np.full(count, table.tile_size_lv0, np.int64),
        **table.columns,
    }
    return pandas.DataFrame(columns, index=[f"{table.sample_id}-{row}" for row in range(count)])


def _centres(table: SlideFrame) -> NDArray[np.float64]:
    return np.stack([table.x, table.y], axis=1).astype(np.float64) + table.tile_size_lv0 / 2


def spatialdata_of(
    tables: Sequence[SlideFrame], uns: Mapping[str, Any] | None = None
) -> spatialdata.SpatialData:
    """A SpatialData: of every slide its tiles as squares in level-0 px, `shapes["tiles"]` of one slide and
    `shapes["<sample_id>_tiles"]` of several, each in a coordinate system of its own (of one "global", else
    the sample_id); and one table, `tables["embeddings"]`, as `anndata_of` has it, of all of them.

    A slide without tiles has none.

    Raises:
        ArtifactError: as `anndata_of`; or two slides, or their classes, would have one name.
        ExtraMissingError: spatialdata is not installed.
    """
    with needing("spatialdata", "a SpatialData"):
        from spatialdata import SpatialData
        from spatialdata.transformations import Identity
    single = len(tables) == 1
    shapes: dict[str, Any] = {}
    owners: dict[str, str] = {}
    regions: list[NDArray[Any]] = []
    for table in tables:
        name = "tiles" if single else f"{element_name(table.sample_id)}_tiles"
        if name.lower() in owners:
            raise ArtifactError(
                f"slides {owners[name.lower()]} and {table.sample_id} would both be {name!r} in a "
                "SpatialData, whose names have letters, digits, _, - and . only: convert them one by one"
            )
        owners[name.lower()] = table.sample_id
        if len(table.x):
            system = "global" if single else table.sample_id
            shapes[name] = squares(table, transformations={system: Identity()})
        regions.append(np.full(len(table.x), name, object))
    if not shapes:
        return SpatialData()
    whole = anndata_of(tables, uns)
    ids = np.concatenate([np.arange(len(table.x)) for table in tables])
    return SpatialData(shapes=shapes, tables={"embeddings": table_of(whole, np.concatenate(regions), ids)})


def element_name(text: str) -> str:
    """As SpatialData allows it: letters, digits, _, - and ., not beginning with __."""
    return re.sub(r"^_+", "", re.sub(r"[^A-Za-z0-9._-]+", "_", text)) or "_"


def squares(table: SlideFrame, **more: Any) -> Any:
    """The tiles as shapes of a SpatialData, polygons in level-0 px, with x, y and tile_id.

    Args:
        more: for its parser.

    Raises:
        ExtraMissingError: spatialdata is not installed.
    """
    with needing("spatialdata", "a SpatialData"):
        import geopandas
        import shapely
        from spatialdata.models import ShapesModel
    side = table.tile_size_lv0
    boxes = shapely.box(table.x, table.y, table.x + side, table.y + side)
    columns = {_INSTANCE: np.arange(len(table.x)), "x": table.x, "y": table.y, **table.columns}
    return ShapesModel.parse(geopandas.GeoDataFrame(columns, geometry=boxes), **more)


def table_of(adata: Any, regions: NDArray[Any] | str, ids: NDArray[Any], key: str = _REGION) -> Any:
    """An AnnData as the table of shapes.

    Args:
        regions: (N,), the shapes that each row is of; or one name.
        ids: (N,), which of them.
        key: the column that says the shapes.

    Raises:
        ExtraMissingError: spatialdata is not installed.
    """
    with needing("spatialdata", "a SpatialData"):
        from spatialdata.models import TableModel
    import pandas

    adata.obs[key] = pandas.Categorical([regions] * len(ids) if isinstance(regions, str) else regions)
    adata.obs[_INSTANCE] = ids
    named = list(adata.obs[key].cat.categories)
    return TableModel.parse(adata, region=named, region_key=key, instance_key=_INSTANCE)
