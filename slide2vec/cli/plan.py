"""`slide2vec plan`: what a run will take, before it begins."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slide2vec.choices import Backend, EngineChoice, Precision
from slide2vec.cli.console import (
    BACKEND,
    Debug,
    Devices,
    IdSource,
    Json,
    Method,
    MinPiece,
    NumGpus,
    Offline,
    Overlap,
    SegmentationDownsample,
    SegmentationWeights,
    SlidesDir,
    Sthresh,
    TissueThreshold,
    device_names,
    given,
    note,
    print_json,
    tissue_options,
)
from slide2vec.cli.embed import TrustRemoteCode
from slide2vec.cli.plan_output import described, print_tables, write_csv
from slide2vec.errors import ConfigError, WeightsError
from slide2vec.lazy import without_collection

if TYPE_CHECKING:
    from slide2vec.config import ExecutionOptions, PreprocessingConfig
    from slide2vec.estimate import InTurns, Output, SlideEstimate, Trial
    from slide2vec.models import Models
    from slide2vec.recipes import Recipe
    from slide2vec.slides import Slide

__all__ = ["plan"]

#: Seconds that the encoder is tried for, where its speed is not given.
TRIAL_S = 10.0
#: Seconds that reading is tried for, where tiles wait in the scratch.
READING_S = 1.0


def plan(
    slides: Annotated[
        list[str],
        typer.Argument(
            help="Slides, directories of slides, glob patterns, or CSV manifests.", show_default=False
        ),
    ],
    preset: Annotated[
        str,
        typer.Option("--preset", "-p", help="The encoder, or several: virchow2,uni2.", show_default=False),
    ],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into subdirectories of directories.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="CSV to write, a line per slide.", show_default=False),
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="Of an hour of the machine: 2.5/h.", show_default=False)
    ] = None,
    speed: Annotated[
        list[float] | None,
        typer.Option(
            help="Tiles/s of each encoder here, of all devices together, if they are known.",
            show_default=False,
        ),
    ] = None,
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help=f"Try each encoder for {TRIAL_S:g} s.")
    ] = True,
    weights: Annotated[
        str | None, typer.Option(help='For the trial: weights, or "random"; by default from Hugging Face.')
    ] = None,
    spacing: Annotated[float | None, typer.Option(help="µm/px of the tiles [the preset's].")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of the tiles in px [the preset's].")] = None,
    overlap: Overlap = None,
    tissue_threshold: TissueThreshold = None,
    segmentation_method: Method = None,
    segmentation_downsample: SegmentationDownsample = None,
    segmentation_weights: SegmentationWeights = None,
    sthresh: Sthresh = None,
    min_piece: MinPiece = None,
    slides_dir: SlidesDir = None,
    id_from: IdSource = "name",
    spacing_at_level_0: Annotated[
        float | None,
        typer.Option("--spacing-at-level-0", help="µm/px of the slides, where the files are wrong."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What reads the slides.", **BACKEND)] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; by default the best.")] = None,
    num_gpus: NumGpus = None,
    devices: Devices = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the encoder.", show_default=False)] = None,
    engine: Annotated[EngineChoice, typer.Option(help="What runs the encoder.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Tiles per forward pass [by device].")] = None,
    encoders_gb: Annotated[
        float | None, typer.Option(help="GB of memory for several encoders at once [0.7 of what is free].")
    ] = None,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(help="Where decoded tiles wait for presets that take turns [TMPDIR]."),
    ] = None,
    scratch_gb: Annotated[
        float | None, typer.Option(help="GB they may take; 0: none wait [half of what is free].")
    ] = None,
    allow_non_recommended_settings: Annotated[
        bool, typer.Option("--allow-non-recommended-settings", help="Other spacings and tile sizes.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count the tiles of slides, and say what embedding them takes: bytes, hours, energy, money.

    Tissue is found as in a run, on a coarse level; no tile is read and nothing is embedded but for the trial.
    The exit status is 1 when a slide cannot be planned.
    """
    began = time.perf_counter()
    from slide2vec.cli.inputs import find_slides
    from slide2vec.cli.outcome import counted
    from slide2vec.config import ExecutionOptions, PreprocessingConfig
    from slide2vec.cpus import job_cpus
    from slide2vec.estimate import Trial, count_tiles, in_turns, read_together, unevenness
    from slide2vec.models import devices_of_preset
    from slide2vec.recipes import load_recipe
    from slide2vec.settings import preset_names

    names = preset_names(preset)
    recipes = {name: load_recipe(name) for name in names}
    if speed and len(speed) != len(names):
        raise ConfigError(f"--speed was given {len(speed)} times, and the encoders are {len(names)}")
    if speed and not min(speed) > 0:
        raise ConfigError(f"--speed must be above 0 tiles/s, and is {min(speed):g}")
    per_hour = _price(price)
    asked = PreprocessingConfig(
        backend=backend,
        **given(
            requested_spacing_um=spacing,
            requested_tile_size_px=tile_size,
            overlap=overlap,
            tissue_threshold=tissue_threshold,
        ),
        **tissue_options(
            segmentation_method, segmentation_downsample, sthresh, min_piece, segmentation_weights
        ),
    )
    execution = ExecutionOptions(
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        num_gpus=num_gpus,
        devices=tuple(device_names(devices) or ()) or None,
        encoders_gb=encoders_gb,
        scratch_dir=scratch_dir,
        scratch_gb=scratch_gb,
    )
    used = devices_of_preset(device, execution)
    found = find_slides(
        slides,
        recursive=recursive,
        spacing_at_level_0=spacing_at_level_0,
        slides_dir=slides_dir,
        id_from=id_from,
    )
    outputs = {name: _output(recipe, asked, execution) for name, recipe in recipes.items()}
    trials = {name: Trial(each) for name, each in zip(names, speed or (), strict=False)}
    models = None
    if not trials and trial:  # before the tissue is found, which takes longest: weights may be missing
        models = _models(
            names,
            weights=weights,
            device=device,
            precision=precision,
            allow_non_recommended_settings=allow_non_recommended_settings,
            trust_remote_code=trust_remote_code,
            encoders_gb=encoders_gb,
        )
    loading = time.perf_counter() - began  # which a run does, too
    note(f"finding the tissue of {counted(len(found), 'slide')} …")
    estimates = list(count_tiles(found, outputs, job_cpus()))
    tiles = {name: sum(each.tiles.get(name, 0) for each in estimates) for name in names}
    takes_over = _taking_over(recipes, outputs)
    encoded = {name: 0 if name in takes_over else count for name, count in tiles.items()}
    if output is not None:
        write_csv(output, estimates, names)
    places = dict.fromkeys(names, "this machine")
    groups = _groups(recipes, execution, device)
    if models is not None:
        places = {name: str(model.device) for name, model in models.items()}
        if len(names) > 1:
            groups = models.in_memory({name: each.config for name, each in outputs.items()}, execution)
    turns = saved_s = None
    levels = {name: recipe.level for name, recipe in recipes.items()}
    readings = read_together(groups, levels, found, len(used))
    if len(readings) > 1:  # before encoders are tried, as the scratch may be refused
        turns = in_turns(estimates, outputs, readings, execution, takes_over, len(used))
    if models is not None:
        trials = {
            name: replace(each, start_s=each.start_s + loading * (name in groups[0]))
            for name, each in _tried(models, _with_tiles(estimates), encoded, asked, execution).items()
        }
    if turns is not None:
        saved_s = _saved(turns, estimates, outputs, device, is_tried=trial and not speed)
        if output is not None:
            write_csv(output, estimates, names, turns)
    rows = list(
        _machines(
            encoded,
            trials,
            places,
            _gflops(recipes),
            per_hour,
            source=_source(len(used), given_speeds=bool(speed)),
            groups=groups,
            unevenness=unevenness(estimates, len(used)),
            saved_s=saved_s or 0.0,
        )
    )
    failed = [each for each in estimates if each.errors]
    if as_json:
        print_json(described(estimates, tiles, trials, rows, used, readings, turns, saved_s))
    else:
        print_tables(estimates, tiles, trials, rows, used, turns, saved_s, output)
    if failed:
        raise typer.Exit(1)


