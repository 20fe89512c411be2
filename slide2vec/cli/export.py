"""`slide2vec export`: the embeddings of a run in another format or precision, or as other tools have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from slide2vec.choices import OutputFormat
from slide2vec.cli.console import (
    EXPORT_FORMAT,
    Debug,
    Json,
    Sentences,
    cause,
    facts,
    note,
    print_error,
    print_json,
    stdout,
    table,
)
from slide2vec.errors import ConfigError
from slide2vec.files import as_path

if TYPE_CHECKING:
    from slide2vec.artifacts.export import Exported, NotExported

__all__ = ["export"]


def export(
    run: Annotated[str, typer.Argument(help="Output directory of a run, or its URL.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory (or URL) for the files; another one.")
    ],
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="h5 is what CLAM and TRIDENT read; geojson: tissue and tiles, for QuPath; parquet: tiles "
            "and their quality.  [default: h5]",
            show_default=False,
            **EXPORT_FORMAT,
        ),
    ] = None,
    layout: Annotated[
        Literal["clam", "trident", "stamp", "lazyslide"] | None,
        typer.Option(
            help="The folders, formats and keys that one of these tools expects, in place of a format.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp16", "fp32"] | None,
        typer.Option(help="Of the embeddings; by default as they are.", show_default=False),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Only of this one, where the run has several (see `slide2vec status`)."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the embeddings of a run in another format or for another tool, or its tissue and tiles.

    Of a run with several encoders the folders are as in the run; with --encoder, those of that one alone.
    h5 and safetensors files hold the tiles' coordinates too, from the run's tiles/. A slide that
    cannot be exported does not stop the others; the exit status is then 1.
    """
    run_dir, output_dir = as_path(run), as_path(output)
    if layout is not None and file_format is not None:
        raise ConfigError(f"--layout {layout} has its own formats: leave out --format {file_format}")
    if file_format in ("geojson", "parquet"):
        _export_areas(run_dir, output_dir, file_format, as_json=as_json)
        return
    note(f"writing into {output} …")  # what writes takes seconds to import
    if layout is not None or file_format == "zarr":
        from slide2vec.layouts import export_layout

        done, failed = export_layout(run_dir, output_dir, layout or "zarr", dtype, encoder=encoder)
    else:
        from slide2vec.artifacts.export import export_run

        known = cast("OutputFormat", file_format or "h5")
        done, failed = export_run(run_dir, output_dir, known, dtype, encoder=encoder)
    if as_json:
        print_json(
            {
                "run": run_dir,
                "output_dir": output_dir,
                "format": None if layout else file_format or "h5",
                "layout": layout,
                "exported": [asdict(item) for item in done],
                "failed": [_as_json(item) for item in failed],
            }
        )
    else:
        _print(done, failed, output_dir, tree=layout is not None)
    if not done or not all(item.left_out for item in failed):
        raise typer.Exit(1)


def _export_areas(run_dir: Path, output_dir: Path, file_format: str, *, as_json: bool) -> None:
    if file_format == "geojson":
        from slide2vec.artifacts.geojson_export import export_areas as write
    else:
        from slide2vec.artifacts.parquet_export import export_tiles as write
    done, failed = write(run_dir, output_dir)
    if as_json:
        wrong = [
            {"sample_id": item.sample_id, "what": item.what, "error": str(item.error)} for item in failed
        ]
        print_json(
            {
                "run": run_dir,
                "output_dir": output_dir,
                "format": file_format,
                "exported": [asdict(item) for item in done],
                "failed": wrong,
            }
        )
    else:
        for what in ("tissue", "tiles"):
            made = [item for item in done if item.what == what]
            areas = sum(item.count for item in made)
            if made or file_format == "geojson":
                stdout().print(f"{what}: {areas:,} areas of {len(made):,} slides in {output_dir / what}/")
        for item in failed:
            print_error(f"{item.what} of {item.sample_id} not exported: {item.error}")
    if failed:
        raise typer.Exit(1)


def _as_json(item: NotExported) -> dict[str, object]:
    return {
        "left_out": item.left_out,
        "sample_id": item.sample_id,
        "encoder": item.encoder,
        "kind": item.kind,
        "error_type": type(item.error).__name__,
        "error": str(item.error),
    }


def _print(done: Sequence[Exported], failed: Sequence[NotExported], output: Path, *, tree: bool) -> None:
    from rich.text import Text

    from slide2vec.cli.outcome import MOST_ROWS

    console = stdout()
    if done:
        several = len({item.encoder for item in done}) > 1
        columns = ("slide", *(["encoder"] * several), "embeddings", "tiles", "dim", "dtype")
        rows = [_row(item, several=several) for item in done[:MOST_ROWS]]
        console.print(table(columns, rows, numbers=("tiles", "dim")))
        if len(done) > MOST_ROWS:
            console.print(Text(f"… and {len(done) - MOST_ROWS:,} more", "dim"))
        console.print()
        console.print(facts([("written to", f"{output}/")] if tree else _places(done, output)))
    if failed:
        several = len({item.encoder for item in done} | {item.encoder for item in failed}) > 1
        encoders: dict[tuple[str, str], list[str]] = {}
        for item in failed:
            encoders.setdefault((item.sample_id, cause(item.sample_id, item.error)), []).append(item.encoder)
        missed = [(name, *([", ".join(by)] * several), error) for (name, error), by in encoders.items()]
        console.print()
        console.print(Text(f"{len(failed):,} not exported", "bold red"))
        console.print(Sentences(("slide", *(["encoder"] * several), "error"), missed))


def _row(item: Exported, *, several: bool) -> tuple[object, ...]:
    tiles = "" if item.num_tiles is None else f"{item.num_tiles:,}"
    return item.sample_id, *([item.encoder] * several), item.kind, tiles, item.feature_dim, item.feature_dtype


def _places(done: Sequence[Exported], output: Path) -> Iterator[tuple[str, str]]:
    from slide2vec.artifacts.places import KINDS

    yield "written to", f"{output}/"
    for kind in KINDS:
        folders: dict[Path, list[Path]] = {}
        for item in done:
            if item.kind == kind:
                folders.setdefault(item.path.parent.relative_to(output), []).append(item.path)
        for folder, paths in folders.items():
            yield f"{kind}s", f"{folder / paths[0].name}" if len(paths) == 1 else f"{folder}/"
