"""The tables of docs/choosing.md, made from the recipes.

python tools/docs/presets.py writes them into the page; a test says when that is due.
"""

from __future__ import annotations

from pathlib import Path

from slide2vec import list_models
from slide2vec.recipes import Recipe, load_recipe

__all__ = ["with_tables"]

PAGE = Path(__file__).parents[2] / "docs/choosing.md"
_BEGIN, _END = "<!-- {}: made by tools/docs/presets.py -->", "<!-- end of {} -->"
_COLUMNS = {
    "tile": ("preset", "encoder", "D", "tiles", "parameters", "GFLOP a tile", "weights", "licence"),
    "slide": ("preset", "of", "encoder", "D", "fed by", "tiles", "weights", "licence"),
}


def with_tables(text: str) -> str:
    """The page with its tables as they should be."""
    recipes = [load_recipe(name) for name in list_models()]
    tiles = [_tile_row(recipe) for recipe in recipes if recipe.level == "tile"]
    above = sorted(
        (recipe for recipe in recipes if recipe.level != "tile"), key=lambda one: one.level != "slide"
    )
    text = _replaced(text, "tile", tiles)
    return _replaced(text, "slide", [_slide_row(recipe) for recipe in above])


def _replaced(text: str, name: str, rows: list[tuple[str, ...]]) -> str:
    begin, end = _BEGIN.format(name), _END.format(name)
    before, _, rest = text.partition(begin)
    columns = _COLUMNS[name]
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return before + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]


def _tile_row(recipe: Recipe) -> tuple[str, ...]:
    size = f"{recipe.params_m:,.0f} M" if recipe.params_m else "–"
    work = f"{recipe.gflops:,.0f}" if recipe.gflops >= 1 else "under 1"
    return (f"`{recipe.name}`", recipe.title, _dim(recipe), _tiles(recipe), size, work, *_access(recipe))


def _slide_row(recipe: Recipe) -> tuple[str, ...]:
    if recipe.tile_encoder is not None:
        fed = f"`{recipe.tile_encoder.preset}`"
    else:
        fed = f"`{recipe.slide_encoder}`"
    kind = f"{recipe.level}s"
    return (f"`{recipe.name}`", kind, recipe.title, _dim(recipe), fed, _tiles(recipe), *_access(recipe))


def _dim(recipe: Recipe) -> str:
    return str(recipe.variants[recipe.default_variant].dim)


def _tiles(recipe: Recipe) -> str:
    spacings = [f"{spacing:g}" for spacing in recipe.spacing_um]
    return f"{recipe.tile_size_px} px, " + (f"{', '.join(spacings)} µm/px" if spacings else "any µm/px")


def _access(recipe: Recipe) -> tuple[str, str]:
    licence = f"[{recipe.licence.name}]({recipe.licence.url})"
    if recipe.weights is None:
        return "none needed", licence
    how = "gated" if recipe.weights.gated else "open" if recipe.weights.repo else "by hand"
    return how + (", runs remote code" if recipe.encoder.family == "remote" else ""), licence


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
