"""What users choose by name is said once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from slide2vec import choices

PACKAGE = Path(choices.__file__).parent
#: Names of the choices, by kind; "auto" and the like are common to several.
NAMES = {kind: set(get_args(getattr(choices, kind))) for kind in choices.__all__}


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


@pytest.mark.parametrize("kind", choices.__all__)
def test_copies_are_noticed(kind: str) -> None:
    words = ", ".join(map(repr, sorted(NAMES[kind])))
    assert kind in copies(f"x: Literal[{words}] | None = None")


def test_names_are_said_once() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "choices.py"]
    assert {path.name: found for path in files if (found := copies(path.read_text()))} == {}
