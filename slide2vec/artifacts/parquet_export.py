"""The coordinates of a run's tiles, and how they are, as Parquet: a file per slide, one table together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from slide2vec.artifacts.geojson_export import AreasNotWritten, WrittenAreas, tiled_in
from slide2vec.errors import ExtraMissingError, Slide2VecError
from slide2vec.files import as_path, atomic_path
from slide2vec.installation import add_extra
from slide2vec.labels import split_class_name
from slide2vec.tiling import Tiling, load_coordinates
from slide2vec.tiling.coordinates import ARTEFACTS

__all__ = ["export_tiles"]


def export_tiles(
    run: str | os.PathLike[str], output: str | os.PathLike[str]
) -> tuple[list[WrittenAreas], list[AreasNotWritten]]:
    """Write `tiles/<sample_id>.parquet` of every slide that a run has tiled; those of classes in folders of
    theirs.

    Columns: `sample_id` (text), `annotation` (text, null where tiles are of tissue), `tile_index` (int32),
    `x`, `y` (int64, level-0 px), `tissue_fraction` (float32), and `background`, `blur`, `bubble`, `fold`,
    `pen`, `spot` (float32, null where they were not measured). The key "slide2vec" of the schema's metadata
    has the slide's size and µm/px, and the sizes of the tiles, as JSON.

    Args:
        run: output directory of a run or of `slide2vec tile`, or its URL.
        output: another directory, or its URL.

    Raises:
        ConfigError: the output is the run itself.
        ArtifactError: the run has no coordinate files.
        ExtraMissingError: pyarrow is not installed.
        OutputError: a file cannot be written.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ExtraMissingError(
            f"Parquet needs an optional package ({error}): {add_extra('parquet')}"
        ) from error
    done: list[WrittenAreas] = []
    failed: list[AreasNotWritten] = []
    for place, directory, name in tiled_in(as_path(run), as_path(output)):
        try:
            tiling = load_coordinates(directory, name)
        except Slide2VecError as error:
            failed.append(AreasNotWritten(sample_id=name, what="tiles", error=error))
            continue
        path: Path = place / "tiles" / f"{name}.parquet"
        with atomic_path(path) as temporary:
            parquet.write_table(_table(tiling), temporary)
        done.append(WrittenAreas(sample_id=name, what="tiles", path=path, count=len(tiling)))
    return done, failed


def _table(tiling: Tiling) -> Any:
    import pyarrow

    count = len(tiling)
    measured = {
        name: pyarrow.array(tiling.artefacts[name])
        if name in tiling.artefacts
        else pyarrow.nulls(count, "float")
        for name in ARTEFACTS
    }
    texts = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    columns = {
        "sample_id": pyarrow.array([split_class_name(tiling.sample_id)[1]] * count, texts),
        "annotation": pyarrow.array([tiling.annotation] * count, texts),
        "tile_index": pyarrow.array(np.arange(count, dtype=np.int32)),
        "x": pyarrow.array(tiling.x),
        "y": pyarrow.array(tiling.y),
        "tissue_fraction": pyarrow.array(tiling.tissue_fractions),
        **measured,
    }
    about = json.dumps(_about(tiling), sort_keys=True)
    return pyarrow.table(columns).replace_schema_metadata({"slide2vec": about})


def _about(tiling: Tiling) -> dict[str, Any]:
    geometry = tiling.geometry
    names = (
        "base_spacing_um",
        "requested_spacing_um",
        "requested_tile_size_px",
        "tile_size_lv0",
        "step_px_lv0",
    )
    return {
        "image_path": str(tiling.image_path),
        "level0_width": tiling.dimensions[0],
        "level0_height": tiling.dimensions[1],
        **{name: getattr(geometry, name) for name in names},
    }
