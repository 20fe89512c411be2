"""`slide2vec info`: what a slide file is, and what a preset would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slide2vec.choices import BACKENDS, Backend
from slide2vec.cli.console import (
    BACKEND,
    Debug,
    Json,
    Method,
    MinPiece,
    SegmentationDownsample,
    SegmentationWeights,
    Sthresh,
    facts,
    print_json,
    stdout,
    table,
    tissue_options,
)

if TYPE_CHECKING:
    from slide2vec.config import PreprocessingConfig
    from slide2vec.readers import SlideReader
    from slide2vec.slides import Slide

__all__ = ["info"]

#: Asked for where neither a preset nor a size is given: what most encoders want.
USUAL_SPACING_UM, USUAL_TILE_PX = 0.5, 224


def info(
    slide: Annotated[Path, typer.Argument(help="A slide file.", show_default=False)],
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="Count the tiles this preset would take.")
    ] = None,
    spacing: Annotated[
        float | None, typer.Option(help=f"µm/px of the tiles [the preset's, else {USUAL_SPACING_UM}].")
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(help=f"Side of the tiles in px [the preset's, else {USUAL_TILE_PX}].")
    ] = None,
    tissue_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Least tissue in a tile, 0 to 1.")
    ] = 0.01,
    segmentation_method: Method = None,
    segmentation_downsample: SegmentationDownsample = None,
    segmentation_weights: SegmentationWeights = None,
    sthresh: Sthresh = None,
    min_piece: MinPiece = None,
    spacing_at_level_0: Annotated[
        float | None,
        typer.Option("--spacing-at-level-0", help="µm/px of the slide, where the file is wrong."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What reads the slide.", **BACKEND)] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a slide file is and which tiles a preset would take."""
    from slide2vec.config import PreprocessingConfig
    from slide2vec.recipes import load_recipe
    from slide2vec.slides import as_slide

    recipe = load_recipe(preset) if preset else None
    config = PreprocessingConfig(
        backend=backend,
        requested_spacing_um=spacing or (recipe.default_spacing_um if recipe else USUAL_SPACING_UM),
        requested_tile_size_px=tile_size or (recipe.tile_size_px if recipe else USUAL_TILE_PX),
        tissue_threshold=tissue_threshold,
        **tissue_options(
            segmentation_method, segmentation_downsample, sthresh, min_piece, segmentation_weights
        ),
    )
    found = _look(as_slide(slide, spacing_at_level_0), config)
    if as_json:
        print_json({**found, "preset": preset})
    else:
        _print(found, preset)


def _look(slide: Slide, config: PreprocessingConfig) -> dict[str, Any]:
    """Everything about a slide, JSON-ready."""
    from slide2vec.readers.probe import probe

    probed = probe(slide)
    reader, passed_over = _opened(slide, config.backend)
    with reader:
        base, source = _spacing(reader, slide)
        return {
            "sample_id": slide.sample_id,
            "image_path": slide.image_path,
            "bytes": slide.image_path.stat().st_size,
            "container": probed.kind,
            "vendor": probed.vendor or None,
            "compression": probed.levels[0].compression if probed.levels else None,
            "backend": reader.backend,
            "passed_over": passed_over,
            "dimensions": reader.dimensions,
            "spacing_um": base,
            "spacing_source": source,
            "levels": list(_levels(reader, base)),
            "tissue": None if base is None else _tissue(reader, slide, base, config),
        }


def _opened(slide: Slide, backend: str) -> tuple[SlideReader, dict[str, str]]:
    """The reader, and why those before it in the order of "auto" were passed over."""
    from slide2vec.errors import BackendError, ExtraMissingError
    from slide2vec.readers import open_slide

    if backend != "auto":
        return open_slide(slide, backend), {}
    passed_over: dict[str, str] = {}
    for name in BACKENDS:
        try:
            return open_slide(slide, name), passed_over
        except (BackendError, ExtraMissingError) as error:
            passed_over[name] = str(error.__cause__ or error)
    return open_slide(slide), passed_over  # raises, with all the reasons


def _spacing(reader: SlideReader, slide: Slide) -> tuple[float | None, str]:
    if slide.spacing_at_level_0 is None:
        return reader.spacing_um, reader.spacing_source
    said = "nothing" if reader.spacing_um is None else f"{reader.spacing_um:.4g}"
    return slide.spacing_at_level_0, f"as given; the file says {said}"


def _levels(reader: SlideReader, base: float | None) -> Iterator[dict[str, Any]]:
    shapes = zip(reader.level_dimensions, reader.downsamples, reader.tile_shapes, strict=True)
    for level, (dimensions, downsample, tile) in enumerate(shapes):
        yield {
            "level": level,
            "dimensions": dimensions,
            "downsample": downsample,
            "spacing_um": None if base is None else base * downsample,
            "file_tile": tile,
        }


