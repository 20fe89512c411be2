"""The embeddings of a run in the layout of another tool."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from slide2vec.artifacts.export import (
    Dtype,
    Exported,
    NotExported,
    RunSource,
    check_tiles,
    described,
    found_in,
    loaded,
)
from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.artifacts.places import Kind
from slide2vec.artifacts.tile_features import coordinates_folder
from slide2vec.choices import LAYOUTS
from slide2vec.errors import ArtifactError, ConfigError, ExtraMissingError, OutputError, Slide2VecError
from slide2vec.files import as_path
from slide2vec.layouts.item import Item, LayoutModule, NoPlace
from slide2vec.tiling import Tiling, load_coordinates
from slide2vec.tiling.coordinates import coordinate_paths
from slide2vec.tiling.types import expand_regions

__all__ = ["export_layout"]

_KINDS: dict[Kind, str] = {
    "tile": "embeddings of tiles",
    "hierarchical": "embeddings of tiles by region",
    "slide": "embeddings of slides",
    "patient": "embeddings of patients",
}
_Found = tuple[RunSource, Kind, str]


def export_layout(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    layout: str,
    dtype: Dtype | None = None,
    *,
    encoder: str | None = None,
) -> tuple[list[Exported], list[NotExported]]:
    """Write the embeddings of a run as another tool expects them; what cannot be exported does not stop the
    rest.

    Args:
        run: output directory of a run, or its URL.
        output: another directory, or its URL.
        layout: "clam", "trident", "stamp", "lazyslide" or "zarr"; docs/formats.md has what each writes.
        dtype: of the embeddings; None = as they are, or as the tool needs them.
        encoder: only of this one, by its name in the run.

    Returns:
        What was exported, and what was not, with the reason: `NotExported.left_out` says that the tool has no
        place for it.

    Raises:
        ConfigError: the output is the run itself, there is no such encoder or layout, or the tool takes no
            such dtype.
        ArtifactError: the run has no embeddings.
        ExtraMissingError: a package is missing.
        OutputError: a file cannot be written.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
    module = cast(LayoutModule, import_module(LAYOUTS[layout].module))
    if module.DTYPE is not None and dtype not in (None, module.DTYPE):
        raise ConfigError(
            f"the layout {layout} has embeddings in {module.DTYPE} only: leave out --dtype {dtype}"
        )
    target = as_path(output)
    done: list[Exported] = []
    failed: list[NotExported] = []
    for group in _groups(found_in(as_path(run), target, encoder), together=module.TOGETHER):
        try:
            items = [_item(found, target, module, layout, dtype) for found in group]
            path = module.write(items)
        except (OutputError, ExtraMissingError):
            raise
        except Slide2VecError as error:
            failed += [_failed(found, error) for found in group]
        else:
            done += [_done(item, path) for item in items]
    return done, failed


def _groups(found: Sequence[_Found], *, together: bool) -> Iterator[list[_Found]]:
    """Each by itself; or all of one kind and slide, where all encoders' are in one file."""
    groups: dict[Any, list[_Found]] = {}
    for each in found:
        groups.setdefault((each[1:] if together else len(groups)), []).append(each)
    yield from groups.values()


def _item(found: _Found, run: Path, module: LayoutModule, layout: str, dtype: Dtype | None) -> Item:
    """One embedding, loaded and checked.

    Raises:
        NoPlace: the layout has no place for it.
        ArtifactError, TilingError: it cannot be read, or its tiles are not those of its coordinates.
    """
    source, kind, name = found
    if kind not in module.KINDS:
        raise NoPlace(f"{kind} {name}: the layout {layout} has no place for {_KINDS[kind]}")
    metadata, path = described(source.features / f"{kind}_embeddings", name)
    for key in ("encoder_name", "encoder_level"):
        if not isinstance(metadata.get(key), str):
            raise ArtifactError(f"slide {name}: its sidecar does not name {key}")
    values = loaded(path, name, dtype or module.DTYPE)
    wrong = rows_not_finite(values)
    if len(wrong):
        raise ArtifactError(
            f"{kind} {name}: its embedding {int(wrong[0])} holds NaN or infinities: embed it again"
        )
    tiles = coordinates_folder(metadata, source.tiles, name)
    tiling = None if kind == "patient" else _tiling(tiles, kind, name, metadata)
    if tiling is not None and kind in ("tile", "hierarchical"):
        check_tiles(tiling, values, metadata, tiles)
        if not len(tiling) and not module.EMPTY:
            raise NoPlace(f"slide {name}: it has no tiles, and the layout {layout} no files of such slides")
    return Item(
        encoder=source.encoder or str(metadata["encoder_name"]),
        kind=kind,
        name=name,
        values=values,
        tiling=tiling,
        metadata=metadata,
        run=run,
        output=source.output,
    )


def _tiling(tiles: Path, kind: Kind, name: str, metadata: dict[str, Any]) -> Tiling | None:
    """The tiles of a slide, whose coordinate files are in `tiles`; None of a slide embedding without such."""
    if kind == "slide" and not coordinate_paths(tiles, name)[1].is_file():
        return None
    tiling = load_coordinates(tiles, name)
    multiple = metadata.get("region_tile_multiple")
    return (
        expand_regions(tiling, multiple) if kind == "hierarchical" and isinstance(multiple, int) else tiling
    )


def _done(item: Item, path: Path) -> Exported:
    return Exported(
        sample_id=item.name,
        encoder=item.encoder,
        kind=item.kind,
        path=path,
        num_tiles=len(item.tiles) if item.kind in ("tile", "hierarchical") else None,
        feature_dim=item.values.shape[-1],
        feature_dtype=str(item.values.dtype).removeprefix("torch."),
    )


def _failed(found: _Found, error: Slide2VecError) -> NotExported:
    source, kind, name = found
    return NotExported(
        sample_id=name, encoder=source.encoder, kind=kind, error=error, left_out=isinstance(error, NoPlace)
    )
