"""What users choose by name is said once."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest

from slide2vec import choices
from slide2vec.artifacts.formats import FormatModule
from slide2vec.compile.builders import BuilderModule
from slide2vec.runtime.loading import RuntimeModule

PACKAGE = Path(choices.__file__).parent
#: Names of the choices, by kind; "auto" and the like are common to several.
NAMES = {kind: names for kind in choices.__all__ if (names := set(get_args(getattr(choices, kind))))}


def literals(text: str) -> Iterator[set[object]]:
    """What each `Literal[…]` of a file allows."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id == "Literal"
        ):
            yield {each.value for each in ast.walk(node.slice) if isinstance(each, ast.Constant)}


def copies(text: str) -> list[str]:
    """Kinds of choices whose names a file says again in a Literal."""
    found = list(literals(text))
    return [kind for kind, names in NAMES.items() if any(names - {"auto"} <= each for each in found)]


@pytest.mark.parametrize("kind", NAMES)
def test_copies_are_noticed(kind: str) -> None:
    words = ", ".join(map(repr, sorted(NAMES[kind])))
    assert kind in copies(f"x: Literal[{words}] | None = None")


def test_names_are_said_once() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "choices.py"]
    assert {path.name: found for path in files if (found := copies(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("kind", "table", "others"),
    [
        ("Backend", choices.BACKENDS, {"auto"}),
        ("OutputFormat", choices.OUTPUT_FORMATS, set()),
        ("SegmentationMethod", choices.SEGMENTATION_METHODS, set()),
        ("PreparerChoice", choices.PREPARERS, {"auto"}),
        ("Executor", choices.EXECUTORS, set()),
        ("Runtime", choices.RUNTIMES, set()),
        ("TileFamily", choices.TILE_ENCODERS, {"remote", "registered"}),
        ("SlideFamily", choices.SLIDE_ENCODERS, set()),
        ("TextFamily", choices.TEXT_ENCODERS, set()),
    ],
)
def test_every_name_has_a_row(kind: str, table: Mapping[str, object], others: set[str]) -> None:
    assert NAMES[kind] == {*table, *others}


HOMES = {
    f"{home.module}:{home.name}": home
    for table in (getattr(choices, name) for name in choices.__all__ if name.isupper())
    for home in table.values()
    if isinstance(home, choices.Home)
}


@pytest.mark.parametrize("place", HOMES)
def test_homes_are_there(place: str) -> None:
    home = HOMES[place]
    tree = ast.parse((PACKAGE.parent / f"{home.module.replace('.', '/')}.py").read_text())  # may need a GPU
    assigned = [name for node in tree.body if isinstance(node, ast.Assign) for name in node.targets]
    named = {name.id for name in assigned if isinstance(name, ast.Name)}
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert home.name in named | defined


@pytest.mark.parametrize(
    ("module", "protocol"),
    [
        *((row.home, RuntimeModule) for row in choices.RUNTIMES.values()),
        *((row.builder, BuilderModule) for row in choices.RUNTIMES.values()),
        *((row.home, FormatModule) for row in choices.OUTPUT_FORMATS.values()),
    ],
)
def test_modules_have_what_is_asked_of_them(module: str, protocol: type) -> None:
    found = import_module(module)
    for name in vars(protocol):
        if not name.startswith("_"):
            assert list(signature(getattr(found, name)).parameters) == parameters(protocol, name), name


def parameters(protocol: type, name: str) -> list[str]:
    """Of a method, without self."""
    return list(signature(getattr(protocol, name)).parameters)[1:]
