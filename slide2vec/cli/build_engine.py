"""`slide2vec build-engine`: compile an encoder for this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slide2vec.choices import Precision, Runtime, learned_methods
from slide2vec.cli.console import (
    Debug,
    Json,
    Offline,
    note,
    print_error,
    print_json,
    stdout,
    table,
)
from slide2vec.cli.embed import TrustRemoteCode
from slide2vec.errors import ConfigError, Slide2VecError

if TYPE_CHECKING:
    from slide2vec.compile import BuildOptions, EngineStore, StoredEngine
    from slide2vec.compile.builders import Progress
    from slide2vec.encoders.patch_tokens import TokenKind
    from slide2vec.model import Model
    from slide2vec.tile_embedder import TileEmbedder

__all__ = ["EnginesDir", "build_engine", "building", "engine_row"]

EnginesDir = Annotated[
    Path | None,
    typer.Option(
        "--engines",
        "--output",
        "-o",
        help="Folder of engines [$SLIDE2VEC_ENGINES, else the user's cache].",
        show_default=False,
    ),
]
COLUMNS = ("engine", "runtime", "precision", "tiles/s", "PyTorch", "times", "cosine", "MB", "built in s")


def build_engine(
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="The encoder; see `slide2vec models`.")
    ] = None,
    segmenter: Annotated[
        str | None,
        typer.Option(help="In place of an encoder: a method of segmentation that is a network."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every preset that can be compiled and whose weights are there.")
    ] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(help="By default the preset's on a GPU, fp32 on a CPU.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tiles per forward pass [by encoder and device].")
    ] = None,
    runtime: Annotated[
        Runtime | None, typer.Option(help="By default the best for the device.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    output_variant: Annotated[str | None, typer.Option(help="Which output of the encoder.")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the encoder's input in px, where it takes others.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of the ONNX [23, else 20].", show_default=False)] = None,
    slide: Annotated[
        Path | None, typer.Option(help="Compare on its tissue [a generated slide].", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the best.")] = None,
    engines: EnginesDir = None,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="Keep the ONNX file beside it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build it although it is there.")] = False,
    workspace_gb: Annotated[
        float | None, typer.Option(help="TensorRT: most GPU memory for scratch [all].")
    ] = None,
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="TensorRT: more takes longer to build and runs faster.")
    ] = 3,
    hardware_compatibility: Annotated[
        Literal["none", "same_compute_capability", "ampere_plus"],
        typer.Option(help="TensorRT: other GPUs that may run it, more slowly."),
    ] = "none",
    target: Annotated[
        str | None,
        typer.Option(
            help="TensorRT-RTX: GPUs to build for, as sm89,sm120; needs none here "
            "[this GPU's; without one all since sm80].",
            show_default=False,
        ),
    ] = None,
    attention_block: Annotated[
        list[int] | None,
        typer.Option(
            help="With attention maps of this block as a further output, for `slide2vec attention`; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
    attention_registers: Annotated[
        bool, typer.Option("--attention-registers", help="Maps of the registers, too.")
    ] = False,
    attention_heads: Annotated[
        bool, typer.Option("--attention-heads", help="A map of each head, rather than their mean.")
    ] = False,
    patch_tokens: Annotated[
        Literal["patch_features", "patch_features_prenorm"] | None,
        typer.Option(
            help="Of patch tokens instead of features, for dense features; --input-size is then the side of "
            "a window, or of a region that is encoded at once.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a preset's encoder for this machine; from then on it is used by itself.

    The engine is compared with the encoder in fp32 on tiles of tissue and published only if it is close
    enough; a precision that is not is replaced by the next higher one, with a message. With --runtime
    tensorrt-rtx no GPU is needed: the engine is then compared at first use on one.
    """
    from slide2vec.compile import BuildOptions, EngineStore

    if [preset is not None, segmenter is not None, every].count(True) != 1:
        raise ConfigError("build-engine takes one of --preset NAME, --segmenter NAME and --all")
    options = BuildOptions(
        runtime=runtime,
        precision=precision,
        batch_size=batch_size,
        opset=opset,
        slide=slide,
        keep_onnx=keep_onnx,
        force=force,
        workspace_bytes=None if workspace_gb is None else int(workspace_gb * 1e9),
        optimization_level=optimization_level,
        hardware_compatibility=hardware_compatibility,
        targets=tuple(name.strip().lower() for name in target.split(",")) if target else (),
    )
    model = {
        "weights": weights,
        "seed": seed,
        "device": device,
        "output_variant": output_variant,
        "input_size_px": input_size,
        "trust_remote_code": trust_remote_code,
    }
    attention = None
    if attention_block:
        attention = {
            "blocks": tuple(attention_block),
            "include_registers": attention_registers,
            "mean_heads": not attention_heads,
        }
    if attention and patch_tokens:
        raise ConfigError("an engine is of attention maps or of patch tokens: give one of the two options")
    store = EngineStore(engines)
    if segmenter is not None:
        _print([_build_segmenter(segmenter, weights, seed, device, options, store)], {}, as_json)
        return
    names = [preset] if preset else _compilable()
    built: list[StoredEngine] = []
    failed: dict[str, Exception] = {}
    for name in names:
        try:
            built.append(_build(name, model, options, store, attention, patch_tokens))
        except (Slide2VecError, OSError) as error:
            if not every or debug:
                raise
            failed[name] = error
    _print(built, failed, as_json)
    if failed:
        raise typer.Exit(1)


