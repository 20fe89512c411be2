"""`slide2vec models`: which presets and segmenters there are and what each needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slide2vec.cli.console import Debug, Json, facts, print_json, stdout, table

if TYPE_CHECKING:
    from slide2vec.recipes import Recipe

__all__ = ["models"]


def models(
    name: Annotated[
        str | None,
        typer.Argument(help="A preset or a segmenter, to see everything about it.", show_default=False),
    ] = None,
    level: Annotated[
        Literal["tile", "slide", "patient"] | None,
        typer.Option(help="Only presets that embed these.", show_default=False),
    ] = None,
    only_segmenters: Annotated[
        bool, typer.Option("--segmenters", help="The networks that find tissue, and plug-ins that do.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the presets and the segmenters, or show one."""
    from slide2vec.choices import learned_methods
    from slide2vec.cli.segmenters import networks, print_segmenters, segmenter_details, segmenters
    from slide2vec.recipes import list_models, load_recipe, segmenter_recipe

    if name in learned_methods():
        if as_json:
            print_json(next(row for row in networks() if row["name"] == name))
        else:
            recipe = segmenter_recipe(name)
            _print_details(recipe, segmenter_details(recipe))
        return
    if only_segmenters:
        (print_json if as_json else print_segmenters)(segmenters())
        return
    recipes = [load_recipe(name)] if name else [load_recipe(each) for each in list_models(level)]
    if as_json:
        content = [{**each.model_dump(mode="json"), "checked": _checked(each)} for each in recipes]
        print_json(content[0] if name else content)
        return
    if name:
        _print_details(recipes[0], _details(recipes[0]))
        return
    console = stdout()
    columns = ("preset", "dim", "params", "tile", "µm/px", "licence", "check")
    for heading in ("tile", "slide", "patient"):
        if rows := [_row(recipe) for recipe in recipes if recipe.level == heading]:
            console.print(f"{heading} level", style="bold")
            console.print(table(columns, rows, numbers=("dim", "params", "tile")))
            console.print()
    console.print(_FOOTNOTE, style="dim")
    if level is None:
        console.print()
        print_segmenters(segmenters())


_FOOTNOTE = (
    "Gated weights ask for access first. Check: our loader was compared with the original one, with the "
    "published weights (yes) or with random ones (random). `slide2vec models NAME` tells where and how. "
    "Any model of timm works, too: timm:resnet50, hf-hub:owner/repo."
)


def _row(recipe: Recipe) -> tuple[object, ...]:
    return (
        recipe.name,
        recipe.variants[recipe.default_variant].dim,
        "?" if _is_registered(recipe) else f"{recipe.params_m:.0f}M" if recipe.params_m else "none",
        recipe.tile_size_px,
        _spacing_range(recipe),
        _licence(recipe),
        _checked(recipe),
    )


def _checked(recipe: Recipe) -> str:
    """How the loader was compared with the original one, in a word."""
    if recipe.weights is None:
        return "yes"
    if not recipe.verified:
        return "no"
    return "random" if recipe.unconfirmed else "yes"


def _is_registered(recipe: Recipe) -> bool:
    """Whether it is a class of somebody else's, of which the rest is known when it is built."""
    return recipe.encoder.family == "registered"


def _spacing_range(recipe: Recipe) -> str:
    known = recipe.spacing_um
    return f"{min(known):g}-{max(known):g}" if len(known) > 1 else _spacings(recipe)


def _spacings(recipe: Recipe) -> str:
    return ", ".join(f"{value:g}" for value in recipe.spacing_um) or "any"


def _licence(recipe: Recipe) -> str:
    if recipe.weights is None:
        return "no weights needed"
    if _is_registered(recipe):
        return "registered"
    return f"{recipe.licence.name}{' gated' if recipe.weights.gated else ''}"


def _print_details(recipe: Recipe, details: Iterator[tuple[str, str]]) -> None:
    console = stdout()
    console.print(f"{recipe.name}: {recipe.title}", style="bold", markup=False)
    console.print(recipe.summary, markup=False)
    console.print()
    console.print(facts(details))