def _price(text: str | None) -> float | None:
    """Of "2.5/h", 2.5."""
    if text is None:
        return None
    try:
        number = float(text.strip().removesuffix("/h"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"--price {text} is no price of an hour, such as 2.5/h")
    return number


def _tile_recipe(recipe: Recipe) -> Recipe:
    from slide2vec.encoders.preset_chain import tile_recipe

    return tile_recipe(recipe)


def _output(recipe: Recipe, asked: PreprocessingConfig, execution: ExecutionOptions) -> Any:
    from slide2vec.estimate import Output

    below = _tile_recipe(recipe)
    config = asked.resolved(*recipe.tiles(asked.requested_spacing_um, asked.requested_tile_size_px))
    dim = below.variants[below.default_variant].dim
    return Output(config, dim, 4, keeps_tiles=recipe.level == "tile")


def _gflops(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    return {name: _tile_recipe(recipe).gflops for name, recipe in recipes.items()}


def _models(names: Sequence[str], **options: Any) -> Models:
    note(f"loading {', '.join(names)} …")
    with without_collection():
        from slide2vec.models import Models

    try:
        return Models.from_presets(names, **options)
    except WeightsError as error:
        raise WeightsError(
            f"{error}. A plan needs none: --weights random tries the speed, --speed says it, --no-trial "
            "leaves it open"
        ) from error


def _tried(
    models: Models,
    slides: Sequence[Slide],
    tiles: Mapping[str, int],
    asked: PreprocessingConfig,
    execution: ExecutionOptions,
) -> dict[str, Trial]:
    """How each encoder goes here, as far as there are tiles enough to tell."""
    from slide2vec.estimate import tried, with_build

    trials = {}
    for name, model in models.items():
        note(f"trying {name} for {TRIAL_S:g} s …")
        found = tried(model, slides, asked, execution, TRIAL_S)
        if found is None:
            note(f"the slides have too few tiles to tell the speed of {name}")
            continue
        gain = model.gain_of_build(model.resolve_preprocessing(asked), execution)
        trials[name] = with_build(found, gain, tiles[name])
        if trials[name].build_s:
            note(f"{name}: a run builds an engine first, in about {trials[name].build_s:.0f} s")
        if len(models) > 1:
            model.release()
    return trials


def _machines(
    tiles: Mapping[str, int],
    trials: Mapping[str, Trial],
    places: Mapping[str, str],
    gflops: Mapping[str, float],
    per_hour: float | None,
    *,
    source: str,
    groups: Sequence[Sequence[str]],
    unevenness: float,
    saved_s: float,
) -> Iterator[dict[str, Any]]:
    """Hours, energy and price on this machine and on known GPUs."""
    from slide2vec.estimate import HARDWARE, LEAST_GFLOPS, on_hardware, seconds_for

    def row(machine: str, seconds: float, watts: float | None, source: str) -> dict[str, Any]:
        hours = seconds / 3600
        return {
            "machine": machine,
            "hours": hours,
            "tiles_per_s": sum(tiles.values()) / seconds if seconds else None,
            "kwh": None if watts is None else hours * watts / 1000,
            "price": None if per_hour is None else hours * per_hour,
            "source": source,
        }

    if tiles.keys() <= trials.keys():
        yield row(
            "this machine",
            max(0.0, seconds_for(tiles, trials, places, groups, unevenness) - saved_s),
            None,
            source,
        )
    if min(gflops.values()) >= LEAST_GFLOPS:
        for gpu in HARDWARE:
            yield row(gpu.name, on_hardware(gpu, tiles, gflops), gpu.watts, gpu.source)


def _source(workers: int, *, given_speeds: bool) -> str:
    """Where the time on this machine comes from."""
    if given_speeds:
        return "speeds as given" + (f", of {workers} workers together" if workers > 1 else "")
    return "tried just now" + (f", by {workers} workers" if workers > 1 else "")


def _groups(
    recipes: Mapping[str, Recipe], execution: ExecutionOptions, device: str | None
) -> list[list[str]]:
    """Encoders that are in memory together."""
    if len(recipes) == 1:
        return [list(recipes)]
    from slide2vec.models import groups_of_presets

    return groups_of_presets(dict.fromkeys(recipes, device), execution)


def _taking_over(recipes: Mapping[str, Recipe], outputs: Mapping[str, Output]) -> set[str]:
    """Encoders of slides and patients that take over what another makes: their tile encoder is asked for,
    or their slide encoder, too."""
    made = [
        (recipe.reference, recipe.default_variant, outputs[name].config) for name, recipe in recipes.items()
    ]
    return {
        name
        for name, recipe in recipes.items()
        if any((*lower, outputs[name].config) in made for lower in _taken(recipe))
    }


def _taken(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The presets below a preset, and which of their outputs is taken."""
    from slide2vec.encoders.preset_chain import upstream
    from slide2vec.recipes import load_recipe

    while (lower := upstream(recipe)) is not None:
        recipe = load_recipe(lower[0])
        yield recipe.reference, lower[1] or recipe.default_variant


def _with_tiles(estimates: Sequence[SlideEstimate]) -> list[Slide]:
    return [each.slide for each in estimates if any(each.tiles.values())]


def _saved(
    turns: InTurns,
    estimates: Sequence[SlideEstimate],
    outputs: Mapping[str, Output],
    device: str | None,
    *,
    is_tried: bool,
) -> float | None:
    """Seconds that the scratch saves here; None where reading goes on beside the encoding."""
    from slide2vec.cpus import job_cpus
    from slide2vec.estimate import reading_seconds
    from slide2vec.runtime import pick_device

    if pick_device(device).type != "cpu":
        return None
    decoding = {}
    for output in outputs.values():
        tiles = output.config.requested_spacing_um, output.config.requested_tile_size_px
        if is_tried and tiles in turns.tiles_taken and tiles not in decoding:
            note(f"reading tiles of {tiles[1]} px for {READING_S:g} s …")
            decoding[tiles] = reading_seconds(_with_tiles(estimates), output.config, READING_S)
    return turns.saved_seconds(decoding, job_cpus())
