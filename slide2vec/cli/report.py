"""`slide2vec report`: a page of a run, with pictures and numbers of every slide."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from slide2vec.cli.console import Debug, Json, facts, note, print_json, stdout

__all__ = ["report"]

#: Slides that are listed.
MOST_ROWS = 10


def report(
    run: Annotated[str, typer.Argument(help="Output directory of a run, or its URL.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The page, .html [RUN/report.html].", show_default=False),
    ] = None,
    slides_dir: Annotated[
        Path | None, typer.Option(help="Where the slides are now, if they were moved.", show_default=False)
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option("--pictures/--no-pictures", help="Pictures of every slide; without, it takes seconds."),
    ] = True,
    picture_px: Annotated[int, typer.Option(min=64, max=4096, help="Longer side of a picture.")] = 400,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a page that shows every slide of a run: tissue, tiles, map, quality, warnings, errors.

    One file that any browser opens, without network or server; the pictures of more than 200 slides are in a
    folder beside it. Slides that are gone are drawn from what the run has of them.
    """
    note(f"looking at the slides of {run} again …")
    from slide2vec.report import write_report

    made = write_report(
        run,
        output,
        slides_dir=slides_dir,
        pictures=pictures,
        picture_px=picture_px,
        progress=lambda done, count: note(f"{done:,} of {count:,} slides") if done % 100 == 0 else None,
    )
    if as_json:
        print_json(asdict(made))
        return
    rows = [("report", str(made.path))]
    if made.pictures_dir is not None:
        rows.append(("pictures", f"{made.pictures_dir}/: take it along with the page"))
    rows.append(("slides", ", ".join(f"{count:,} {state}" for state, count in made.states.items() if count)))
    rows += [("not drawn", f"{name}: {why}") for name, why in list(made.without_picture.items())[:MOST_ROWS]]
    if len(made.without_picture) > MOST_ROWS:
        rows.append(("", f"… and {len(made.without_picture) - MOST_ROWS:,} more, see the page"))
    stdout().print(facts(rows))
