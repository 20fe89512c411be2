"""YAML as it is read, files made to harm, and files damaged at random."""

from __future__ import annotations

import random
import re
import tracemalloc
from pathlib import Path

import pytest
from settings_files import NEWEST, OLDEST

from slide2vec.errors import ConfigError
from slide2vec.settings import load_settings, settings_as_yaml
from slide2vec.settings.text import as_yaml, parse_yaml

# YAML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("+.5", 0.5), ("1_000.5", 1000.5), ("-2", -2), ("0x10", 16),
        ("2024-01-31", "2024-01-31"), ("yes", True), ("~", None), ("", None), ("'1'", "1"), ("!!str 1", "1"),
        ("1:30.5", "1:30.5"), ("1.2.3", "1.2.3"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("{a: &x {b: 1}, c: {<<: [{b: 3}, *x], d: 2}}", {"a": {"b": 1}, "c": {"b": 3, "d": 2}}),
    ],
)  # fmt: skip
def test_plain_values(text: str, expected: object) -> None:
    assert parse_yaml(text, "here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' appears twice"),
        ("a: 1\nb: !!python/object/apply:os.system [echo]\n", "line 2: !!python/object/apply:os.system"),
        ("a: !!binary aGk=", "line 1: !!binary"),
        ("a: !local x", "line 1: !local"),
        ("a: !!set {x}", "line 1: !!set"),
        ("a: !!float [1]", "line 1: !!float"),
        ("a: !!int x", "line 1: 'x' is no int"),
        ("1: a", "line 1: key 1 is not text"),
        ("on: a", "line 1: key True is not text"),
        ("[a]: b", "line 1: key ['a'] is not text"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: [1\nb: 2", "line 2"),
        ("a:\n\tb: 1", "line 2: found character '\\t'"),
        ("--- a\n--- b", "line 2: but found another document"),
        ("a: {<<: 1}", "line 1: << takes a mapping"),
        ('a: "\\U99999999"', "not YAML"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_what_is_not_plain_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, "here")


def test_text_that_looks_like_something_else_survives() -> None:
    values = [
        "1e5",
        "1e-3",
        "2024-01-31",
        "yes",
        "null",
        "~",
        "",
        " a",
        "a: b",
        "#a",
        "é",
        "1:30",
        "<<",
        "=",
        "[x",
    ]
    assert parse_yaml(as_yaml({"values": values}), "here") == {"values": values}


def _aliased(first: str, item: str) -> str:
    """a: &a ..., b: &b [*a, *a, …] and so on: each level nine times the one before."""
    lines = [f"  k0: &k0 {first}"]
    for level in range(1, 12):
        aliases = ", ".join([f"*k{level - 1}"] * 9)
        lines.append(f"  k{level}: &k{level} {item.format(aliases)}")
    return "\n".join(["wandb:", *lines])


def _referring(first: str, item: str, levels: int, joined: str = "", times: int = 20) -> str:
    """The same with references in place of aliases, and a key that is read at the end."""
    lines = [f"  k0: {first}"]
    for level in range(1, levels):
        references = joined.join([f"${{wandb.k{level - 1}}}"] * times)
        lines.append(f"  k{level}: {item.format(references)}")
    return "\n".join([f"csv: ${{wandb.k{levels - 1}}}", "wandb:", *lines])


BOMBS = {
    "aliases": _aliased("[x, x, x]", "[{}]"),
    "merges": _aliased("{x: 1}", "{{<<: [{}]}}"),
    "itself": "wandb: &a {b: *a}",
    "merges itself": "wandb: &a {<<: *a}",
    "references": _referring("xxxxxxxx", "'{}'", 20),
    "empty references": _referring("''", "'{}'", 30),
    "references to lists": _referring("[x]", "['{}']", 30, "', '"),
    "long chain": _referring("x", "'{}'", 1000, times=1),
    "deep flow": "[" * 500_000,
    "deep mapping": "{a: " * 200_000,
    "deep block": "- " * 400_000,
    "deep indent": "\n".join(" " * i + "a:" for i in range(1000)),
    "many": "csv: [" + "1, " * 100_000 + "1]",
    "long text": "csv: " + "a" * 100_000,
    "long number": "seed: " + "9" * 100_000,
    "base 60": "seed: 1" + ":1" * 100_000,
    "large": "#" * 1_000_001,
    "junk": "\x00\xff\xfe",
    "UTF-16": "csv: a".encode("utf-16").decode("latin-1"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_made_to_harm_are_refused_within_bounds(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(BOMBS[name].encode("latin-1"))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            load_settings(path, ["model.name=uni"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600 + len(str(path))
    assert peak < 30e6, "a file of 1 MB is held a few times, as text"


#: What mutations put in.
TOKENS = [
    "&a ", "*a", "<<: ", "!!python/object:os.system ", "!!int ", "!!float ", "!!set ", "!x ", "{", "}", "[",
    "]", ": ", "- ", "? ", "|", ">", "'", '"', "\t", "\n", "---\n", "...\n", "%YAML 9.9\n", "${",
    "${model.name}", "\\U99999999", "\0", "\ufeff", "\x85", "1e999", "0x", "1:1", "~", "null", ".nan", "=",
    "@", "  ", "[[[[[[[[[[[[[[[[[[", "é",
]  # fmt: skip


def _mutated(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(content))
        match rng.randrange(5):
            case 0:
                content[place] = rng.randrange(256)
            case 1:
                content[place:place] = rng.choice(TOKENS).encode()
            case 2:
                del content[place : place + rng.randrange(1, 30)]
            case 3:
                start = rng.randrange(len(content))
                content[place:place] = content[start : start + rng.randrange(1, 200)]
            case 4:
                values = [found.end() for found in re.finditer(rb": ?", bytes(content))] or [0]
                place = rng.choice(values)
                content[place:place] = rng.choice(TOKENS).encode()
    return bytes(content)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_load_or_are_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    loaded = 0
    for _ in range(120):
        path.write_bytes(_mutated(rng.choice([NEWEST, OLDEST]), rng))
        try:
            settings = load_settings(path)
        except ConfigError as error:
            assert str(error)
            continue
        loaded += 1
        again.write_text(settings_as_yaml(settings, {}), encoding="utf-8")
        assert load_settings(again) == settings
    assert 0 < loaded < 120, "both kinds were tried"