def _details(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "level", recipe.level
    if recipe.aliases:
        yield "also called", ", ".join(recipe.aliases)
    for variant_name, variant in recipe.variants.items():
        default = " (default)" if variant_name == recipe.default_variant and len(recipe.variants) > 1 else ""
        unit = ", of length 1" if variant.normalise else ""
        yield "output", f"{variant_name}: {variant.dim} dimensions{unit}{default}"
    yield from _feeding(recipe)
    yield "tiles", f"{recipe.tile_size_px} px at {_spacings(recipe)} µm/px{_default_spacing(recipe)}"
    yield "transform", "its own" if _is_registered(recipe) else _transform(recipe)
    if recipe.images is not None:
        made = recipe.images
        yield "images", f"resize to {made.resize} px ({made.interpolation}), central {made.crop} px"
    if _is_registered(recipe):
        yield "source", recipe.citation
        yield "", "the rest is known when it is built"
        return
    work = f", {recipe.gflops:.4g} GFLOP per tile" if recipe.level == "tile" else ""
    parameters = f"{recipe.params_m:,.0f} M" if recipe.params_m else "none"
    yield "size", f"{parameters} parameters{work}"
    if recipe.params_m:
        yield "memory", ", ".join(f"{_memory(recipe, bits)} in {name}" for name, bits in _PRECISIONS.items())
    on_cpu = "" if recipe.encoder.arch == "prism2" else ", fp32 on a CPU"
    yield "precision", f"{recipe.precision} on a GPU{on_cpu}"
    if recipe.precision_note:
        yield "", recipe.precision_note
    yield from _access(recipe)
    yield "cite", recipe.citation
    if recipe.note:
        yield "note", recipe.note
    if recipe.verified:
        yield "verified", recipe.verified
    if recipe.unconfirmed:
        yield "unconfirmed", recipe.unconfirmed


def _feeding(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What is embedded first, above the tile level."""
    if recipe.has_latents:
        yield "latents", "beside the embedding, with save_latents"
    if recipe.tile_encoder is not None:
        yield "fed by", f"{recipe.tile_encoder.preset}, output {recipe.tile_encoder.variant}"
    if recipe.slide_encoder is not None:
        yield "fed by", recipe.slide_encoder


def _access(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "compiling", _compiling(recipe)
    yield "licence", f"{recipe.licence.name}: {recipe.licence.terms}"
    source = recipe.weights
    if source is None:
        yield "weights", "none needed"
        return
    yield "weights", source.page
    if source.revision:
        yield "revision", source.revision
    if source.note:
        yield "", source.note
    if source.gated:
        yield "access", f"gated: ask at {recipe.licence.url}, then `hf auth login` (or set HF_TOKEN)"
    elif source.url:
        yield "access", f'by hand: get {source.files[0]} there and pass weights="/path/to/it"'
    elif not recipe.generic:
        yield "access", "open: downloaded when first used"
    if recipe.encoder.family == "remote":
        yield "code", "of that repository runs on your machine: asks for --trust-remote-code"


#: Bits of a parameter.
_PRECISIONS = {"fp32": 32, "fp16 or bf16": 16}


def _memory(recipe: Recipe, bits: int) -> str:
    """Of the parameters; activations come on top, by batch size."""
    gigabytes = recipe.params_m * bits / 8 / 1000
    return f"{gigabytes:.2g} GB" if gigabytes < 1 else f"{gigabytes:.1f} GB"


def _default_spacing(recipe: Recipe) -> str:
    if recipe.default_spacing_um is None:
        return " (say which)"
    return f" (default {recipe.default_spacing_um:g})" if len(recipe.spacing_um) != 1 else ""


def _transform(recipe: Recipe) -> str:
    """What becomes of a tile before the encoder sees it."""
    made = recipe.transform
    steps = (
        [f"resize to {made.resize} px ({made.interpolation})"] if made.resize != recipe.tile_size_px else []
    )
    steps += [f"central {made.crop} px"] if made.crop != made.resize else []
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (made.mean, made.std))
    return ", ".join([*steps, f"mean {mean}, standard deviation {std}"])


def _compiling(recipe: Recipe) -> str:
    can = "possible" if recipe.compile else "not possible"
    return f"{can}: {recipe.compile_note}" if recipe.compile_note else can
