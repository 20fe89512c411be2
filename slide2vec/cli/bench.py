"""`slide2vec bench`: which runtime and precision is fastest for a preset on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from slide2vec.choices import Precision, Runtime
from slide2vec.cli.build_engine import EnginesDir, building
from slide2vec.cli.console import (
    Debug,
    Json,
    Offline,
    note,
    print_json,
    stdout,
    table,
)
from slide2vec.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from slide2vec.compile import EngineStore
    from slide2vec.compile.bench import Contender, Measured
    from slide2vec.model import Model

__all__ = ["bench"]

COLUMNS = (
    "runs in",
    "batch",
    "tiles/s",
    "times PyTorch fp32",
    "ms a batch",
    "cosine",
    "peak MB",
    "start s",
    "",
)
#: Width of the longest bar, in characters.
BAR = 24


def bench(
    preset: Annotated[str, typer.Option("--preset", "-p", help="The encoder; see `slide2vec models`.")],
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="Besides PyTorch [all that can be built here].", show_default=False),
    ] = None,
    precisions: Annotated[
        list[str] | None,
        typer.Option("--precision", help="[fp32, bf16 and, on a GPU, the preset's]", show_default=False),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="[1 and the preset's]", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In which they take turns.")] = 3,
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the best.")] = None,
    engines: EnginesDir = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare runtimes, precisions and batch sizes; engines that are missing are built, and kept."""
    from slide2vec.compile import EngineStore
    from slide2vec.compile.batch_size import batch_size_for
    from slide2vec.compile.bench import measure
    from slide2vec.compile.comparison_tiles import tissue_pixels
    from slide2vec.cpus import Budget
    from slide2vec.model import Model
    from slide2vec.recipes import load_recipe

    load_recipe(preset)
    _check("--runtime", runtimes, get_args(Runtime))
    _check("--precision", precisions, get_args(Precision))
    note(f"loading {preset} …")
    model = Model.from_preset(preset, weights=weights, seed=seed, device=device)
    recipe = model.recipe
    usual = ("fp32", "bf16", *([recipe.precision] if model.device.type == "cuda" else []))
    wanted = precisions or list(dict.fromkeys(usual))
    origin = {"weights": weights, "seed": seed}
    contenders = list(_contenders(model, origin, runtimes, wanted, EngineStore(engines)))
    default = sorted({1, batch_size_for(recipe.gflops, model.device)})
    sizes = sorted(set(batch_sizes)) if batch_sizes else default
    note("measuring …")
    found = measure(
        contenders,
        (recipe.transform.mean, recipe.transform.std),
        tissue_pixels(recipe, 16),
        sizes,
        rounds,
        Budget.of("cpu", gflops=recipe.gflops).encoder_threads if model.device.type == "cpu" else None,
    )
    if as_json:
        print_json([row for each in found for row in as_rows(each, found, sizes)])
    else:
        _print(found, sizes)


def _check(option: str, given: list[str] | None, allowed: tuple[str, ...]) -> None:
    """Typer has no lists of choices."""
    for value in given or ():
        if value not in allowed:
            raise ConfigError(f"{option} {value}: it is one of {', '.join(allowed)}")


def _contenders(
    model: Model,
    origin: dict[str, Any],
    runtimes: list[str] | None,
    precisions: list[str],
    store: EngineStore,
) -> Iterator[Contender]:
    """PyTorch in fp32 first, then in the other precisions, then the engines."""
    from slide2vec.compile import BuildOptions
    from slide2vec.compile.bench import Contender
    from slide2vec.compile.builders import unavailable
    from slide2vec.runtime.loading import runtimes_for
    from slide2vec.runtime.torch_engine import DTYPES

    common = {
        **origin,
        "preset": model.name,
        "variant": model.variant,
        "device": str(model.device),
    }
    for precision in dict.fromkeys(("fp32", *precisions)):
        if precision in DTYPES:
            yield Contender(runtime="torch", precision=precision, **common)
    for runtime in runtimes or runtimes_for(model.device):
        for precision in precisions:
            if reason := unavailable(runtime, precision, model.device):
                note(f"without {runtime} in {precision}: {reason}")
                continue
            try:
                engine = building(model, store, BuildOptions(runtime=runtime, precision=precision))
            except EngineError as error:
                note(f"without {runtime} in {precision}: {error}")
                continue
            if engine.record.precision == precision:  # else it is in the list, or will be
                yield Contender(runtime=runtime, precision=precision, directory=engine.directory, **common)


def as_rows(each: Measured, found: list[Measured], sizes: list[int]) -> Iterator[dict[str, Any]]:
    """A contender's figures, one row per batch size; JSON-ready."""
    from slide2vec.compile.bench import speedups

    for size in sizes:
        speed = each.tiles_per_s(size)
        yield {
            "runtime": each.contender.runtime,
            "precision": each.contender.precision,
            "batch_size": size,
            "tiles_per_s": round(speed, 2),
            "times_torch_fp32": round(speedups(found, size)[each.contender.name], 3),
            "ms_per_batch": round(1000 * size / speed, 2),
            "min_cosine": round(each.min_cosine, 6),
            "peak_mb": round(each.peak_mb),
            "start_s": round(each.start_s, 1),
            "rounds_s_per_batch": [round(value, 4) for value in each.seconds[size]],
        }


def _print(found: list[Measured], sizes: list[int]) -> None:
    rows = [row for size in sizes for each in found for row in as_rows(each, found, [size])]
    most = max(row["tiles_per_s"] for row in rows)
    cells = [
        (
            f"{row['runtime']} {row['precision']}",
            row["batch_size"],
            f"{row['tiles_per_s']:,.1f}",
            f"{row['times_torch_fp32']:.2f}",
            f"{row['ms_per_batch']:,.0f}",
            f"{row['min_cosine']:.6f}",
            f"{row['peak_mb']:,}",
            f"{row['start_s']:.1f}",
            "█" * max(1, round(BAR * row["tiles_per_s"] / most)),
        )
        for row in rows
    ]
    stdout().print(table(COLUMNS, cells, numbers=COLUMNS[1:-1]))
    best = max(rows, key=lambda row: row["tiles_per_s"])
    typer.echo(f"\nFastest: {best['runtime']} {best['precision']}, batches of {best['batch_size']}.")
