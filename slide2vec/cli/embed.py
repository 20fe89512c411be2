"""`slide2vec embed`: slides in, embedding files out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slide2vec.choices import Backend, OutputFormat, Precision
from slide2vec.cli.console import (
    BACKEND,
    FORMAT,
    BuildEngine,
    Debug,
    Devices,
    Engine,
    IdSource,
    Json,
    Masks,
    Method,
    MinPiece,
    NumGpus,
    Offline,
    Overlap,
    Qc,
    SegmentationDownsample,
    SegmentationWeights,
    SlidesDir,
    Sthresh,
    TissueThreshold,
    device_names,
    given,
    masks_option,
    note,
    print_json,
    quality_limits,
    tissue_options,
)
from slide2vec.lazy import without_collection

__all__ = ["NonRecommended", "TrustRemoteCode", "embed"]

NonRecommended = Annotated[
    bool,
    typer.Option(
        "--allow-non-recommended-settings", help="Other spacings and tile sizes than the preset's own."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let a preset run the Python code of its repository."),
]


def embed(
    slides: Annotated[
        list[str],
        typer.Argument(
            help="Slides, directories of slides, glob patterns, or CSV manifests.", show_default=False
        ),
    ],
    preset: Annotated[str, typer.Option("--preset", "-p", help="The encoder; see `slide2vec models`.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the files, or its URL.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into subdirectories of directories.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    output_variant: Annotated[
        str | None, typer.Option(help="Which output of the encoder; by default the preset's.")
    ] = None,
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
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; by default the best.")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="By default the preset's on a GPU, fp32 on a CPU.", show_default=False),
    ] = None,
    engine: Engine = "auto",
    build_engine: BuildEngine = None,
    num_gpus: NumGpus = None,
    devices: Devices = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Tiles per forward pass [by device].")] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Reading threads [all CPUs].")] = None,
    stage_dir: Annotated[
        Path | None, typer.Option(help="Local folder to copy the next slides to, off slow storage.")
    ] = None,
    stage_gb: Annotated[float | None, typer.Option(help="GB it may take [half of what is free].")] = None,
    file_format: Annotated[
        OutputFormat, typer.Option("--format", help="Of the embeddings.", **FORMAT)
    ] = "pt",
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Keep what an earlier run finished, if settings agree."),
    ] = True,
    fingerprint: Annotated[
        Literal["ends", "whole"],
        typer.Option(help="Know slides by a digest of their ends, or read the whole of them for it."),
    ] = "ends",
    on_bad_tile: Annotated[
        Literal["fail", "skip"], typer.Option(help="Fail a slide with damaged tiles, or leave these out.")
    ] = "fail",
    save_tile_embeddings: Annotated[
        bool, typer.Option("--save-tile-embeddings", help="Also with models of slides and patients.")
    ] = False,
    save_latents: Annotated[
        bool, typer.Option("--save-latents", help="Also latents, with models that have them.")
    ] = False,
    previews: Annotated[bool, typer.Option("--previews", help="Pictures of tissue and tiles.")] = False,
    draw_map: Annotated[bool, typer.Option("--map", help="A picture of the embeddings (PCA).")] = False,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the encoder's input in px, where it takes others.")
    ] = None,
    allow_non_recommended_settings: NonRecommended = False,
    trust_remote_code: TrustRemoteCode = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Embed slides and write their embeddings to files.

    Each slide's files are written as soon as it is complete. A slide that fails does not stop the
    others; the exit status is then 1.
    """
    from slide2vec.cli.inputs import find_slides
    from slide2vec.config import ExecutionOptions, PreprocessingConfig, PreviewConfig
    from slide2vec.files import is_remote
    from slide2vec.recipes import load_recipe

    load_recipe(preset).variant(output_variant)  # wrong names are found before anything slow
    found = find_slides(
        slides,
        recursive=recursive,
        spacing_at_level_0=spacing_at_level_0,
        slides_dir=slides_dir,
        id_from=id_from,
    )
    preprocessing = PreprocessingConfig(
        backend=backend,
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
        on_bad_tile=on_bad_tile,
        resume=resume,
        fingerprint=fingerprint,
    )
    execution = ExecutionOptions(
        output_dir=output,
        output_format=file_format,
        batch_size=batch_size,
        num_workers=num_workers,
        stage_dir=stage_dir,
        stage_gb=stage_gb,
        num_gpus=num_gpus,
        devices=tuple(device_names(devices) or ()) or None,
        save_tile_embeddings=save_tile_embeddings,
        save_latents=save_latents,
        engine=engine,
        build_engine="never" if build_engine is False else "auto",
    )
    output_dir = execution.output_dir
    if output_dir is not None and not is_remote(output_dir):  # found out before weights are loaded
        output_dir.mkdir(parents=True, exist_ok=True)
    note(f"loading {preset} …")
    with without_collection():
        from slide2vec.cli.embed_run import embed_and_write
        from slide2vec.cli.outcome import print_report
        from slide2vec.model import Model

    model = Model.from_preset(
        preset,
        weights=weights,
        seed=seed,
        device=device,
        output_variant=output_variant,
        precision=precision,
        input_size_px=input_size,
        allow_non_recommended_settings=allow_non_recommended_settings,
        trust_remote_code=trust_remote_code,
    )
    report = embed_and_write(model, found, preprocessing, execution, draw_map=draw_map)
    if as_json:
        identity = model.identity(execution, preprocessing.requested_tile_size_px)
        print_json({"encoder": identity, "output_dir": output_dir, **report.as_json()})
    else:
        print_report(report, model, execution)
    if report.result.failed or report.result.failed_patients:
        raise typer.Exit(1)