def _compilable() -> list[str]:
    from slide2vec.recipes import list_models, load_recipe

    return [name for name in list_models("tile") if load_recipe(name).compile]


def _build(
    preset: str,
    model: dict[str, Any],
    options: BuildOptions,
    store: EngineStore,
    attention: dict[str, Any] | None,
    patch_tokens: TokenKind | None,
) -> StoredEngine:
    from slide2vec.compile.build import check_possible
    from slide2vec.recipes import load_recipe
    from slide2vec.runtime import pick_device

    recipe = load_recipe(preset)
    recipe.variant(model["output_variant"])  # what cannot work is found before anything slow
    check_possible(recipe, pick_device(model["device"]), options)
    note(f"loading {preset} …")
    from slide2vec.model import Model

    loaded = Model.from_preset(preset, **model)
    if patch_tokens is not None:
        return building(_of_patch_tokens(loaded, patch_tokens), store, options)
    if attention is None:
        return building(loaded, store, options)
    from slide2vec.attention_maps import with_attention
    from slide2vec.encoders.attention import AttentionEncoder

    own = loaded.tile_encoding
    return building(
        with_attention(own, AttentionEncoder(own.encoder, **attention), recipe.tile_size_px), store, options
    )


def _build_segmenter(
    name: str,
    weights: str | None,
    seed: int,
    device: str | None,
    options: BuildOptions,
    store: EngineStore,
) -> StoredEngine:
    """An engine of a learned segmenter: its features are the logits of every pixel.

    Raises:
        ConfigError: there is none of that name.
    """
    from slide2vec.compile import build_engine
    from slide2vec.compile.build import check_possible
    from slide2vec.encoders import build_encoder
    from slide2vec.recipes import segmenter_recipe
    from slide2vec.runtime import pick_device

    if name not in learned_methods():
        raise ConfigError(f"--segmenter {name} is not one of {', '.join(learned_methods())}")
    recipe, place = segmenter_recipe(name), pick_device(device)
    check_possible(recipe, place, options)
    note(f"loading {name} …")
    network = build_encoder(recipe, recipe.variants[recipe.default_variant], weights, seed)
    with _progress() as progress:
        return build_engine(
            network, recipe, recipe.default_variant, place, options, store=store, progress=progress
        )


def _of_patch_tokens(model: Model, kind: TokenKind) -> TileEmbedder:
    from slide2vec.encoders.patch_tokens import PatchTokenEncoder
    from slide2vec.images.token_engine import with_patch_tokens

    own = model.tile_encoding
    return with_patch_tokens(own, PatchTokenEncoder(own.encoder, kind), own.recipe.transform.crop)


def building(model: Model | TileEmbedder, store: EngineStore, options: BuildOptions) -> StoredEngine:
    """Build an engine and show progress on stderr."""
    from slide2vec.compile import build_engine

    with _progress() as progress:
        return build_engine(
            model.encoder, model.recipe, model.variant, model.device, options, store=store, progress=progress
        )


@contextmanager
def _progress() -> Iterator[Progress]:
    """Stages as lines on stderr, and a bar for those that count their steps."""
    from rich.console import Console
    from rich.progress import Progress

    noted: set[str] = set()  # phases of TensorRT nest: each is noted once
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", visible=False)

        def show(what: str, step: int, steps: int) -> None:
            if what not in noted:
                noted.add(what)
                note(f"{what} …")
            bars.update(task, description=what, completed=step, total=steps or None, visible=steps > 0)

        yield show


def engine_row(engine: StoredEngine) -> tuple[object, ...]:
    """An engine in a table with COLUMNS."""
    from slide2vec.compile.proof import as_proven

    record = as_proven(engine).record
    speed, plain = record.speed.get("engine"), record.speed.get("torch")
    return (
        engine.name,
        record.runtime,
        record.precision,
        f"{speed:,.1f}" if speed else "",
        f"{plain:,.1f}" if plain else "",
        f"{speed / plain:.2f}" if speed and plain else "",
        f"{record.parity['min_cosine']:.6f}" if record.parity else "unproven",
        f"{engine.size_bytes / 1e6:,.0f}",
        f"{record.build_seconds:,.0f}",
    )


def _print(built: list[StoredEngine], failed: dict[str, Exception], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "engines": [{"name": each.name, **each.record.as_dict()} for each in built],
                "failed": {name: str(error) for name, error in failed.items()},
            }
        )
        return
    if built:
        numbers = COLUMNS[3:]
        stdout().print(table(COLUMNS, [engine_row(engine) for engine in built], numbers=numbers))
        where = built[0].directory.parent
        typer.echo(f"\nIn {where}; used from now on where precision and machine are the same.")
    for engine in built:
        _print_remarks(engine)
    for name, error in failed.items():
        print_error(f"{name}: {error}")


def _print_remarks(engine: StoredEngine) -> None:
    from slide2vec.compile.proof import as_proven, is_to_be_proven, state

    record = as_proven(engine).record
    for step in record.steps_down:
        note(f"{record.preset}: not in {step['precision']}: {step['reason']}")
    if record.left_out:
        note(f"{record.preset}: in fp16, as fp8 disturbs them most: {', '.join(record.left_out)}")
    if is_to_be_proven(record):
        note(f"{engine.name}: {state(engine)}")
    if record.is_slower:
        note(f"{engine.name} is slower than PyTorch here: it is used only with --engine {record.runtime}")
    note(f"licence of {record.preset}: {record.licence}")
