"""`slide2vec fetch-weights`: weights onto this machine, for machines that reach no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slide2vec.cli.console import Debug, Json, print_error, print_json, stdout, table

__all__ = ["fetch_weights"]


def fetch_weights(
    presets: Annotated[
        list[str], typer.Argument(help="Presets, see `slide2vec models`.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to carry elsewhere; by default the hub's cache.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch the weights of presets, with those of the presets below them, and build nothing.

    They go where a run looks for them, the cache of the Hugging Face hub. For a machine without network,
    give a folder with --to, copy it there, and have HF_HUB_CACHE name it. A preset that cannot be fetched
    does not stop the others; the exit status is then 1.
    """
    from slide2vec.encoders.fetch import fetch_weights as fetch
    from slide2vec.errors import Slide2VecError
    from slide2vec.files.hub import keep_hub_files_in

    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        keep_hub_files_in(to.absolute())
    found: dict[str, dict[str, list[Path]]] = {}
    failed: dict[str, str] = {}
    for preset in dict.fromkeys(name.strip() for given in presets for name in given.split(",")):
        try:
            found[preset] = fetch(preset)
        except Slide2VecError as error:
            failed[preset] = str(error)
            print_error(error)
    if as_json:
        print_json({"fetched": found, "failed": failed, "cache": str(to.absolute()) if to else None})
    else:
        _print(found, to)
    if failed:
        raise typer.Exit(1)


def _print(found: dict[str, dict[str, list[Path]]], to: Path | None) -> None:
    parts = {part: files for each in found.values() for part, files in each.items()}
    if not parts:
        return
    console = stdout()
    rows: list[tuple[Any, ...]] = [
        (part, f"{_gb(files):,.2f}" if files else "", _place(files, to)) for part, files in parts.items()
    ]
    console.print(table(("weights of", "GB", "file"), rows, numbers=("GB",)))
    if to is not None:
        console.print(
            f"On the other machine: export HF_HUB_CACHE=/path/to/{to.name}, then slide2vec run --offline …"
        )


def _gb(files: list[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e9


def _place(files: list[Path], to: Path | None) -> str:
    if not files:
        return "needs none"
    shown = files[0]
    if to is not None and shown.is_relative_to(to.absolute()):
        shown = Path(to.name) / shown.relative_to(to.absolute())
    return f"{shown}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
