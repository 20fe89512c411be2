"""`slide2vec run`: a cohort onto disk, from a configuration file or from flags."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slide2vec.choices import Backend, EngineChoice, Executor, OutputFormat, Precision
from slide2vec.cli.console import (
    BACKEND,
    FORMAT,
    BuildEngine,
    Debug,
    Devices,
    Json,
    Method,
    MinPiece,
    NumGpus,
    Offline,
    Qc,
    SegmentationDownsample,
    SegmentationWeights,
    SlidesDir,
    Sthresh,
    device_names,
    note,
    print_json,
    quality_limits,
)
from slide2vec.cli.embed import TrustRemoteCode
from slide2vec.errors import ConfigError
from slide2vec.lazy import without_collection

if TYPE_CHECKING:
    from slide2vec.model import Model
    from slide2vec.models import Models
    from slide2vec.settings import RunSettings
    from slide2vec.slides import Slide

__all__ = ["CONFIG_SUFFIXES", "run"]

#: Suffixes of configuration files: `slide2vec a.yaml` is `slide2vec run a.yaml`.
CONFIG_SUFFIXES = (".yaml", ".yml")

#: What flags alone say where the original's files have other defaults: those of Python, and resuming.
_WITHOUT_FILE = {
    "tiling.params.tissue_threshold": 0.01,
    "tiling.preview.save_mask_preview": False,
    "tiling.preview.save_tiling_preview": False,
    "resume": True,
}


def run(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml|SLIDES.csv] [KEY=VALUE]...",
            help="A configuration file, or a manifest, and what to change in the configuration.",
        ),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", "-m", help="CSV of the slides, or its URL; it may also come first."),
    ] = None,
    slides_dir: SlidesDir = None,
    id_from: Annotated[
        Literal["name", "path"] | None,
        typer.Option(
            help='Where no ids are given: the file\'s name, or its path with "__" for "/" [name].',
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            help="The encoder, or several (virchow2,uni2), for which slides are read once; "
            "see `slide2vec models`.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "--output-dir", "-o", help="Directory for the files, or s3://…, gs://…"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights.")] = None,
    output_variant: Annotated[str | None, typer.Option(help="Which output of the encoder.")] = None,
    spacing: Annotated[float | None, typer.Option(help="µm/px of the tiles [the preset's].")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of the tiles in px [the preset's].")] = None,
    region_tile_multiple: Annotated[
        int | None, typer.Option(help="Group tiles into regions of so many a side (2 or more).")
    ] = None,
    overlap: Annotated[float | None, typer.Option(help="Of neighbouring tiles, 0 to 1.")] = None,
    tissue_threshold: Annotated[float | None, typer.Option(help="Least tissue in a tile, 0 to 1.")] = None,
    segmentation_method: Method = None,
    segmentation_downsample: SegmentationDownsample = None,
    segmentation_weights: SegmentationWeights = None,
    sthresh: Sthresh = None,
    min_piece: MinPiece = None,
    qc: Qc = None,
    backend: Annotated[
        Backend | None, typer.Option(help="What reads the slides.", show_default=False, **BACKEND)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda, cuda:1, mps or cpu [the best]; of several presets also several: cuda:0,cuda:1."
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the encoder.", show_default=False)] = None,
    engine: Annotated[
        EngineChoice | None, typer.Option(help="What runs the encoder [auto].", show_default=False)
    ] = None,
    build_engine: BuildEngine = None,
    num_gpus: NumGpus = None,
    devices: Devices = None,
    executor: Annotated[
        Executor | None,
        typer.Option(help="This machine's devices, or those of a Ray cluster [local].", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help='Of the Ray cluster: host:port, or "auto" on one of its nodes.'),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tiles per forward pass [by device].")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Reading threads [all CPUs].")] = None,
    num_preprocessing_workers: Annotated[
        int | None, typer.Option(help="Slides tiled at once [all CPUs].")
    ] = None,
    stage_dir: Annotated[
        Path | None, typer.Option(help="Local folder to copy the next slides to, off slow storage.")
    ] = None,
    stage_gb: Annotated[float | None, typer.Option(help="GB it may take [half of what is free].")] = None,
    encoders_gb: Annotated[
        float | None,
        typer.Option(
            help="GB of memory for several presets at once [0.7 of what is free]; others take turns."
        ),
    ] = None,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(
            help="Local folder where decoded tiles wait for presets that take turns [--stage-dir, or TMPDIR]."
        ),
    ] = None,
    scratch_gb: Annotated[
        float | None, typer.Option(help="GB they may take; 0: none wait [half of what is free].")
    ] = None,
    file_format: Annotated[
        OutputFormat | None,
        typer.Option("--format", help="Of the embeddings [pt].", show_default=False, **FORMAT),
    ] = None,
    output_dtype: Annotated[
        Literal["fp32", "fp16"] | None, typer.Option(help="Of the embeddings.", show_default=False)
    ] = None,
    on_bad_tile: Annotated[
        Literal["fail", "skip"] | None,
        typer.Option(help="Fail a slide with damaged tiles, or leave these out.", show_default=False),
    ] = None,
    on_bad_slide: Annotated[
        Literal["fail", "skip"] | None,
        typer.Option(help="Fail a patient with a slide that fails, or skip it.", show_default=False),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Embed the I-th of N parts of the slides, 1/N to N/N.")
    ] = None,
    save_tile_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--save-tile-embeddings/--no-save-tile-embeddings", help="Also with models of slides, patients."
        ),
    ] = None,
    save_slide_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--save-slide-embeddings/--no-save-slide-embeddings", help="Also with models of patients."
        ),
    ] = None,
    save_latents: Annotated[
        bool | None,
        typer.Option("--save-latents/--no-save-latents", help="Also latents, with models that have them."),
    ] = None,
    save_tiles: Annotated[
        bool | None, typer.Option("--save-tiles/--no-save-tiles", help="Write tile archives, too.")
    ] = None,
    previews: Annotated[
        bool | None, typer.Option("--previews/--no-previews", help="Pictures of tissue and tiles.")
    ] = None,
    read_coordinates_from: Annotated[
        str | None, typer.Option(help="Directory (or URL) of coordinate files to use instead of tiling.")
    ] = None,
    read_tiles_from: Annotated[
        Path | None, typer.Option(help="Directory of tile archives to read instead of slides.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Keep what an earlier run finished, if settings agree [without a file: resume].",
        ),
    ] = None,
    fingerprint: Annotated[
        Literal["ends", "whole"] | None,
        typer.Option(help="Know slides by a digest of their ends, or read the whole of them for it."),
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the encoder's input in px, where it takes others.")
    ] = None,
    allow_non_recommended_settings: Annotated[
        bool | None,
        typer.Option(
            "--allow-non-recommended-settings/--only-recommended-settings",
            help="Other spacings and tile sizes than the preset's own.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    tiling_only: Annotated[
        bool, typer.Option("--tiling-only", help="Write coordinates, embed nothing.")
    ] = False,
    run_on_cpu: Annotated[
        bool, typer.Option("--run-on-cpu", help="The same as --device cpu --precision fp32.")
    ] = False,
    skip_datetime: Annotated[bool, typer.Option("--skip-datetime", hidden=True)] = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Embed the slides of a manifest onto disk: resumable, and no slide stops the others.

    From a configuration file (those of the original slide2vec work), from flags, or both: flags count
    over KEY=VALUE, which count over the file. The exit status is 1 when a slide failed.
    """
    from slide2vec.settings import load_settings

    path, manifest, overrides = _arguments(config or [], manifest)
    flags = {
        "csv": manifest,
        "slides_dir": slides_dir and str(slides_dir),
        "id_from": id_from,
        "model.name": preset,
        "output_dir": output,
        "model.weights": weights,
        "seed": seed,
        "model.output_variant": output_variant,
        "tiling.params.requested_spacing_um": spacing,
        "tiling.params.requested_tile_size_px": tile_size,
        "tiling.params.region_tile_multiple": region_tile_multiple,
        "tiling.params.overlap": overlap,
        "tiling.params.tissue_threshold": tissue_threshold,
        "tiling.seg_params.method": segmentation_method,
        "tiling.seg_params.downsample": segmentation_downsample,
        "tiling.seg_params.weights": segmentation_weights,
        "tiling.seg_params.sthresh": sthresh,
        "tiling.filter_params.a_t": min_piece,
        **{f"tiling.qc.{name}": value for name, value in quality_limits(qc).items()},
        "tiling.backend": backend,
        "model.device": "cpu" if run_on_cpu else device,
        "speed.precision": precision or ("fp32" if run_on_cpu else None),
        "speed.engine": engine,
        "speed.build_engine": None if build_engine is None else "auto" if build_engine else "never",
        "speed.num_gpus": num_gpus,
        "speed.devices": device_names(devices),
        "speed.executor": executor,
        "speed.ray_address": address,
        "model.batch_size": batch_size,
        "speed.num_dataloader_workers": num_workers,
        "speed.num_preprocessing_workers": num_preprocessing_workers,
        "speed.stage_dir": stage_dir and str(stage_dir),
        "speed.stage_gb": stage_gb,
        "speed.encoders_gb": encoders_gb,
        "speed.scratch_dir": scratch_dir and str(scratch_dir),
        "speed.scratch_gb": scratch_gb,
        "speed.shard": shard,
        "output_format": file_format,
        "speed.output_dtype": output_dtype,
        "on_bad_tile": on_bad_tile,
        "on_bad_slide": on_bad_slide,
        "model.save_tile_embeddings": save_tile_embeddings,
        "model.save_slide_embeddings": save_slide_embeddings,
        "model.save_latents": save_latents,
        "save_tiles": save_tiles,
        "tiling.preview.save_mask_preview": previews,
        "tiling.preview.save_tiling_preview": previews,
        "tiling.read_coordinates_from": read_coordinates_from,
        "tiling.read_tiles_from": read_tiles_from and str(read_tiles_from),
        "resume": resume,
        "fingerprint": fingerprint,
        "model.input_size_px": input_size,
        "model.allow_non_recommended_settings": allow_non_recommended_settings,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if path is None and output is None and not any(text.startswith("output_dir=") for text in overrides):
        raise ConfigError("say where files go: --output DIR")
    settings = load_settings(path, overrides, given, _WITHOUT_FILE if path is None else None)
    _run(settings, tiling_only=tiling_only, trust_remote_code=trust_remote_code, as_json=as_json)


def _arguments(given: list[str], manifest: str | None) -> tuple[Path | None, str | None, list[str]]:
    """The configuration file, the manifest, and what changes the configuration."""
    from slide2vec.manifests import MANIFEST_SUFFIXES
    from slide2vec.slides import SLIDE_SUFFIXES

    if not given or "=" in given[0]:
        return None, manifest, given
    first, overrides = given[0], given[1:]
    path = Path(first)
    suffix = path.suffix.lower()
    if suffix in MANIFEST_SUFFIXES:
        if manifest is not None:
            raise ConfigError(f"two manifests were given, {first} and {manifest}: leave one out")
        return None, first, overrides
    if suffix in SLIDE_SUFFIXES or path.is_dir():
        raise ConfigError(
            f"{first} is neither a manifest nor a configuration file. Slides by themselves are embedded "
            f"with: slide2vec embed {shlex.quote(first)} …"
        )
    return path, manifest, overrides


def _run(settings: RunSettings, *, tiling_only: bool, trust_remote_code: bool, as_json: bool) -> None:
    slides = _slides(settings)  # wrong lines are found before weights are loaded
    output_dir = settings.execution.output_dir
    assert output_dir is not None
    if tiling_only:
        from slide2vec.cli.tile import print_tiled, resolved, tile_and_report

        config = resolved(settings.preprocessing, *settings.presets)
        result = tile_and_report(slides, replace(settings, preprocessing=config))
        print_tiled(result, output_dir, as_json=as_json)
    elif _nothing_in_shard(settings, slides, as_json=as_json):
        return
    else:
        note(f"loading {settings.preset} …")  # before what takes seconds to import
        with without_collection():
            from slide2vec.cli.embed_run import embed_and_write
            from slide2vec.cli.outcome import print_report, print_report_of_several
            from slide2vec.models import Models

        model = _model(settings, trust_remote_code)
        report = embed_and_write(
            model,
            slides,
            settings.preprocessing,
            settings.execution,
            manifest_path=settings.manifest_path,
            slides_dir=settings.slides_dir,
            id_from=settings.id_from,
        )
        result, execution = report.result, settings.execution
        tile_size = settings.preprocessing.requested_tile_size_px
        if isinstance(model, Models):
            if as_json:
                encoders = {
                    name: {"encoder": model[name].identity(execution, tile_size), **each.as_json()}
                    for name, each in report.encoders.items()
                }
                summary = report.as_json()["summary"]  # of all of them, for time and energy
                print_json({"output_dir": output_dir, "encoders": encoders, "summary": summary})
            else:
                print_report_of_several(report, model, execution)
        elif as_json:
            identity = model.identity(execution, tile_size)
            print_json({"encoder": identity, "output_dir": output_dir, **report.as_json()})
        else:
            print_report(report, model, execution)
    if settings.execution.shard is not None:
        note(f"shard {settings.execution.shard}; when all are done: slide2vec merge -o {output_dir}")
    if result.failed or result.failed_patients:
        raise typer.Exit(1)


def _nothing_in_shard(settings: RunSettings, slides: list[Slide], *, as_json: bool) -> bool:
    """Whether there are fewer slides than shards, so that no model is needed; says so, and enters it."""
    from slide2vec.cohort.shard_lists import enter_empty
    from slide2vec.cohort.shards import is_empty
    from slide2vec.recipes import load_recipe

    shard, output_dir = settings.execution.shard, settings.execution.output_dir
    if shard is None:
        return False
    assert output_dir is not None
    of_patients = any(load_recipe(name).level == "patient" for name in settings.presets)
    if not is_empty(slides, shard, patients=of_patients):
        return False
    path = enter_empty(output_dir, shard, (slide.sample_id for slide in slides))
    note(f"shard {shard} is empty: {len(slides)} slides are divided among fewer shards")
    if as_json:
        print_json({"output_dir": output_dir, "slides": [], "failed": [], "process_list_path": path})
    return True


def _slides(settings: RunSettings) -> list[Slide]:
    from slide2vec.manifests import read_manifest
    from slide2vec.tiling.previous_files import recorded_slides

    if settings.manifest_path is not None:
        return read_manifest(settings.manifest_path, slides_dir=settings.slides_dir, id_from=settings.id_from)
    if settings.preprocessing.read_coordinates_from is not None:
        return recorded_slides(settings.preprocessing.read_coordinates_from)
    raise ConfigError(
        "say which slides: --manifest slides.csv (csv: in the configuration file), or "
        "--read-coordinates-from DIR for all that have coordinate files there"
    )


def _model(settings: RunSettings, trust_remote_code: bool) -> Model | Models:
    from slide2vec.model import Model
    from slide2vec.models import Models

    options: dict[str, Any] = {
        "weights": settings.weights,
        "seed": settings.seed,
        "device": settings.device,
        "output_variant": settings.output_variant,
        "precision": settings.execution.precision,
        "input_size_px": settings.input_size_px,
        "allow_non_recommended_settings": settings.allow_non_recommended_settings,
        "trust_remote_code": trust_remote_code,
    }
    names = settings.presets
    if len(names) == 1:
        return Model.from_preset(names[0], **options)
    if settings.weights not in (None, "random"):
        raise ConfigError(
            f"--weights {settings.weights} is for one preset, and {settings.preset} are {len(names)}: run "
            "them one by one into the same directory, or load each in Python (slide2vec.Models)"
        )
    devices = (settings.device or "").split(",")
    if len(devices) > 1:
        options |= {"devices": [name.strip() for name in devices], "device": None}
    return Models.from_presets(names, encoders_gb=settings.execution.encoders_gb, **options)
