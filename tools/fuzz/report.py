"""What has come of the cases: a table for people, and what is forbidden."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

__all__ = ["FORBIDDEN", "OUTCOMES", "forbidden", "replay", "report"]

#: Outcome -> what it means.
OUTCOMES: Mapping[str, str] = {
    "right": "the pixels, tiles or values of the sound file",
    "refused": "an error of slide2vec that names the slide or file",
    "missed": "an engine or features file counts as absent and is made anew",
    "another claim": "a size, spacing or level that the damaged file states consistently is believed",
    "other tiles": "tissue is found elsewhere, in pixels whose damage nothing tells",
    "another value": "a text or number that the damaged file states consistently is believed",
    "wrong pixels, undetectable": "a strict independent decoder finds nothing either",
    "wrong pixels, detectable": "a strict independent decoder finds the damage",
    "other tiles, detectable": "tissue is found elsewhere, and a strict decoder finds the damage",
    "another value, detectable": "a checksum, key or type tells that the value is not the one written",
    "refused badly": "an error that does not name the slide or file, or speaks of internals",
    "exception": "an error that is none of slide2vec's",
    "crash": "the process has died",
    "hang": "more than 60 s",
    "memory": "more than 2 GB",
    "harness": "the test itself has failed",
}
FORBIDDEN = tuple(OUTCOMES)[7:]
_LISTED = 40
_LIBRARIES = (
    "tifffile",
    "imagecodecs",
    "simplejpeg",
    "openslide-bin",
    "pyvips-binary",
    "cucim-cu13",
    "pydicom",
    "numpy",
    "torch",
)


def forbidden(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that must not be."""
    return [result for result in results if result["outcome"] in FORBIDDEN]


def replay(result: Mapping[str, Any]) -> str:
    """A case in a paragraph, with the command that runs it again."""
    return (
        f"{result['outcome']}: {result['base']} ({'; '.join(result.get('damage', ()))})\n"
        f"  {result.get('message', '')}\n"
        f"  python -m tools.fuzz --seed {result['seed']} --case {result['case']}"
    )


def report(results: Sequence[Mapping[str, Any]], states: Mapping[str, str]) -> str:
    """Markdown: outcomes of slides and of other files, and the forbidden ones."""
    ran = [result for result in results if result["outcome"] != "absent"]
    lines = [f"{len(ran)} cases; {platform.machine()}, Python {platform.python_version()}, {_versions()}", ""]
    for kind, title in (("slide", "Slides"), ("other", "Other files")):
        chosen = [result for result in ran if result["kind"] == kind]
        lines += [f"## {title}: {len(chosen)} cases", "", *_table(chosen), "", *_slowest(chosen), ""]
    lines += ["## Outcomes", "", *(f"- {name}: {meaning}" for name, meaning in OUTCOMES.items()), ""]
    lines += [
        "## Sound slides that are not read",
        "",
        *(f"- {name}: {state}" for name, state in states.items() if state != "read"),
        "",
    ]
    wrong = forbidden(ran)
    lines += [f"## Forbidden: {len(wrong)}", "", *(f"- {replay(each)}" for each in wrong[:_LISTED])]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except ImportError:
            continue
    return ", ".join(found)


def _table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = Counter((f"{each['container']}, {each['codec']}", each["outcome"]) for each in results)
    rows = sorted({row for row, _ in counts})
    columns = [name for name in OUTCOMES if any(counts[row, name] for row in rows) or name in FORBIDDEN[:-1]]
    lines = ["| | cases | " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    for row in [*rows, "all"]:
        cells = [sum(counts[each, name] for each in (rows if row == "all" else [row])) for name in columns]
        total = sum(1 for each in results if row in ("all", f"{each['container']}, {each['codec']}"))
        lines.append(f"| {row} | {total} | " + " | ".join(str(cell or "") for cell in cells) + " |")
    return lines


def _slowest(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    seconds = sorted(each.get("seconds", 0.0) for each in results)
    most = max(each.get("rss", 0) for each in results)
    median = seconds[len(seconds) // 2]
    return [f"Slowest {seconds[-1]:.1f} s, median {median:.2f} s; most memory {most / 2**20:.0f} MB."]
