"""`slide2vec engines`: the compiled encoders of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from slide2vec.cli.build_engine import COLUMNS, EnginesDir, engine_row
from slide2vec.cli.console import Debug, Json, facts, note, print_error, print_json, stdout, table
from slide2vec.errors import ConfigError, EngineError, Slide2VecError

if TYPE_CHECKING:
    from slide2vec.compile import EngineStore, StoredEngine

__all__ = ["engines"]

engines = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, show, remove and verify engines."
)

Name = Annotated[str, typer.Argument(help="An engine, or the beginning of its name.", show_default=False)]


def _store(folder: EnginesDir) -> EngineStore:
    from slide2vec.compile import EngineStore

    return EngineStore(folder)


@engines.command("list")
def list_engines(folder: EnginesDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the engines that are there."""
    store = _store(folder)
    found = list(store)
    if as_json:
        print_json([{"name": each.name, **each.record.as_dict()} for each in found])
    elif found:
        rows = [engine_row(engine) for engine in found]
        stdout().print(table(COLUMNS, rows, numbers=COLUMNS[3:]))
    else:
        typer.echo(f"No engines in {store.root}: `slide2vec build-engine --preset NAME` builds one.")


@engines.command()
def show(name: Name, folder: EnginesDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show everything about an engine."""
    engine = _store(folder).named(name)
    if as_json:
        print_json({"name": engine.name, "directory": engine.directory, **engine.record.as_dict()})
    else:
        stdout().print(facts(_facts(engine)))


def _facts(engine: StoredEngine) -> Iterator[tuple[str, str]]:
    from slide2vec.compile.engine_key import targets_of
    from slide2vec.compile.proof import as_proven, is_to_be_proven, state

    record = as_proven(engine).record
    yield "engine", engine.name
    yield "folder", str(engine.directory)
    yield "encoder", f"{record.preset} ({record.variant}), {record.feature_dim} dimensions"
    yield "input", f"{record.input_size_px} px, {record.layout}"
    asked = f" ({record.asked_precision} was asked for)" if record.precision != record.asked_precision else ""
    yield "runs in", f"{record.runtime}, {record.precision}{asked}"
    for step in record.steps_down:
        yield "", f"not in {step['precision']}: {step['reason']}"
    if record.left_out:
        yield "", f"in fp16, as fp8 disturbs them most: {', '.join(record.left_out)}"
    profile = record.profile
    yield "batches", f"{profile.min} to {profile.max} tiles, {profile.opt} best"
    if is_to_be_proven(record):
        yield "state", state(engine)
    if record.parity:
        yield (
            "parity",
            (
                f"cosine {record.parity['min_cosine']:.6f} at least, {record.parity['mean_cosine']:.6f} on "
                f"average, to PyTorch in fp32 over {record.parity['tiles']} tiles of tissue"
            ),
        )
    if record.speed:
        yield "speed", f"{record.speed['engine']:,.1f} tiles/s; PyTorch {record.speed['torch']:,.1f}"
    device = record.identity["device"]
    named = (str(value) for value in device.values() if isinstance(value, str))
    yield "for", ", ".join([*named, *targets_of(record)])
    yield "weights", str(record.identity["weights"])
    yield "built", f"{record.built_at} in {record.build_seconds:,.0f} s, {engine.size_bytes / 1e6:,.0f} MB"
    yield "with", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield "licence", record.licence


@engines.command()
def remove(
    names: Annotated[list[str], typer.Argument(help="Engines to delete.", show_default=False)],
    folder: EnginesDir = None,
    debug: Debug = False,
) -> None:
    """Delete engines."""
    store = _store(folder)
    for engine in [store.named(name) for name in names]:
        store.remove(engine)
        note(f"removed {engine.name}")


@engines.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Engines; by default all.", show_default=False)
    ] = None,
    folder: EnginesDir = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the engine's.")] = None,
    debug: Debug = False,
) -> None:
    """Check engines: files unchanged, running here, and as close to their encoders as when built."""
    store = _store(folder)
    found = [store.named(name) for name in names] if names else list(store)
    if not found:
        raise ConfigError(f"no engines in {store.root}")
    failed = 0
    for engine in found:
        try:
            _verify(engine, device)
        except Slide2VecError as error:
            failed += 1
            print_error(error)
    if failed:
        raise typer.Exit(1)


def _verify(engine: StoredEngine, device: str | None) -> None:
    import torch

    from slide2vec.compile.parity import verify_engine
    from slide2vec.compile.proof import is_to_be_proven, prove_anew, state
    from slide2vec.runtime import pick_device

    if is_to_be_proven(engine.record) and not torch.cuda.is_available():
        damage = engine.damage() or f"its files are as they were built; {state(engine)}"
        raise EngineError(f"engine {engine.name}: {damage} (PyTorch sees no GPU here)")
    check = prove_anew if is_to_be_proven(engine.record) else verify_engine
    parity = check(engine, pick_device(device or engine.record.identity["device"]["type"]))
    typer.echo(f"{engine.name}: good, cosine {parity.min_cosine:.6f} at least")
