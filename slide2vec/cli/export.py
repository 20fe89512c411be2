"""`slide2vec export`: the embeddings of a run in another format or precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from slide2vec.cli.console import Debug, Json, facts, print_json, stdout, table
from slide2vec.cli.exporting import KINDS, Dtype, Exported, Kind, Source
from slide2vec.files import as_path, entries, is_remote

__all__ = ["export"]


@dataclass(frozen=True, kw_only=True)
class _Failed:
    sample_id: str
    encoder: str
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
    encoder: Annotated[
        str | None,
        typer.Option(help="Only of this one, where the run has several (see `slide2vec status`)."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the embeddings of a run in another format.

    Of a run with several encoders the folders are as in the run; with --encoder, those of that one alone.
    h5 and safetensors files hold the tiles' coordinates too, from the run's tiles/. A slide that
    cannot be exported does not stop the others; the exit status is then 1.
    """
    from slide2vec.cli.exporting import EXPORTERS
    from slide2vec.errors import OutputError, Slide2VecError

    run_dir, output_dir = as_path(run), as_path(output)
    todo = _found(run_dir, output_dir, encoder)
    done: list[Exported] = []
    failed: list[_Failed] = []
    for source, kind, sample_id in todo:
        try:
            done.append(EXPORTERS[kind](source, sample_id, file_format, dtype))
        except OutputError:
            raise
        except Slide2VecError as error:
            failed.append(
                _Failed(
                    sample_id=sample_id,
                    encoder=source.encoder,
                    kind=kind,
                    error_type=type(error).__name__,
                    error=str(error),
                )
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


def _found(run: Path, output: Path, encoder: str | None) -> list[tuple[Source, Kind, str]]:
    """What there is to export, by encoder, kind and name.

    Raises:
        ConfigError: the output is the run itself, or there is no such encoder.
        ArtifactError: the run has no embeddings.
    """
    from slide2vec.errors import ArtifactError, ConfigError

    if run.resolve() == output.resolve():
        raise ConfigError(f"--output {output} is the run itself, whose files would be replaced: name another")
    found = [
        (source, kind, name)
        for source in _sources(run, output, encoder)
        for kind in KINDS
        for name in _names(source.features / f"{kind}_embeddings")
    ]
    if not found:
        places = ", ".join(f"{kind}_embeddings/" for kind in KINDS)
        raise ArtifactError(f"{run} has no files in {places}: give the output directory of a run")
    return found


def _sources(run: Path, output: Path, encoder: str | None) -> list[Source]:
    """The encoders of a run; its own folder, where none of its sidecars can be read."""
    from slide2vec.artifacts.places import owners
    from slide2vec.errors import ConfigError

    there = owners(run)
    chosen = [owner for owner in there if encoder in (None, owner.name, owner.folder.name)]
    if encoder is not None and not chosen:
        names = ", ".join(owner.name for owner in there) or "none that can be read"
        raise ConfigError(f"{run} has no embeddings of {encoder!r}; it has: {names}")
    found = [
        Source(
            encoder=owner.name,
            features=owner.folder,
            tiles=owner.tiling / "tiles",
            output=output if encoder is not None else _below(output, owner.folder, run),
        )
        for owner in chosen
    ]
    if encoder is None and all(source.features != run for source in found):
        found.insert(0, Source(encoder="", features=run, tiles=run / "tiles", output=output))
    return found


def _names(folder: Path) -> list[str]:
    """Slides of which there is a sidecar or a features file, whole or not."""
    from slide2vec.artifacts.records import FORMATS, SIDECAR

    suffixes = (SIDECAR, *(f".{file_format}" for file_format in FORMATS))
    names = [path.name for path in entries(folder) if is_remote(path) or path.is_file()]
    return sorted({name.removesuffix(end) for name in names for end in suffixes if name.endswith(end)})


def _below(output: Path, folder: Path, run: Path) -> Path:
    """The same place below the output as a folder has below its run; either may be behind a URL."""
    return output.joinpath(*folder.parts[len(run.parts) :])


def _print(done: Sequence[Exported], failed: Sequence[_Failed], output: Path) -> None:
    from rich.text import Text

    from slide2vec.cli.report import MOST_ROWS

    console = stdout()
    if done:
        several = len({item.encoder for item in done}) > 1
        columns = ("slide", *(["encoder"] * several), "embeddings", "tiles", "dim", "dtype")
        rows = [_row(item, several=several) for item in done[:MOST_ROWS]]
        console.print(table(columns, rows, numbers=("tiles", "dim")))
        if len(done) > MOST_ROWS:
            console.print(Text(f"… and {len(done) - MOST_ROWS:,} more", "dim"))
        console.print()
        console.print(facts(_places(done, output)))
    if failed:
        console.print()
        console.print(Text(f"{len(failed):,} not exported", "bold red"))
        missed = [(item.sample_id, item.error.removeprefix(f"slide {item.sample_id}: ")) for item in failed]
        console.print(table(("slide", "error"), missed))


def _row(item: Exported, *, several: bool) -> tuple[object, ...]:
    tiles = "" if item.num_tiles is None else f"{item.num_tiles:,}"
    return item.sample_id, *([item.encoder] * several), item.kind, tiles, item.feature_dim, item.feature_dtype


def _places(done: Sequence[Exported], output: Path) -> Iterator[tuple[str, str]]:
    yield "written to", f"{output}/"
    for kind in KINDS:
        folders: dict[Path, list[Path]] = {}
        for item in done:
            if item.kind == kind:
                folders.setdefault(item.path.parent.relative_to(output), []).append(item.path)
        for folder, paths in folders.items():
            yield f"{kind}s", f"{folder / paths[0].name}" if len(paths) == 1 else f"{folder}/"
