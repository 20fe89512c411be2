"""Commands and Python of the documentation are what the command line and the package take."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import slide2vec
from slide2vec.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What a parser raises; typer has its own copy of click, which may be another than an installed one.
_WRONG = typer.BadParameter.__mro__[2]

#: Made once: it has a few hundred options.
_COMMANDS: Any = get_command(app)

_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    +((?:\w+=\S+ )*slide2vec (?:[^\n\\]|\\\n)*)", re.MULTILINE)
#: Blocks without a fence: an empty line, lines of four spaces, empty ones among them.
_BLOCK = re.compile(r"(?:(?<=\n\n)|\A)((?:    .*\n|\n(?=    ))+)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in _FENCED.findall(page.read_text(encoding="utf-8")) if found == language]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of whole calls of slide2vec, without comments; the first of several on a line."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line.replace("\\\n", " ") for line in _INDENTED.findall(text)]
    if page.name == "command-line.md":
        lines += re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
        if "slide2vec" in words:
            words = words[words.index("slide2vec") + 1 :]
            ends = [words.index(end) for end in ("|", "slide2vec") if end in words]
            yield words[: min(ends, default=None)]


def parse(words: list[str]) -> None:
    """By the parser of the command line itself; nothing is run."""
    here: Any = _COMMANDS.make_context("slide2vec", list(words))
    while hasattr(here.command, "commands"):
        name, command, rest = here.command.resolve_command(here, [*here._protected_args, *here.args])
        here = command.make_context(name, rest, parent=here)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path) -> None:
    wrong = []
    for words in command_lines(page):
        try:
            parse(words)
        except _WRONG as error:
            wrong.append((" ".join(words), error.format_message()))
    assert not wrong


def test_commands_are_found() -> None:
    found = [words for page in PAGES for words in command_lines(page)]
    assert len(found) > 70
    everywhere = {words[0] for words in found}
    assert set(_COMMANDS.commands) <= everywhere
    with pytest.raises(_WRONG, match="No such option"):
        parse(["run", "--manifest", "a.csv", "--presets", "x"])


def python_of(page: Path) -> Iterator[ast.Module]:
    """Blocks of Python: what is marked as such, and other blocks that import or assign."""
    for code in blocks(page, "python"):
        yield ast.parse(code.replace("…", "..."))
    for code in _BLOCK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        try:
            tree = ast.parse(textwrap.dedent(code).replace("…", "..."))
        except SyntaxError:
            continue
        if any(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in tree.body):
            yield tree


def _methods() -> dict[str, list[Any]]:
    """Methods of the public classes by name; several classes may have one of a name."""
    found: dict[str, list[Any]] = {}
    for name in slide2vec.__all__:
        cls = getattr(slide2vec, name)
        if isinstance(cls, type) and not hasattr(cls, "model_fields"):
            for method, function in inspect.getmembers(cls, inspect.isfunction):
                found.setdefault(method, []).append(function)
    return found


def _called(tree: ast.Module) -> Iterator[tuple[ast.Call, list[Any]]]:
    """Calls of what is ours, with what may be called."""
    ours: dict[str, Any] = {name: getattr(slide2vec, name) for name in slide2vec.__all__}
    methods = _methods()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slide2vec"):
            module = import_module(str(node.module))
            ours |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ours:
            yield node, [ours[node.func.id]]
        elif isinstance(node.func, ast.Attribute):
            owner = ours.get(ast.unparse(node.func.value))
            named = methods.get(node.func.attr, []) if owner is None else [getattr(owner, node.func.attr)]
            if named:
                yield node, named


def _takes(called: Any, call: ast.Call) -> bool:
    names = [keyword.arg for keyword in call.keywords if keyword.arg]
    if fields := getattr(called, "model_fields", None):
        return set(names) <= fields.keys()
    signature = inspect.signature(called)
    own = [None] if next(iter(signature.parameters), "") == "self" else []
    try:
        signature.bind_partial(*own, *call.args, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_taken(page: Path) -> None:
    """What is imported is there, and calls have arguments that their functions have."""
    for tree in python_of(page):
        for call, called in _called(tree):
            assert any(_takes(each, call) for each in called), ast.unparse(call)


def test_python_is_found() -> None:
    trees = [tree for page in PAGES for tree in python_of(page)]
    assert len(trees) > 25 and sum(len(list(_called(tree))) for tree in trees) > 60
    (call, called), *_ = _called(ast.parse("model.embed_slide('a.svs', tile_size=3)"))
    assert not any(_takes(each, call) for each in called)
