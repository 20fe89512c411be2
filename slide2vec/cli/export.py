"""`slide2vec export`: the embeddings of a run in another format or precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slide2vec.cli.console import Debug, Json, facts, note, print_json, stdout, table

if TYPE_CHECKING:
    import torch

    from slide2vec.config import OutputFormat
    from slide2vec.tiling import Tiling

__all__ = ["export"]

Kind = Literal["tile", "slide"]
Dtype = Literal["fp16", "fp32"]

#: Of a run's other embeddings.
NOT_EXPORTED = ("hierarchical_embeddings", "patient_embeddings")


@dataclass(frozen=True, kw_only=True)
class _Exported:
    sample_id: str
    kind: Kind
    path: Path
    num_tiles: int | None
    feature_dim: int
    feature_dtype: str


@dataclass(frozen=True, kw_only=True)
class _Failed:
    sample_id: str
    kind: Kind
    error_type: str
    error: str


def export(
    run: Annotated[Path, typer.Argument(help="Output directory of a run.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the files; another one.")],
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
    from slide2vec.errors import OutputError, Slide2VecError

    todo = _found(run, output)
    done: list[_Exported] = []
    failed: list[_Failed] = []
    for kind, sample_id in todo:
        exporting = _export_tiles if kind == "tile" else _export_slide
        try:
            done.append(exporting(run, sample_id, output, file_format, dtype))
        except OutputError:
            raise
        except Slide2VecError as error:
            failed.append(
                _Failed(sample_id=sample_id, kind=kind, error_type=type(error).__name__, error=str(error))
            )
    if as_json:
        print_json(
            {
                "run": run,
                "output_dir": output,
                "format": file_format,
                "exported": [asdict(item) for item in done],
                "failed": [asdict(item) for item in failed],
            }
        )
    else:
        _print(done, failed, output)
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
    kinds: tuple[Kind, ...] = ("tile", "slide")
    found = [(kind, name) for kind in kinds for name in _names(run / f"{kind}_embeddings")]
    if not found:
        raise ArtifactError(
            f"{run} has no files in tile_embeddings/ or slide_embeddings/: give the output directory of a run"
        )
    for folder in NOT_EXPORTED:
        if (run / folder).is_dir():
            note(f"{folder}/ is not exported")
    return found


def _names(folder: Path) -> list[str]:
    """Slides of which there is a sidecar or a features file, whole or not."""
    from slide2vec.artifacts.records import FORMATS, SIDECAR

    suffixes = (SIDECAR, *(f".{file_format}" for file_format in FORMATS))
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted({name.removesuffix(end) for name in names for end in suffixes if name.endswith(end)})


def _export_tiles(
    run: Path, sample_id: str, output: Path, file_format: OutputFormat, dtype: Dtype | None
) -> _Exported:
    from slide2vec.artifacts import write_tile_embeddings
    from slide2vec.embedded import EmbeddedSlide
    from slide2vec.tiling.coordinates import coordinate_paths, load_coordinates

    metadata, path = _described(run / "tile_embeddings", sample_id)
    values = _loaded(path, sample_id, dtype)
    tiling = load_coordinates(run / "tiles", sample_id)
    _check_tiles(tiling, values, metadata)
    arrays, coordinates = coordinate_paths(run / "tiles", sample_id)
    archive, skipped = metadata.get("tiles_tar_path"), metadata.get("skipped_tiles")
    embedded = EmbeddedSlide(
        sample_id=sample_id,
        tile_embeddings=values,
        slide_embedding=None,
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        num_tiles=len(tiling),
    )
    artifact = write_tile_embeddings(
        output,
        embedded,
        tiling,
        file_format=file_format,
        encoder=_encoder(metadata, sample_id),
        compatibility=_mapping(metadata.get("compatibility")),
        coordinates=(arrays if len(tiling) else None, coordinates),
        tiles_tar_path=None if archive is None else Path(str(archive)),
        skipped_tiles=skipped if isinstance(skipped, list) else (),
    )
    return _exported(sample_id, "tile", artifact.path, values, len(tiling))


def _export_slide(
    run: Path, sample_id: str, output: Path, file_format: OutputFormat, dtype: Dtype | None
) -> _Exported:
    from slide2vec.artifacts import write_slide_embedding

    metadata, path = _described(run / "slide_embeddings", sample_id)
    values = _loaded(path, sample_id, dtype)
    latents = run / "slide_latents" / path.name
    artifact = write_slide_embedding(
        output,
        sample_id,
        values,
        file_format=file_format,
        encoder=_encoder(metadata, sample_id),
        metadata=metadata,
        compatibility=_mapping(metadata.get("compatibility")),
        latents=_loaded(latents, sample_id, dtype) if latents.exists() else None,
    )
    return _exported(sample_id, "slide", artifact.path, values, None)


def _exported(
    sample_id: str, kind: Kind, path: Path, values: torch.Tensor, num_tiles: int | None
) -> _Exported:
    return _Exported(
        sample_id=sample_id,
        kind=kind,
        path=path,
        num_tiles=num_tiles,
        feature_dim=values.shape[-1],
        feature_dtype=str(values.dtype).removeprefix("torch."),
    )


def _described(folder: Path, sample_id: str) -> tuple[dict[str, Any], Path]:
    """The sidecar of an artifact, ours or the original slide2vec's, and its features file."""
    from slide2vec.artifacts.records import FORMATS, SCHEMA_VERSION, SIDECAR, read_metadata
    from slide2vec.errors import ArtifactError

    metadata = read_metadata(folder / f"{sample_id}{SIDECAR}")
    version, file_format = metadata.get("schema_version", 1), metadata.get("format")
    if version not in range(1, SCHEMA_VERSION + 1) or file_format not in FORMATS:
        raise ArtifactError(
            f"slide {sample_id}: its sidecar has schema_version {version!r} and format {file_format!r}; "
            f"known are versions up to {SCHEMA_VERSION} and {', '.join(FORMATS)}"
        )
    path = folder / f"{sample_id}.{file_format}"
    size = path.stat().st_size if path.is_file() else None
    if size != metadata.get("file_size_bytes", size):
        raise ArtifactError(
            f"slide {sample_id}: {path} has {size} bytes, its sidecar says {metadata['file_size_bytes']}: "
            "embed it again"
        )
    return metadata, path


