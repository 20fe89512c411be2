"""`slide2vec merge`: the shards of a run become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slide2vec.cli.console import Debug, Json, Sentences, cause, facts, print_json, stdout
from slide2vec.cohort.process_list import by_encoder, key_of, state_of

if TYPE_CHECKING:
    from slide2vec.cohort.shard_merge import MergedShards

__all__ = ["merge"]

#: Failures and names that are listed.
MOST_ROWS = 10


def merge(
    output: Annotated[
        str, typer.Option("--output", "--output-dir", "-o", help="The output directory of the shards.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put the process lists of shards (`slide2vec run --shard`) together and say what is missing.

    The exit status is 1 when a shard has not run or is running, or a slide is not finished or failed. Run
    what is missing with the same --shard, then merge again.
    """
    from slide2vec.cohort.shard_merge import merge_shards
    from slide2vec.files import as_path

    directory = as_path(output)
    merged = merge_shards(directory)
    if as_json:
        print_json(_as_json(directory, merged))
    else:
        _print(directory, merged)
    if not merged.complete:
        raise typer.Exit(1)


def _as_json(output: Path, merged: MergedShards) -> dict[str, Any]:
    found = merged.found
    several = {
        name: {"slides": len(rows), "finished": sum(state_of(row) == "finished" for row in rows)}
        for name, rows in by_encoder(found.rows.values()).items()
    }
    return {
        "output_dir": output,
        "process_list_path": merged.process_list_path,
        "slides": merged.total,
        "finished": merged.finished,
        "by_encoder": several,
        "failed": [
            {"sample_id": key_of(row)[0], "encoder_name": row["encoder_name"], "error": row["error"]}
            for row in merged.rows("failed")
        ],
        "not_finished": [key_of(row)[0] for row in merged.rows("to do", "in progress")],
        "missing": list(found.missing),
        "in_several_shards": found.in_two,
        "shards": list(found.by_shard),
        "shards_not_run": list(found.not_run),
        "shards_running": dict(merged.running),
    }


def _print(output: Path, merged: MergedShards) -> None:
    console = stdout()
    console.print(facts(_facts(output, merged)))
    if failed := merged.rows("failed"):
        names = [key_of(row)[0] for row in failed[:MOST_ROWS]]
        rows = [(name, cause(name, row["error"])) for name, row in zip(names, failed, strict=False)]
        console.print()
        console.print(Sentences(("failed", "error"), list(dict.fromkeys(rows))))
        if len(failed) > MOST_ROWS:
            console.print(f"… and {len(failed) - MOST_ROWS:,} more")


def _facts(output: Path, merged: MergedShards) -> Iterator[tuple[str, str]]:
    found, unfinished = merged.found, merged.rows("to do", "in progress")
    yield "finished", f"{merged.finished:,} of {merged.total:,} slides"
    encoders = by_encoder(found.rows.values())
    for name, rows in encoders.items() if len(encoders) > 1 else ():
        finished = sum(state_of(row) == "finished" for row in rows)
        yield "", f"{finished:,} of {len(rows):,} with {name}" if name else f"{len(rows):,} only tiled"
    if merged.running:
        yield "running", f"shards {_some(list(merged.running))}: nothing is merged until they are done"
    if not_run := [shard for shard in found.not_run if shard not in merged.running]:
        yield "not run", f"shards {_some(not_run)}"
    if unfinished and not merged.running:
        names = _some([key_of(row)[0] for row in unfinished])
        yield "not finished", f"{len(unfinished):,} slides, of shards that broke off: {names}"
    if found.missing and not not_run and not merged.running:
        where = "the shards that have run had none of these; run the cohort again with resume"
        yield "missing", f"{len(found.missing):,} slides: {_some(found.missing)}; {where}"
    if twice := found.in_two:
        why = "files have changed in size between jobs"
        yield "embedded twice", f"{len(twice):,} slides, as {why}: {_some(list(twice))}"
    if merged.process_list_path is not None:
        yield "table", str(merged.process_list_path)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_ROWS:,} more" if len(names) > MOST_ROWS else ""
    return ", ".join(names[:MOST_ROWS]) + more
