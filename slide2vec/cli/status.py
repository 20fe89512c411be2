"""`slide2vec status`: how far a run is, from its output directory."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slide2vec.cli.console import Debug, Json, Sentences, cause, facts, print_json, stdout, table
from slide2vec.cohort.process_list import STATES, by_encoder, key_of, state_of, state_of_all
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import as_os_errors, as_path

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["status"]

EVERY_S = 2.0
#: Failures that are listed.
MOST_ROWS = 10
Row = Mapping[str, str]


def status(
    output_dir: Annotated[
        str,
        typer.Argument(
            metavar="DIRECTORY", help="The output directory of a run, or its URL.", show_default=False
        ),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until the run ends.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is: slides by state, tiles, failures, and whether it is alive."""
    if watch and as_json:
        raise ConfigError("--watch and --json exclude each other: ask for --json as often as needed")
    directory = as_path(output_dir)
    found = _look(directory)
    if as_json:
        print_json(found)
    elif watch:
        _watch(directory, found)
    else:
        stdout().print(_shown(found))


def _look(directory: Path) -> dict[str, Any]:
    from slide2vec.cohort.lock import holder, shard_holders
    from slide2vec.cohort.shard_lists import list_path, merged_process_list

    shards = shard_holders(directory)  # first: a run that ends meanwhile is looked at once more
    running = holder(directory) or next(iter(shards.values()), None)
    with as_os_errors(directory):
        found = merged_process_list(directory)
        is_there = list_path(directory, None).exists()
    rows = list(found.rows.values())
    if not (running or found.by_shard or is_there):
        raise ArtifactError(f"{directory} is not the output directory of a run: it has no process_list.csv")
    states = Counter(state_of_all(rows).values())
    begun = {key_of(row)[0] for row in rows}
    states["to do"] += sum(name not in begun for name in found.missing)  # of shards that have not begun
    failed = [row for row in rows if state_of(row) == "failed"]
    listed = [row for row in rows if row["error"] and state_of(row) != "failed"]
    remarks = dict.fromkeys((key_of(row)[0], row["error"]) for row in listed)  # of several encoders once
    encoders = sorted({row["encoder_name"] for row in rows} - {""})
    is_left = bool(states["to do"] or states["in progress"])
    state = "running" if running else "stopped" if is_left else "done"
    alone = len(encoders) == 1 and not found.by_shard
    return {
        "output_dir": directory,
        "state": state,
        "running": running,
        "goes_on_by": _command(directory) if state == "stopped" and alone else None,
        "shards": {
            "running": shards,
            "ended": [shard for shard in found.by_shard if shard not in shards],
            "not_run": [shard for shard in found.not_run if shard not in shards],
        },
        "encoders": encoders,
        "annotations": sorted({row.get("annotation", "") for row in rows} - {""}),
        "slides": sum(states.values()),
        **{state: states[state] for state in STATES},
        "tiles": _tiles(rows, "finished"),
        "tiles_planned": _tiles(rows, "in progress"),
        "without_tissue": len({key_of(row)[0] for row in rows if _number(row["num_tiles"]) == 0}),
        "failures": [
            {"sample_id": key_of(row)[0], "encoder_name": row["encoder_name"], "error": row["error"]}
            for row in failed
        ],
        "by_encoder": {name: _counts(theirs) for name, theirs in by_encoder(rows).items()},
        "remarks": [{"sample_id": name, "remark": remark} for name, remark in remarks],
    }


def _command(directory: Path) -> str | None:
    """What goes on with the run of one encoder; None where its config.yaml does not say all of it, or means
    other files from here."""
    from slide2vec.files import is_remote
    from slide2vec.settings.text import read_yaml

    path = directory / "config.yaml"
    if is_remote(directory) or not path.is_file():
        return None
    try:
        settings = read_yaml(path)
        slides, output_dir = Path(settings["csv"]), Path(settings["output_dir"])
        is_whole = settings["speed"]["shard"] is None
    except (ConfigError, KeyError, TypeError):  # of another maker, or its slides were given in Python
        return None
    if not (is_whole and slides.is_file() and output_dir.resolve() == directory.resolve()):
        return None
    return f"slide2vec run {shlex.quote(str(path))}" + ("" if settings.get("resume") else " resume=true")


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    """Slides of one encoder by state, and their tiles."""
    states = Counter(state_of(row) for row in rows)
    counts: dict[str, int] = {state: states[state] for state in STATES}
    return {"slides": len(rows), **counts, "tiles": _tiles(rows, "finished")}


