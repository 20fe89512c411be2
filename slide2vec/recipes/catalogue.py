"""All recipes: read from their files, and found by the name of a preset.

A preset of a slide encoder names the tile preset that feeds it, one of a patient encoder the slide preset.
Users' recipes are files of theirs, named by their path or found in the folders of SLIDE2VEC_RECIPES.
"""

from __future__ import annotations

import functools
import logging
import os
import tomllib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from slide2vec.errors import PresetError, nearest_names
from slide2vec.plugins import EncoderProviderDiagnostic, Registry
from slide2vec.recipes.elsewhere import named_elsewhere
from slide2vec.recipes.recipe import GENERIC, Level, Recipe, in_words
from slide2vec.recipes.timm_recipe import generic_recipe

__all__ = [
    "REGISTERED",
    "Registered",
    "all_recipes",
    "is_built_in",
    "list_encoder_provider_diagnostics",
    "list_models",
    "load_recipe",
    "read_recipe",
    "segmenter_recipe",
]

logger = logging.getLogger(__name__)

#: Folders with recipes of users, separated as in PATH.
SEARCH_PATH = "SLIDE2VEC_RECIPES"
SUFFIX = ".toml"


def _recipe_dir() -> Path:
    """`engines/` inside the installed package, or at the top of the source tree."""
    installed = Path(__file__).parents[1] / "engines"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "engines"


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe file; its stem is the preset's name.

    Raises:
        PresetError: the file is not TOML or breaks the schema; names the file and the keys.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        where = {} if _recipe_dir() in path.parents else {"file": str(path.absolute())}
        return Recipe(name=path.stem, **where, **_with_transform(content, path))
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise PresetError(f"recipe {path}: {error}") from error
    except ValidationError as error:
        raise PresetError(f"recipe {path}: {in_words(error)}") from None