def _loaded(path: Path, sample_id: str, dtype: Dtype | None) -> torch.Tensor:
    import torch

    from slide2vec.artifacts import load_embeddings
    from slide2vec.errors import ArtifactError

    values = load_embeddings(path)
    if dtype is None:
        return values
    made = values.to(torch.float16 if dtype == "fp16" else torch.float32)
    if not torch.equal(made.isfinite(), values.isfinite()):
        largest = values[values.isfinite()].abs().max().item()
        raise ArtifactError(
            f"slide {sample_id}: embeddings of up to {largest:.3g} do not fit into fp16; keep fp32"
        )
    return made


def _check_tiles(tiling: Tiling, values: torch.Tensor, metadata: dict[str, Any]) -> None:
    """Refuse coordinates that are not those of the embeddings (the slide was tiled anew since)."""
    from slide2vec.errors import ArtifactError

    geometry = tiling.geometry
    checks = [("tiles", len(values), len(tiling))]
    for key in ("requested_tile_size_px", "requested_spacing_um", "tile_size_lv0"):
        expected = getattr(geometry, key)
        checks.append((key, metadata.get(key, expected), expected))
    for what, embedded, tiled in checks:
        if embedded != tiled:
            raise ArtifactError(
                f"slide {tiling.sample_id}: its embeddings have {what} {embedded}, its coordinates in tiles/ "
                f"{tiled}: embed it again"
            )


def _encoder(metadata: dict[str, Any], sample_id: str) -> dict[str, Any]:
    from slide2vec.errors import ArtifactError

    name, level = metadata.get("encoder_name"), metadata.get("encoder_level")
    if not isinstance(name, str) or not isinstance(level, str):
        raise ArtifactError(f"slide {sample_id}: its sidecar does not name encoder_name and encoder_level")
    return {"name": name, "level": level, "input_size_px": metadata.get("encoder_input_size_px")}


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _print(done: Sequence[_Exported], failed: Sequence[_Failed], output: Path) -> None:
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


def _row(item: _Exported) -> tuple[object, ...]:
    tiles = "" if item.num_tiles is None else f"{item.num_tiles:,}"
    return item.sample_id, item.kind, tiles, item.feature_dim, item.feature_dtype


def _places(done: Sequence[_Exported], output: Path) -> Iterator[tuple[str, str]]:
    yield "written to", f"{output}/"
    for kind in ("tile", "slide"):
        paths = [item.path.relative_to(output) for item in done if item.kind == kind]
        if paths:
            yield f"{kind}s", str(paths[0]) if len(paths) == 1 else f"{paths[0].parent}/"
