"""Prints the mutants of a module, a JSON list of sources: runs with cosmic-ray, in its own environment."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

#: `is` for `==`, and the reverse: the same for small numbers, None and members of enums.
LEFT_OUT = re.compile(r"_(Eq|NotEq|Lt|LtE|Gt|GtE)_Is(Not)?$|_Is_Eq$|_IsNot_NotEq$")


def main() -> int:
    source = Path(sys.argv[1]).read_text(encoding="utf-8")
    seen = {_meaning(source)}
    mutants = []
    for mutant in _mutants(source):
        with suppress(SyntaxError):  # of the `*` before arguments that are given by name
            if (meaning := _meaning(mutant)) not in seen:
                seen.add(meaning)
                mutants.append(mutant)
    json.dump(mutants, sys.stdout)
    return 0


def _mutants(source: str) -> Iterator[str]:
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or LEFT_OUT.search(name):
            continue
        operator = kind()
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes)):
            if mutant := mutate_code(source, operator, occurrence):
                yield mutant


def _meaning(source: str) -> str:
    """The program without what decides nothing.

    That is annotations, which are never evaluated, what is imported for them, how arguments may be given,
    whether a dataclass is frozen, and which word comes first in the alphabet: `name <= "max"` is as good as
    `name == "max"`.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.arg() | ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.FunctionDef():
                node.returns = None
            case ast.arguments():
                node.args = node.posonlyargs + node.args + node.kwonlyargs
                node.defaults = node.defaults + [value for value in node.kw_defaults if value]
                node.posonlyargs = node.kwonlyargs = node.kw_defaults = []
            case ast.keyword(arg="frozen" | "kw_only"):
                node.value = ast.Constant(True)
            case ast.If() if "TYPE_CHECKING" in ast.dump(node.test):
                node.test = ast.Constant(False)
            case ast.Compare(
                ops=[ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE()], comparators=[ast.Constant(value=str())]
            ):
                node.ops = [ast.Eq()]
    return ast.dump(tree)


if __name__ == "__main__":
    sys.exit(main())
