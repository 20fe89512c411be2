"""Segmentation methods for `slide2vec models` and `doctor`: our networks, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from slide2vec.choices import SEGMENTATION_METHODS, learned_methods
from slide2vec.cli.console import stdout, table
from slide2vec.cli.doctor_plugins import SEGMENTERS, problem_of
from slide2vec.plugins import providers

if TYPE_CHECKING:
    from slide2vec.recipes import Recipe

__all__ = ["cached_weights", "networks", "print_segmenters", "segmenter_details", "segmenters"]

Row = dict[str, Any]


def segmenters() -> list[Row]:
    """Each network and each plug-in: name, classes, µm/px, parameters, licence, where its weights come from,
    and where they are on this machine (None where they are not)."""
    plugins = (entry for entry in providers(SEGMENTERS) if entry.name not in SEGMENTATION_METHODS.ours)
    return [*networks(), *map(_plugin_row, plugins)]


def networks() -> list[Row]:
    """As `segmenters`, of ours alone: no code of others runs."""
    from slide2vec.recipes import segmenter_recipe

    return [_row(name, segmenter_recipe(name)) for name in learned_methods()]


def cached_weights(recipe: Recipe) -> str | None:
    """The file of a recipe's weights in the cache of the Hugging Face hub; None where it is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # which `doctor` says
        return None
    source = recipe.weights
    if source is None or not source.repo:
        return None
    for name in source.files:
        path = try_to_load_from_cache(source.repo, name, revision=source.revision)
        if isinstance(path, str):
            return path
    return None


def print_segmenters(rows: Iterable[Row]) -> None:
    """As a table."""
    columns = ("method", "classes", "µm/px", "licence", "weights")
    shown = [
        (
            row["name"],
            ", ".join(row["classes"]),
            "" if row["spacing_um"] is None else f"{row['spacing_um']:g}",
            row["licence"] or row["package"],
            row["problem"] or _weights_in_short(row),
        )
        for row in rows
    ]
    console = stdout()
    console.print("segmentation methods with weights, and of other packages", style="bold")
    console.print(table(columns, shown, numbers=("µm/px",)))
    console.print()
    console.print(_FOOTNOTE, style="dim", markup=False)


_FOOTNOTE = (
    "hsv (the default), otsu, threshold and auto need no weights. Weights: here, of the hub (downloaded when "
    "first used), or by hand (get the file, and say where: --segmentation-weights FILE). "
    "`slide2vec models NAME` tells more of one."
)


def segmenter_details(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """All about a network, a line each."""
    yield "finds", ", ".join(_classes(recipe))
    yield (
        "looks at",
        f"{recipe.tile_size_px} x {recipe.tile_size_px} px at {recipe.default_spacing_um:g} µm/px",
    )
    yield "size", f"{recipe.params_m:,.1f} M parameters, {recipe.gflops:.4g} GFLOP each time"
    yield "compiling", "possible" if recipe.compile else f"not possible: {recipe.compile_note}"
    yield "licence", f"{recipe.licence.name}: {recipe.licence.terms}"
    row = _row(recipe.name, recipe)
    yield "weights", row["source"]
    yield "", row["path"] or _how_to_get(row)
    if recipe.weights is not None and recipe.weights.note:
        yield "", recipe.weights.note
    yield "cite", recipe.citation
    yield "note", recipe.note
    yield "verified", recipe.verified
    yield "unconfirmed", recipe.unconfirmed


def _row(name: str, recipe: Recipe) -> Row:
    source = recipe.weights
    assert source is not None
    return {
        "name": name,
        "title": recipe.title,
        "classes": _classes(recipe),
        "spacing_um": recipe.default_spacing_um,
        "params_m": recipe.params_m,
        "licence": recipe.licence.name,
        "source": source.page,
        "files": list(source.files),
        "by_hand": not source.repo,
        "path": cached_weights(recipe),
        "package": None,
        "problem": None,
    }


def _classes(recipe: Recipe) -> list[str]:
    """What it tells from background."""
    names = dict.fromkeys(recipe.encoder.kwargs["classes"])
    return [name for name in names if name != "background"]


def _plugin_row(entry: EntryPoint) -> Row:
    problem = problem_of(entry)
    loaded = None if problem else entry.load()
    return {
        "name": entry.name,
        "title": entry.value,
        "classes": [name for name in getattr(loaded, "names", ()) if name != "background"],
        "spacing_um": getattr(loaded, "spacing_um", None),
        "params_m": None,
        "licence": None,
        "source": None,
        "files": [],
        "by_hand": False,
        "path": None,
        "package": None if entry.dist is None else f"{entry.dist.name} {entry.dist.version}",
        "problem": problem,
    }


def _weights_in_short(row: Row) -> str:
    if row["source"] is None:
        return "its package's"
    return "here" if row["path"] else "by hand" if row["by_hand"] else "hub"


def _how_to_get(row: Row) -> str:
    if row["by_hand"]:
        return f"by hand: get {row['files'][0]} there, and say --segmentation-weights /path/to/it"
    return "not here yet: downloaded when first used"
