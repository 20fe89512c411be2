"""How the other files are damaged: bytes anywhere, and what they hold replaced by what is hostile."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from random import Random
from typing import Any

from tools.fuzz.damage import damage_bytes

__all__ = ["damage_file"]

_HOSTILE: tuple[Any, ...] = (
    None,
    "",
    "x",
    "nan",
    "12",
    True,
    [],
    {},
    [1],
    {"a": 1},
    -1,
    0,
    1,
    3.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    -(2**63),
)
_CELLS = (
    "",
    " ",
    "nan",
    "-1",
    "0",
    "1e999",
    "9" * 400,
    "../../x",
    "a/b",
    "/dev/zero",
    "\0",
    '"',
    "'",
    "é",
    "\ud7ff",
    "x" * 300,
    "x" * 200_000,
    "a,b",
    "a\nb",
    "=1+1",
    "success",
    "failed",
    "True",
    "slide-1",
    "0007",
)
_YAML = (
    "~",
    "''",
    "[]",
    "{}",
    "-1",
    "1e999",
    ".nan",
    "99999999999999999999",
    "0x1f",
    "yes",
    "2026-01-01",
    "[" * 2000,
    "&a [*a, *a]",
    "!!python/object/apply:os.system ['true']",
    "!!binary aGk=",
    "{a: 1}",
    "[1, 2]",
    "x" * 5000,
    "${oc.env:HOME}",
    "${seed}",
    "'${model.name}'",
    "|\n  text",
    "1_000",
    "0.5",
    "224",
    "virchow2",
)
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def damage_file(name: str, data: bytes, rng: Random) -> tuple[bytes, str]:
    """The content of a file, damaged by the rules of its suffix, and what was done."""
    by_structure = {".json": _json_damage, ".csv": _csv_damage, ".yaml": _yaml_damage}.get(Path(name).suffix)
    if by_structure and rng.random() < 0.6:
        return by_structure(data, rng)
    places = {
        "head": (0, min(len(data), 600)),
        "tail": (max(len(data) - 600, 0), len(data)),
        "anywhere": (0, len(data)),
    }
    if Path(name).suffix == ".tar":
        at = rng.randrange(max(len(data) // 512, 1)) * 512
        places["block"] = (at, at + 512)
    where = rng.choice(sorted(places))
    return damage_bytes(data, places[where], rng, where)


def _json_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    content = json.loads(data)
    if rng.random() < 0.05:
        return rng.choice(
            (b"[" * 100_000, b"null", b"{}", b"[]", b'{"a":' * 50_000, b"", b"1" * 10_000)
        ), "another document"
    holder, trail = content, []
    while True:
        key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        trail.append(key)
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.9:
            holder = holder[key]
            continue
        break
    where = ".".join(map(str, trail))
    what = rng.random()
    if what < 0.15:
        del holder[key]
        return json.dumps(content).encode(), f"{where} left out"
    if what < 0.2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return json.dumps(content).encode(), f"{where} renamed"
    if what < 0.25:
        deep = json.dumps(content).replace(json.dumps(holder[key]), "[" * 5000 + "]" * 5000, 1)
        return deep.encode(), f"{where} nested deeply"
    holder[key] = rng.choice(_HOSTILE)
    return json.dumps(content).encode(), f"{where} becomes {holder[key]!r}"


def _csv_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = rng.randrange(len(rows))
    column = rng.randrange(len(rows[row]))
    what = rng.choice(
        ("cell", "cell", "cell", "lose cell", "more cells", "lose row", "row twice", "encoding", "separator")
    )
    if what == "cell":
        rows[row][column] = rng.choice(_CELLS)
    elif what == "lose cell":
        del rows[row][column]
    elif what == "more cells":
        rows[row].insert(column, "more")
    elif what == "lose row":
        del rows[row]
    elif what == "row twice":
        rows.insert(row, rows[row])
    text = io.StringIO()
    csv.writer(text, delimiter=";" if what == "separator" else ",").writerows(rows)
    encoding = rng.choice(("utf-16", "cp1253", "utf-8-sig")) if what == "encoding" else "utf-8"
    return text.getvalue().encode(
        encoding, errors="surrogatepass" if "utf" in encoding else "replace"
    ), f"{what} in row {row}, column {column}"


def _yaml_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    if rng.random() < 0.05:
        return _BOMB.encode(), "anchors that multiply"
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    what = rng.choice(("value", "value", "value", "indent", "lose", "twice", "key"))
    if what == "value":
        lines[number] = re.sub(r":.*", lambda _: f": {rng.choice(_YAML)}", lines[number])
    elif what == "indent":
        lines[number] = " " * rng.randrange(5) + lines[number].lstrip()
    elif what == "lose":
        del lines[number]
    elif what == "twice":
        lines.insert(number, lines[number])
    else:
        lines[number] = lines[number].replace(":", "x:", 1)
    return "\n".join(lines).encode(), f"{what} in line {number + 1}"
