"""`slide2vec images`: ready images in, an embedding file of each out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slide2vec.choices import OutputFormat, Precision
from slide2vec.cli.console import (
    FORMAT,
    Debug,
    Devices,
    Engine,
    IdSource,
    Json,
    NumGpus,
    Offline,
    device_names,
    facts,
    note,
    print_json,
    stdout,
)
from slide2vec.cli.embed import TrustRemoteCode

if TYPE_CHECKING:
    from slide2vec.artifacts import ImageEmbeddingArtifact
    from slide2vec.images import ImageSpec
    from slide2vec.slides import IdFrom

__all__ = ["images"]

#: Of the files that are taken from a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def images(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Images, folders of images, or CSV tables (sample_id, image_path).",
            show_default=False,
        ),
    ],
    preset: Annotated[str, typer.Option("--preset", "-p", help="The encoder; see `slide2vec models`.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the files, or its URL.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into subfolders, too; see --id-from.")
    ] = False,
    id_from: IdSource = "name",
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    output_variant: Annotated[
        str | None, typer.Option(help="Which output of the encoder; by default the preset's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; by default the best.")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="By default the preset's on a GPU, fp32 on a CPU.", show_default=False),
    ] = None,
    engine: Engine = "auto",
    num_gpus: NumGpus = None,
    devices: Devices = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass [by device].")
    ] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads [all CPUs].")] = None,
    file_format: Annotated[
        OutputFormat, typer.Option("--format", help="Of the embeddings.", **FORMAT)
    ] = "pt",
    on_image_mismatch: Annotated[
        Literal["raise", "reencode"],
        typer.Option(help="Where an earlier embedding of an id is of another image: stop, or replace it."),
    ] = "raise",
    trust_remote_code: TrustRemoteCode = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Embed ready images (patches), one file each, with the transform that the encoder was published with.

    What an earlier call did in the same way stays. An image that cannot be read does not stop the others; the
    exit status is then 1.
    """
    from slide2vec.artifacts import ImageEmbeddingArtifact
    from slide2vec.config import ExecutionOptions
    from slide2vec.errors import EmbedImagesError
    from slide2vec.model import Model
    from slide2vec.recipes import load_recipe

    load_recipe(preset).variant(output_variant)  # wrong names are found before anything slow
    found = find_images(given, recursive, id_from)
    execution = ExecutionOptions(
        output_dir=output,
        output_format=file_format,
        batch_size=batch_size,
        num_workers=num_workers,
        engine=engine,
        num_gpus=num_gpus,
        devices=tuple(device_names(devices) or ()) or None,
        on_image_mismatch=on_image_mismatch,
    )
    note(f"loading {preset} …")
    model = Model.from_preset(
        preset,
        weights=weights,
        seed=seed,
        device=device,
        output_variant=output_variant,
        precision=precision,
        trust_remote_code=trust_remote_code,
    )
    failed: dict[str, str] = {}
    try:
        made = model.embed_images(found, execution=execution)
    except EmbedImagesError as error:
        made = [each for each in error.results if isinstance(each, ImageEmbeddingArtifact)]
        failed = {name: str(each) for name, each in error.failed.items()}
    _report(made, failed, as_json)
    if failed:
        raise typer.Exit(1)


def find_images(given: Sequence[str], recursive: bool, id_from: IdFrom) -> list[ImageSpec]:
    """The images that arguments name, in their order; files of a folder by name.

    Raises:
        ManifestError: a folder holds none, or a table is wrong.
    """
    from slide2vec.errors import ManifestError
    from slide2vec.files import as_path, is_remote
    from slide2vec.images import ImageSpec
    from slide2vec.manifests import MANIFEST_SUFFIXES, read_manifest
    from slide2vec.slides import id_of

    found = []
    for argument in given:
        path = as_path(argument)
        if path.suffix.lower() in MANIFEST_SUFFIXES:
            rows = read_manifest(path, id_from=id_from)
            found += [ImageSpec(sample_id=row.sample_id, image_path=row.image_path) for row in rows]
        elif is_remote(path) or not path.expanduser().is_dir():
            found.append(ImageSpec(sample_id=id_of(path, id_from), image_path=path))
        else:
            folder = path.expanduser()
            files = _images_in(folder, recursive)
            if not files:
                deeper = "" if recursive else " (--recursive looks into its subfolders)"
                raise ManifestError(
                    f"folder {folder} holds no images{deeper}; looked for {' '.join(SUFFIXES)}"
                )
            found += [
                ImageSpec(sample_id=id_of(file.relative_to(folder), id_from), image_path=file)
                for file in files
            ]
    return found


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def _report(made: Sequence[ImageEmbeddingArtifact], failed: dict[str, str], as_json: bool) -> None:
    if as_json:
        files = [
            {"sample_id": each.sample_id, "path": each.path, "feature_dim": each.feature_dim} for each in made
        ]
        print_json({"images": files, "failed": failed})
        return
    rows = [("embedded", f"{len(made):,} image{'' if len(made) == 1 else 's'}")]
    if made:
        rows += [("dimension", str(made[0].feature_dim)), ("written to", f"{made[0].path.parent}/")]
    if failed:
        rows.append(("failed", f"{len(failed):,} ({', '.join(list(failed)[:10])})"))
    stdout().print(facts(rows))