def _with_transform(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe file's content; above the tile level with the transform of the preset that feeds it,
    unless `fed_with` is what its authors fed it with."""
    level = content.get("level", "tile")
    if level not in ("slide", "patient"):
        return content
    key, below = ("tile_encoder", "tile") if level == "slide" else ("slide_encoder", "slide")
    named = content.get(key)
    preset = named.get("preset") if isinstance(named, dict) else named
    if not isinstance(preset, str):
        raise PresetError(f"recipe {path}: a {level} preset needs {key}: the {below} preset that feeds it")
    if "transform" in content:
        raise PresetError(f"recipe {path}: transform is that of {preset}, and not to be given again")
    made = {name: value for name, value in content.items() if name != "fed_with"}
    feeder = _feeder(preset, path)
    if isinstance(named, dict):
        made[key] = {**named, "preset": feeder.reference}
    else:
        made[key] = feeder.reference
    if feeder.level != below:
        raise PresetError(f"recipe {path}: {key} names {preset}, which is a {feeder.level} preset")
    if isinstance(named, dict):
        feeder.variant(named.get("variant"))
    return {**made, "transform": content.get("fed_with", feeder.transform)}


def _feeder(preset: str, path: Path) -> Recipe:
    """The preset that feeds the one of a recipe file: a file beside it where it is one's own, or any."""
    beside = path.parent / (preset if preset.endswith(SUFFIX) else f"{preset}{SUFFIX}")
    if beside.is_file():
        return read_recipe(beside)
    try:
        return load_recipe(preset)
    except PresetError as error:
        raise PresetError(f"recipe {path}: {error}") from None


@functools.cache
def all_recipes() -> dict[str, Recipe]:
    """The recipes of all presets by name, sorted."""
    paths = sorted(_recipe_dir().glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: read_recipe(path) for path in paths}


@functools.cache
def segmenter_recipe(name: str) -> Recipe:
    """The recipe of a learned method of segmentation. Its "features" are logits of every pixel, so that it is
    none of the presets."""
    return read_recipe(_recipe_dir() / "segmenters" / f"{name}{SUFFIX}")


class Registered(NamedTuple):
    """An encoder that `register_encoder` has made a preset.

    Attributes:
        recipe: what is known before it is built.
        encoder: its class, or a `functools.partial` of one and the module that it is made with.
        for_other_sizes: arguments of its constructor for tiles of another size than its own.
    """

    recipe: Recipe
    encoder: Any
    for_other_sizes: dict[str, Any]


REGISTERED: Registry[Registered] = Registry("slide2vec.encoders")


def is_built_in(name: str) -> bool:
    """Whether slide2vec itself has a preset of that name."""
    return Path(name).name == name and (_recipe_dir() / f"{name}.toml").is_file()


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """The recipe of a preset or registered encoder; of a recipe file by its path, which ends in ".toml"; or
    of any model as "timm:<architecture>" or "hf-hub:<owner>/<repo>".

    Raises:
        PresetError: no such preset, file or model; the message gives the nearest names.
    """
    name = os.fspath(name)
    if name.startswith(GENERIC):
        return generic_recipe(name)
    if name.endswith(SUFFIX):
        return read_recipe(Path(name).expanduser())
    theirs = [path for path in _users_recipes() if path.stem == name]
    if is_built_in(name):
        theirs.insert(0, _recipe_dir() / f"{name}{SUFFIX}")
    if len(theirs) > 1:
        raise PresetError(
            f"{name!r} may mean {' or '.join(map(str, theirs))}: rename one, or give the path of its file"
        )
    if theirs:
        return read_recipe(theirs[0])
    found = REGISTERED.get(name)
    if found is None:
        return _called(name)
    return _fed(found.recipe)


def _users_recipes() -> list[Path]:
    """Files in the folders of SLIDE2VEC_RECIPES."""
    folders = [Path(each).expanduser() for each in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if each]
    return [path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _fed(recipe: Recipe) -> Recipe:
    """A registered recipe; above the tile level with the tiles of the preset that feeds it."""
    if recipe.level == "tile":
        return recipe
    below = recipe.tile_encoder.preset if recipe.tile_encoder else recipe.slide_encoder
    feeder = load_recipe(below or "")
    if feeder.level != ("tile" if recipe.tile_encoder else "slide"):
        raise PresetError(f"preset {recipe.name} takes what {below} embeds, which is {feeder.level}-level")
    if recipe.tile_encoder:
        feeder.variant(recipe.tile_encoder.variant)
    return recipe.model_copy(
        update={"transform": feeder.transform, "tile_size_px": feeder.tile_size_px, "images": feeder.images}
    )


def list_encoder_provider_diagnostics() -> tuple[EncoderProviderDiagnostic, ...]:
    """Installed packages whose encoders were left out, and why: of the entry points `slide2vec.encoders`,
    which are called when encoders are first looked up."""
    return REGISTERED.diagnostics()


def _left_out() -> list[str]:
    """A sentence on the packages whose encoders could not be registered; none where there are none."""
    failed = "; ".join(f"{each.provider_key} ({each.concise()})" for each in REGISTERED.diagnostics())
    return [f"Encoders of these packages were left out: {failed}."] if failed else []


def _called(alias: str) -> Recipe:
    """The recipe of the preset that other tools call so."""
    recipes = all_recipes()
    for recipe in recipes.values():
        if alias in recipe.aliases:
            logger.info("preset %s: %s of other tools", recipe.name, alias)
            return recipe
    if found := named_elsewhere(alias):
        raise PresetError(f"there is no preset {alias!r}: {found}")
    others = {other: recipe.name for recipe in recipes.values() for other in recipe.aliases}
    users = [path.stem for path in _users_recipes()]
    hint = nearest_names(alias, [*recipes, *REGISTERED, *users], aliases=others)
    raise PresetError(f"there is no preset {alias!r}. {' '.join((hint, *_left_out()))}")


def list_models(level: Level | None = None) -> list[str]:
    """Names of the presets and registered encoders, sorted; of one level ("tile", "slide", "patient") when
    given. Warns of installed packages whose encoders could not be registered.

    Raises:
        PresetError: no such level.
    """
    if level not in (None, "tile", "slide", "patient"):
        raise PresetError(f"there is no level {level!r}. Allowed: tile, slide, patient.")
    problems = _left_out()
    known = {
        **all_recipes(),
        **{name: found.recipe for name in REGISTERED if (found := REGISTERED.get(name))},
    }
    for path in _users_recipes():
        try:
            known[path.stem] = load_recipe(path.stem)
        except PresetError as error:
            problems.append(f"Left out: {error}")
    for problem in problems:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return sorted(name for name, recipe in known.items() if level in (None, recipe.level))
