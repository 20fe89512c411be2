"""`slide2vec models`: which presets there are and what each needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slide2vec.cli.console import Debug, Json, facts, print_json, stdout, table

if TYPE_CHECKING:
    from slide2vec.recipes import Recipe

__all__ = ["models"]


def models(
    name: Annotated[
        str | None, typer.Argument(help="A preset, to see everything about it.", show_default=False)
    ] = None,
    level: Annotated[
        Literal["tile", "slide", "patient"] | None,
        typer.Option(help="Only presets that embed these.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the presets, or show one."""
    from slide2vec.recipes import list_models, load_recipe

    recipes = [load_recipe(name)] if name else [load_recipe(each) for each in list_models(level)]
    if as_json:
        content = [_as_json(recipe) for recipe in recipes]
        print_json(content[0] if name else content)
        return
    if name:
        _print_details(recipes[0])
        return
    rows = [_row(recipe) for recipe in recipes]
    columns = ("preset", "level", "dim", "params", "tile", "µm/px", "licence")
    console = stdout()
    console.print(table(columns, rows, numbers=("dim", "params", "tile")))
    console.print("\nGated weights ask for access first; `slide2vec models NAME` tells where.", style="dim")


def _row(recipe: Recipe) -> tuple[object, ...]:
    return (
        recipe.name,
        recipe.level,
        recipe.variants[recipe.default_variant].dim,
        _params(recipe),
        recipe.tile_size_px,
        _spacings(recipe, " "),
        _licence(recipe),
    )


def _params(recipe: Recipe) -> str:
    return f"{recipe.params_m:,.0f} M" if recipe.params_m else "none"


def _spacings(recipe: Recipe, separator: str = ", ") -> str:
    return separator.join(f"{value:g}" for value in recipe.spacing_um) or "any"


def _licence(recipe: Recipe) -> str:
    if recipe.weights is None:
        return "no weights needed"
    return f"{recipe.licence.name}{', gated' if recipe.weights.gated else ''}"


def _print_details(recipe: Recipe) -> None:
    console = stdout()
    console.print(f"{recipe.name}: {recipe.title}", style="bold", markup=False)
    console.print(recipe.summary, markup=False)
    console.print()
    console.print(facts(_details(recipe)))


def _details(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "level", recipe.level
    for variant_name, variant in recipe.variants.items():
        default = " (default)" if variant_name == recipe.default_variant and len(recipe.variants) > 1 else ""
        yield "output", f"{variant_name}: {variant.dim} dimensions{default}"
    tile = f"{recipe.tile_size_px} px at {_spacings(recipe)} µm/px"
    default = f" (default {recipe.default_spacing_um:g})" if len(recipe.spacing_um) != 1 else ""
    yield "tiles", tile + default
    yield "size", f"{_params(recipe)} parameters, {recipe.gflops:g} GFLOP per tile"
    yield "precision", f"{recipe.precision} on a GPU, fp32 on a CPU"
    yield "licence", f"{recipe.licence.name}: {recipe.licence.terms}"
    if recipe.weights is None:
        yield "weights", "none needed"
    else:
        yield "weights", f"https://huggingface.co/{recipe.weights.repo}"
        yield "revision", recipe.weights.revision
    if recipe.weights is not None and recipe.weights.gated:
        yield "access", f"gated: ask at {recipe.licence.url}, then `hf auth login` (or set HF_TOKEN)"
    yield "cite", recipe.citation
    if recipe.note:
        yield "note", recipe.note


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")