def _tiles(rows: Sequence[Row], state: str) -> int:
    return sum(_number(row["num_tiles"]) or 0 for row in rows if state_of(row) == state)


def _number(text: str) -> int | None:
    """A count, which the original may have written as 12.0; None for none."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return None


def _watch(directory: Path, found: dict[str, Any]) -> None:
    from rich.live import Live

    with (
        suppress(KeyboardInterrupt),  # ends the watching, not the run
        Live(_shown(found), console=stdout(), auto_refresh=False) as live,
    ):
        while found["running"]:
            time.sleep(EVERY_S)
            found = _look(directory)
            live.update(_shown(found), refresh=True)


def _shown(found: Mapping[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    several = len(found["by_encoder"]) > 1
    parts: list[Any] = [facts(_facts(found))]
    if several:
        parts += ["", _encoders_table(found["by_encoder"])]
    if found["remarks"]:
        listed = [(item["sample_id"], item["remark"]) for item in found["remarks"][-MOST_ROWS:]]
        parts += ["", Sentences(("slide", "remark"), listed)]
    if found["failures"]:
        failures = _failures(found["failures"])
        rows = [
            (name, *([encoders] * several), cause(name, error))
            for name, encoders, error in failures[-MOST_ROWS:]
        ]
        parts += ["", Sentences(("failed", *(["encoder"] * several), "error"), rows)]
        hidden = len(failures) - len(rows)
        if hidden:
            parts.append(Text(f"… and {hidden:,} more in {found['output_dir']}/process_list.csv", "dim"))
    return Group(*parts)


def _failures(found: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Slide, encoders and error; of an error that a slide had with several encoders one row."""
    encoders: dict[tuple[str, str], list[str]] = {}
    for item in found:
        encoders.setdefault((item["sample_id"], item["error"]), []).append(item["encoder_name"])
    return [(name, ", ".join(names), error) for (name, error), names in encoders.items()]


def _encoders_table(found: Mapping[str, Mapping[str, int]]) -> Table:
    """The slides of each encoder, by state."""
    columns = ("slides", *STATES, "tiles")
    rows = [
        (name or "(only tiled)", *(f"{counts[column]:,}" for column in columns))
        for name, counts in found.items()
    ]
    return table(("encoder", *columns), rows, numbers=columns)


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", _state(found)
    if any(found["shards"].values()):
        yield "shards", _shards(found["shards"])
    if found["encoders"]:
        yield "encoders" if len(found["encoders"]) > 1 else "encoder", ", ".join(found["encoders"])
    if found["annotations"]:
        yield "classes", f"{', '.join(found['annotations'])}: of each slide, each counts as one"
    total = found["slides"]
    for state in STATES:
        share = found[state] / total if total else 0
        yield state, f"{found[state]:,} of {total:,} slides ({share:.0%})"
    more = f", {found['tiles_planned']:,} in progress" if found["tiles_planned"] else ""
    yield "tiles", f"{found['tiles']:,}{more}"
    if found["without_tissue"]:
        yield "no tissue", f"{found['without_tissue']:,} slides"


def _shards(shards: Mapping[str, Any]) -> str:
    """How many are in which state; how many there are is known from the names."""
    counts = {"running": "running", "ended": "ended", "not_run": "not begun"}
    return ", ".join(f"{len(shards[name])} {words}" for name, words in counts.items() if shards[name])


def _state(found: Mapping[str, Any]) -> str:
    """Begins with the word that `--json` has."""
    if by := found["running"]:
        return f"running, process {by['pid']} on {by['host']} since {by['started']}"
    if found["state"] == "stopped":
        return f"stopped: {found['goes_on_by'] or 'the same command'} goes on with it"
    if found["shards"]["ended"]:
        return "done: slide2vec merge puts its shards together"
    return "done"
