"""`slide2vec export`: the embeddings of a run in another format or precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from slide2vec.cli.console import Debug, Json, facts, print_json, stdout, table
from slide2vec.cli.exporting import KINDS, Dtype, Exported, Kind
from slide2vec.files import as_path, entries, is_remote

__all__ = ["export"]


@dataclass(frozen=True, kw_only=True)
class _Failed:
    sample_id: str
    kind: Kind
    error_type: str
    error: str


def export(
    run: Annotated[str, typer.Argument(help="Output directory of a run, or its URL.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory (or URL) for the files; another one.")
    ],
    file_format: Annotated[
        Literal["h5", "safetensors", "npz", "pt"],
        typer.Option("--format", help="h5 is what CLAM and TRIDENT read."),
    ] = "h5",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the embeddings; by default as they are.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the embeddings of a run in another format.

    h5 and safetensors files hold the tiles' coordinates too, from the run's tiles/. A slide that
    cannot be exported does not stop the others; the exit status is then 1.
    """
    from slide2vec.cli.exporting import EXPORTERS
    from slide2vec.errors import OutputError, Slide2VecError

    run_dir, output_dir = as_path(run), as_path(output)
    todo = _found(run_dir, output_dir)
    done: list[Exported] = []
    failed: list[_Failed] = []
    for kind, sample_id in todo:
        try:
            done.append(EXPORTERS[kind](run_dir, sample_id, output_dir, file_format, dtype))
        except OutputError:
            raise
        except Slide2VecError as error:
            failed.append(
                _Failed(sample_id=sample_id, kind=kind, error_type=type(error).__name__, error=str(error))
            )
    if as_json:
        print_json(
            {
                "run": run_dir,
                "output_dir": output_dir,
                "format": file_format,
                "exported": [asdict(item) for item in done],
                "failed": [asdict(item) for item in failed],
            }
        )
    else:
        _print(done, failed, output_dir)
    if failed:
        raise typer.Exit(1)


def _found(run: Path, output: Path) -> list[tuple[Kind, str]]:
    """What there is to export, by kind and name.

    Raises:
        ConfigError: the output is the run itself.
        ArtifactError: the run has no embeddings.
    """
    from slide2vec.errors import ArtifactError, ConfigError

    if run.resolve() == output.resolve():
        raise ConfigError(f"--output {output} is the run itself, whose files would be replaced: name another")
    found = [(kind, name) for kind in KINDS for name in _names(run / f"{kind}_embeddings")]
    if not found:
        places = ", ".join(f"{kind}_embeddings/" for kind in KINDS)
        raise ArtifactError(f"{run} has no files in {places}: give the output directory of a run")
    return found


def _names(folder: Path) -> list[str]:
    """Slides of which there is a sidecar or a features file, whole or not."""
    from slide2vec.artifacts.records import FORMATS, SIDECAR

    suffixes = (SIDECAR, *(f".{file_format}" for file_format in FORMATS))
    names = [path.name for path in entries(folder) if is_remote(path) or path.is_file()]
    return sorted({name.removesuffix(end) for name in names for end in suffixes if name.endswith(end)})


def _print(done: Sequence[Exported], failed: Sequence[_Failed], output: Path) -> None:
    from rich.text import Text

    from slide2vec.cli.report import MOST_ROWS

    console = stdout()
    if done:
        columns = ("slide", "embeddings", "tiles", "dim", "dtype")
        console.print(table(columns, map(_row, done[:MOST_ROWS]), numbers=("tiles", "dim")))
        if len(done) > MOST_ROWS:
            console.print(Text(f"… and {len(done) - MOST_ROWS:,} more", "dim"))
        console.print()
        console.print(facts(_places(done, output)))
    if failed:
        console.print()
        console.print(Text(f"{len(failed):,} not exported", "bold red"))
        rows = [(item.sample_id, item.error.removeprefix(f"slide {item.sample_id}: ")) for item in failed]
        console.print(table(("slide", "error"), rows))


def _row(item: Exported) -> tuple[object, ...]:
    tiles = "" if item.num_tiles is None else f"{item.num_tiles:,}"
    return item.sample_id, item.kind, tiles, item.feature_dim, item.feature_dtype


def _places(done: Sequence[Exported], output: Path) -> Iterator[tuple[str, str]]:
    yield "written to", f"{output}/"
    for kind in KINDS:
        paths = [item.path.relative_to(output) for item in done if item.kind == kind]
        if paths:
            yield f"{kind}s", str(paths[0]) if len(paths) == 1 else f"{paths[0].parent}/"
