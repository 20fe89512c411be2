"""YAML text to plain values and back, without trusting the text.

Plain values are None, bool, int, float, str, lists and dicts of these. Size, depth and number of
values are bounded before anything is built, so that no file can take long or much memory.
"""

from __future__ import annotations

import re
import reprlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slide2vec.errors import ConfigError, why_of

__all__ = ["as_yaml", "parse_yaml", "read_yaml"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_VALUES = 10_000
MAX_TEXT = 4096  # characters of one value: as long as a path can be

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + name for name in ("null", "bool", "int", "float", "str"))
_MERGE = _TAG + "merge"
_RESOLVED_ELSE = (_TAG + "timestamp", _TAG + "float")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Builds the tree of nodes within bounds. Dates stay text, and 1e-3 is a number (YAML 1.2)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML copies it when a resolver is added)
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag[len(_TAG) :] not in ("timestamp", "float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH or self._values > MAX_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=_too_large(self._depth), problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _too_large(depth: int) -> str:
    if depth > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    return f"more than {MAX_VALUES:,} values"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not plain YAML; names the file and the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {why_of(error)}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"configuration {path} is larger than {MAX_BYTES:,} bytes: is it the right file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} is not UTF-8 text: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML text stands for.

    Args:
        where: it comes from, for errors.

    Raises:
        ConfigError: it is not YAML, or more than plain values; names the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(where).value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {_short(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not YAML: {_short(error)}") from None


def _short(problem: object) -> str:
    """One line of a problem, which may quote the text at length."""
    return textwrap.shorten(str(problem)[:MAX_TEXT], 200, placeholder=" …")


class _Builder:
    """Plain values of nodes. Aliases are counted each time they are used, so that none expands without
    bound."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = MAX_VALUES
        self._scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, depth: int = 1) -> Any:
        """The value of a node, recursively."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise self._error(node, f"{_too_large(depth)}, aliases included")
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, depth)
        raise self._error(node, f"{node.tag.replace(_TAG, '!!')[:80]} is not allowed: plain values only")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_TEXT:
            raise self._error(node, f"a value of {len(node.value):,} characters; at most {MAX_TEXT:,}")
        try:
            return self._scalars.construct_object(node)
        except (ValueError, KeyError, IndexError):
            raise self._error(node, f"{node.value[:80]!r} is no {node.tag.removeprefix(_TAG)}") from None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            value = self.value(value_node, depth + 1)
            if key_node.tag == _MERGE:
                for each in self._merged(key_node, value):
                    merged = {**each, **merged}
                continue
            key = self.value(key_node, depth + 1)
            if not isinstance(key, str):
                raise self._error(key_node, f"key {reprlib.repr(key)} is not text")
            if key in own:
                raise self._error(key_node, f"key {key[:80]!r} appears twice")
            own[key] = value
        return {**merged, **own}

    def _merged(self, node: yaml.Node, value: Any) -> Iterator[dict[str, Any]]:
        """The mappings that `<<` brings in, the first of which counts most."""
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, dict):
                raise self._error(node, "<< takes a mapping, or a list of mappings")
            yield each

    def _error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._where}, line {node.start_mark.line + 1}: {problem}")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that `_Loader` would take for something else; short lists stay on their line."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True)
)


def as_yaml(content: Any) -> str:
    """Plain values as YAML text that `parse_yaml` reads as the same values."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))
