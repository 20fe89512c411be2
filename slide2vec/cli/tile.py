"""`slide2vec tile`: coordinates, previews and archives of slides; nothing is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slide2vec.choices import Backend
from slide2vec.cli.console import (
    BACKEND,
    Debug,
    IdSource,
    Json,
    Masks,
    Method,
    MinPiece,
    Overlap,
    Qc,
    SegmentationDownsample,
    SegmentationWeights,
    SlidesDir,
    Sthresh,
    TissueThreshold,
    facts,
    given,
    masks_option,
    print_json,
    quality_limits,
    stdout,
    tissue_options,
)
from slide2vec.errors import ConfigError

if TYPE_CHECKING:
    from slide2vec.cohort import RunResult
    from slide2vec.config import PreprocessingConfig
    from slide2vec.settings import RunSettings
    from slide2vec.slides import Slide

__all__ = ["print_tiled", "resolved", "tile", "tile_and_report"]


def tile(
    slides: Annotated[
        list[str],
        typer.Argument(
            help="Slides, directories of slides, glob patterns, or CSV manifests.", show_default=False
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the files, or its URL.")],
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="Whose spacing and tile size to take.")
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into subdirectories of directories.")
    ] = False,
    spacing: Annotated[float | None, typer.Option(help="µm/px of the tiles [the preset's].")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of the tiles in px [the preset's].")] = None,
    region_tile_multiple: Annotated[
        int | None, typer.Option(help="Group tiles into regions of so many a side (2 or more).")
    ] = None,
    overlap: Overlap = None,
    tissue_threshold: TissueThreshold = None,
    segmentation_method: Method = None,
    segmentation_downsample: SegmentationDownsample = None,
    segmentation_weights: SegmentationWeights = None,
    sthresh: Sthresh = None,
    min_piece: MinPiece = None,
    qc: Qc = None,
    masks: Masks = None,
    slides_dir: SlidesDir = None,
    id_from: IdSource = "name",
    spacing_at_level_0: Annotated[
        float | None,
        typer.Option("--spacing-at-level-0", help="µm/px of the slides, where the files are wrong."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What reads the slides.", **BACKEND)] = "auto",
    num_preprocessing_workers: Annotated[
        int | None, typer.Option(min=1, help="Slides tiled at once [all CPUs].")
    ] = None,
    save_tiles: Annotated[bool, typer.Option("--save-tiles", help="Write the tiles to archives.")] = False,
    previews: Annotated[bool, typer.Option("--previews", help="Pictures of tissue and tiles.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep what an earlier run tiled, if settings agree.")
    ] = True,
    fingerprint: Annotated[
        Literal["ends", "whole"],
        typer.Option(help="Know slides by a digest of their ends, or read the whole of them for it."),
    ] = "ends",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the tissue and the tiles of slides and write coordinate files, as HS2P does.

    `slide2vec embed` or `run` into the same directory goes on from there, with these settings. A slide that
    fails does not stop the others; the exit status is then 1.
    """
    from slide2vec.cli.inputs import find_slides
    from slide2vec.config import ExecutionOptions, PreprocessingConfig, PreviewConfig
    from slide2vec.settings import RunSettings
    from slide2vec.slides import as_slides

    config = PreprocessingConfig(
        backend=backend,
        save_tiles=save_tiles,
        resume=resume,
        fingerprint=fingerprint,
        **given(
            requested_spacing_um=spacing,
            requested_tile_size_px=tile_size,
            region_tile_multiple=region_tile_multiple,
            overlap=overlap,
            tissue_threshold=tissue_threshold,
            masks=masks_option(masks),
        ),
        **tissue_options(
            segmentation_method, segmentation_downsample, sthresh, min_piece, segmentation_weights
        ),
        qc=quality_limits(qc),
        preview=PreviewConfig(save_mask_preview=previews, save_tiling_preview=previews),
    )
    found = find_slides(
        slides,
        recursive=recursive,
        spacing_at_level_0=spacing_at_level_0,
        slides_dir=slides_dir,
        id_from=id_from,
    )
    settings = RunSettings(
        preset=preset or "",
        preprocessing=resolved(config, *([] if preset is None else [preset])),
        execution=ExecutionOptions(output_dir=output, num_preprocessing_workers=num_preprocessing_workers),
    )
    result = tile_and_report(as_slides(found), settings)
    assert settings.execution.output_dir is not None
    print_tiled(result, settings.execution.output_dir, as_json=as_json)
    if result.failed:
        raise typer.Exit(1)


def resolved(config: PreprocessingConfig, *presets: str) -> PreprocessingConfig:
    """The configuration with the spacing and tile size of presets, which are not built.

    Raises:
        ConfigError: there is no preset and something is missing; or presets have different tiles.
    """
    if presets:
        from slide2vec.recipes import load_recipe

        asked = config.requested_spacing_um, config.requested_tile_size_px
        first, *others = [config.resolved(*load_recipe(name).tiles(*asked)) for name in presets]
        if any(other != first for other in others):
            raise ConfigError(
                f"{', '.join(presets)} have tiles of different sizes or spacings: say which (--spacing, "
                "--tile-size), or tile for one of them"
            )
        return first
    if config.requested_spacing_um is None or config.requested_tile_size_px is None:
        raise ConfigError("say which tiles: --preset, or --spacing and --tile-size")
    return config.resolved(config.requested_spacing_um, config.requested_tile_size_px)


def tile_and_report(slides: Sequence[Slide], settings: RunSettings) -> RunResult:
    """Tile with live progress. The settings, with spacing and tile size set, are kept as config.yaml
    unless they are without a preset, which a configuration file cannot be."""
    from slide2vec.cli.embed_run import live_display
    from slide2vec.cohort import tile_cohort
    from slide2vec.progress import activate_progress_reporter
    from slide2vec.settings import settings_as_yaml, versions

    def text(config: PreprocessingConfig) -> str:
        return settings_as_yaml(replace(settings, preprocessing=config), {"versions": versions()})

    with activate_progress_reporter(live_display()):
        return tile_cohort(
            slides,
            settings.preprocessing,
            settings.execution,
            settings=text if settings.preset else None,
        )


def print_tiled(result: RunResult, output_dir: Path, *, as_json: bool) -> None:
    """Say what was tiled and what was not."""
    from slide2vec.cli.embed_run import failures_json
    from slide2vec.cli.outcome import counted, print_outcome

    summary = result.summary
    assert summary is not None
    if as_json:
        counts = {"slides": summary.slides, "tiles": summary.tiles, "seconds": summary.seconds}
        paths = {"output_dir": output_dir, "process_list_path": result.process_list_path}
        print_json(
            {
                **counts,
                **paths,
                "without_tissue": list(result.without_tissue),
                "remarks": dict(result.remarks),
                "failed": failures_json(result),
            }
        )
        return
    rows = [
        ("tiled", f"{counted(summary.slides, 'slide')}, {counted(summary.tiles, 'tile')}"),
        ("coordinates", f"{output_dir / 'tiles'}/"),
        ("table", str(result.process_list_path)),
    ]
    stdout().print(facts(rows))
    print_outcome(result)