def _tissue(reader: SlideReader, slide: Slide, base: float, config: PreprocessingConfig) -> dict[str, Any]:
    """Share of tissue, and the tiles; where tiles so fine cannot be had, why (`problem`)."""
    from slide2vec.errors import SpacingError
    from slide2vec.tiling import tile_slide

    problem = None
    try:
        tiling, mask = tile_slide(reader, slide, base, config)
    except SpacingError as error:
        problem = str(error).removeprefix(f"slide {slide.sample_id}: ")
        tiling, mask = tile_slide(reader, slide, base, config.updated(requested_spacing_um=base))
    return {
        "share": float((mask.mask > 0).mean()),
        "pieces": len(mask.pieces),
        "method": mask.segmentation.method,
        "tile_spacing_um": config.requested_spacing_um,
        "tile_size_px": config.requested_tile_size_px,
        "tiles": None if problem else len(tiling),
        "read_level": None if problem else tiling.geometry.read_level,
        "read_tile_size_px": None if problem else tiling.geometry.read_tile_size_px,
        "problem": problem,
        "remarks": list(tiling.remarks),
    }


# for people -----------------------------------------------------------------------------------


def _print(found: dict[str, Any], preset: str | None) -> None:
    console = stdout()
    console.print(str(found["image_path"]), style="bold", markup=False, soft_wrap=True)
    console.print()
    console.print(facts(_facts(found, preset)))
    rows = [
        (
            level["level"],
            _by(level["dimensions"]),
            f"{level['downsample']:.4g}",
            "unknown" if level["spacing_um"] is None else f"{level['spacing_um']:.4g}",
            "unknown" if level["file_tile"] is None else _by(level["file_tile"]),
        )
        for level in found["levels"]
    ]
    headings = ("level", "size px", "downsample", "µm/px", "stored in tiles of")
    console.print()
    console.print(table(headings, rows, numbers=headings))


def _facts(found: dict[str, Any], preset: str | None) -> Iterator[tuple[str, str]]:
    yield "format", _format(found)
    yield "read with", found["backend"]
    for name, reason in found["passed_over"].items():
        yield "", f"not {name}: {reason}"
    base = found["spacing_um"]
    yield "size", _size(found["dimensions"], base)
    if base is None:
        yield "spacing", f"unknown: {found['spacing_source']}"
        yield "", "give it with --spacing-at-level-0 (about 0.25 for a 40x scan, 0.5 for 20x)"
    else:
        yield "spacing", f"{base:.4g} µm/px at level 0 ({found['spacing_source']})"
    if found["tissue"] is not None:
        yield from _tissue_facts(found["tissue"], preset)


def _tissue_facts(tissue: dict[str, Any], preset: str | None) -> Iterator[tuple[str, str]]:
    yield "tissue", f"{tissue['share']:.0%} of the slide ({tissue['method']})"
    asked = f"{tissue['tile_size_px']} px at {tissue['tile_spacing_um']:g} µm/px"
    asked += f" (preset {preset})" if preset else ""
    if tissue["problem"]:
        yield "tiles", f"none of {asked}: {tissue['problem']}"
        return
    side, level = tissue["read_tile_size_px"], tissue["read_level"]
    reduced = "" if side == tissue["tile_size_px"] else f" as {side} px and reduced"
    pieces = f"{tissue['pieces']} piece{'' if tissue['pieces'] == 1 else 's'} of tissue"
    yield "tiles", f"{tissue['tiles']:,} of {asked} on {pieces}"
    yield "", f"read at level {level}{reduced}"
    for remark in tissue["remarks"]:
        yield "mind", remark


def _format(found: dict[str, Any]) -> str:
    names = {"tiff": "TIFF", "dicom": "DICOM", "mrxs": "MIRAX", "unrecognised": "not recognised by its head"}
    vendor = {"ome": "OME", None: ""}.get(found["vendor"], str(found["vendor"]).capitalize())
    parts = [vendor, names[found["container"]]]
    compression = f", {found['compression']}" if found["compression"] else ""
    return f"{' '.join(part for part in parts if part)}{compression}, {found['bytes'] / 1e6:,.1f} MB"


def _size(dimensions: tuple[int, int], base: float | None) -> str:
    if base is None:
        return f"{_by(dimensions)} px"
    width, height = (side * base / 1000 for side in dimensions)
    return f"{_by(dimensions)} px, {width:.2f} × {height:.2f} mm"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]:,} × {size[1]:,}"
