"""`slide2vec view`: a run in the browser, slides by their own pixels."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from slide2vec.cli.console import Debug, Offline, note, stdout

__all__ = ["view"]


def view(
    run: Annotated[str, typer.Argument(help="Output directory of a run.", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: one that is free.")] = 0,
    browser: Annotated[
        bool,
        typer.Option("--browser/--no-browser", help="Open the page; without, its address is printed only."),
    ] = True,
    encoder: Annotated[
        str | None,
        typer.Option(help="Whose tiles are shown first, where the run has several.", show_default=False),
    ] = None,
    slides_dir: Annotated[
        Path | None, typer.Option(help="Where the slides are now, if they were moved.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the encoder, as in the run, for texts; by default from Hugging Face.", show_default=False
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Look at a run's slides in the browser: zoom, tiles, tissue, maps, similar tiles of the whole run.

    The page is for this machine only; its address holds a token that is new each time. Ctrl-C ends it.
    """
    import webbrowser

    note(f"opening {run} …")
    from slide2vec.viewer import viewer_server

    with viewer_server(run, port=port, encoder=encoder, slides_dir=slides_dir, weights=weights) as server:
        stdout().print(server.address, soft_wrap=True, highlight=False)
        note("the page is there until Ctrl-C")
        if browser and _has_screen():
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            note("the page is closed")


def _has_screen() -> bool:
    """Without one, what opens on Linux is a browser in this very terminal."""
    return not sys.platform.startswith("linux") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
