"""`slide2vec search`: the tiles of a run that are nearest to one of them, or to a text."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from slide2vec.choices import Backend
from slide2vec.cli.console import (
    Debug,
    Json,
    Offline,
    note,
    print_json,
    stdout,
    table,
)
from slide2vec.errors import ConfigError

__all__ = ["search"]


def search(
    run: Annotated[Path, typer.Argument(help="Output directory of a run.", show_default=False)],
    tile: Annotated[
        str | None,
        typer.Option(
            help="SLIDE:X,Y of a tile: its slide's name in the run, and a place in it, level-0 px.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="What to look for in words, where the run's encoder has a text side.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="With --text: the encoder's weights file or directory (with its tokeniser), as in the run; "
            "by default from Hugging Face."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many tiles.")] = 20,
    encoder: Annotated[
        str | None,
        typer.Option(help="By whose embeddings, where the run has several (see `slide2vec status`)."),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet to write, .png or .jpg [RUN/search/….png].", show_default=False),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What reads the slides.")] = "auto",
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the tiles of a run whose embeddings are nearest (cosine), with a picture of them.

    Every tile is compared with. The first search gathers the embeddings in RUN/search/, in half precision.
    """
    if (tile is None) == (text is None):
        raise ConfigError("say what to search for: either --tile SLIDE:X,Y or --text")
    place = None if tile is None else _place(tile)
    from slide2vec.pictures import write_picture
    from slide2vec.search import draw_sheet, nearest_to_text, searched_run

    opened = searched_run(run, encoder)
    if place is not None:
        asked, query = opened.index.tile_at(*place)
        found = opened.nearest(query, count, without=asked)
        name = f"{asked.sample_id}_{asked.x}_{asked.y}"
    else:
        asked, name = None, re.sub(r"[^\w-]+", "-", str(text)).strip("-")[:60] or "text"
        found = nearest_to_text(opened, str(text), count, weights=weights)
    picture, problems = draw_sheet(found, asked=asked, backend=backend)
    path = write_picture(sheet or run / "search" / f"{name}.png", picture)
    for problem in problems:
        note(problem)
    if as_json:
        print_json(
            {
                "query": text if asked is None else asdict(asked),
                "tiles": [asdict(each) for each in found],
                "sheet": path,
            }
        )
        return
    rows = [
        (number + 1, each.sample_id, f"{each.x},{each.y}", f"{each.score:.4f}")
        for number, each in enumerate(found)
    ]
    stdout().print(table(("", "slide", "x,y", "cosine"), rows, numbers=("cosine",)))
    stdout().print(f"contact sheet: {path}")


def _place(text: str) -> tuple[str, int, int]:
    """The parts of SLIDE:X,Y; names may have colons."""
    name, _, place = text.rpartition(":")
    try:
        x, y = (int(part) for part in place.split(","))
    except ValueError:
        name = ""
    if not name:
        raise ConfigError(f"--tile {text}: give it as SLIDE:X,Y in level-0 px, such as slide-1:12000,8000")
    return name, x, y
