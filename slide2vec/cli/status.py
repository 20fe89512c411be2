"""`slide2vec status`: how far a run is, from its output directory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slide2vec.cli.console import Debug, Json, facts, print_json, stdout, table
from slide2vec.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["status"]

EVERY_S = 2.0
#: Failures that are listed.
MOST_ROWS = 10

Row = Mapping[str, str]


def status(
    directory: Annotated[Path, typer.Argument(help="The output directory of a run.", show_default=False)],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until the run ends.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is: slides by state, tiles, failures, and whether it is alive."""
    found = _look(directory)
    if as_json:
        print_json(found)
    elif watch:
        _watch(directory, found)
    else:
        stdout().print(_shown(found))


def _look(directory: Path) -> dict[str, Any]:
    from slide2vec.cohort.lock import holder
    from slide2vec.cohort.process_list import read_process_list

    path = directory / "process_list.csv"
    if not path.exists():
        raise ArtifactError(f"{directory} is not the output directory of a run: it has no process_list.csv")
    rows = read_process_list(path)
    states = Counter(_state(row) for row in rows)
    failed = [row for row in rows if _state(row) == "failed"]
    return {
        "output_dir": directory,
        "running": holder(directory),
        "slides": len(rows),
        **{state: states[state] for state in ("finished", "in progress", "to do", "failed")},
        "tiles": _tiles(rows, "finished"),
        "tiles_planned": _tiles(rows, "in progress"),
        "without_tissue": sum(row["num_tiles"] == "0" for row in rows),
        "failures": [{"sample_id": row["sample_id"], "error": row["error"]} for row in failed],
    }


def _state(row: Row) -> str:
    if row["tiling_status"] == "failed" or row["feature_status"] == "error":
        return "failed"
    if row["feature_status"] == "success" or (row["tiling_status"] and not row["feature_status"]):
        return "finished"
    return "in progress" if row["tiling_status"] else "to do"


def _tiles(rows: Sequence[Row], state: str) -> int:
    return sum(int(row["num_tiles"]) for row in rows if row["num_tiles"].isdigit() and _state(row) == state)


def _watch(directory: Path, found: dict[str, Any]) -> None:
    from rich.live import Live

    with Live(_shown(found), console=stdout(), auto_refresh=False) as live:
        while found["running"]:
            time.sleep(EVERY_S)
            found = _look(directory)
            live.update(_shown(found), refresh=True)


def _shown(found: Mapping[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [facts(_facts(found))]
    if found["failures"]:
        rows = [
            (item["sample_id"], item["error"].removeprefix(f"slide {item['sample_id']}: "))
            for item in found["failures"][-MOST_ROWS:]
        ]
        parts += ["", table(("failed", "error"), rows)]
        hidden = len(found["failures"]) - len(rows)
        if hidden:
            parts.append(Text(f"… and {hidden:,} more in {found['output_dir']}/process_list.csv", "dim"))
    return Group(*parts)


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    by, total = found["running"], found["slides"]
    yield (
        "run",
        f"running, process {by['pid']} on {by['host']} since {by['started']}" if by else "not running",
    )
    for state in ("finished", "in progress", "to do", "failed"):
        share = found[state] / total if total else 0
        yield state, f"{found[state]:,} of {total:,} slides ({share:.0%})"
    more = f", {found['tiles_planned']:,} in progress" if found["tiles_planned"] else ""
    yield "tiles", f"{found['tiles']:,}{more}"
    if found["without_tissue"]:
        yield "no tissue", f"{found['without_tissue']:,} slides"
