"""Patch tokens of every tile of slides whose tiles are embedded: one file of all grids per slide.

    patch_tokens/[<class>/]<sample_id>.npy    (N, d, rows, columns) float16, tiles as in tile_embeddings/

Grids are written as they are made, so that memory does not grow with the number of tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import cv2
import numpy as np
import torch

from slide2vec.artifacts import TileEmbeddingArtifact, read_metadata, write_json
from slide2vec.artifacts.dense_files import sidecar_of
from slide2vec.artifacts.places import with_output_dir
from slide2vec.artifacts.tile_features import check_same_files
from slide2vec.cohort.lock import output_lock
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import (
    ArtifactError,
    ConfigError,
    EmbedSlidesError,
    ManifestError,
    OutputError,
    SlideReadError,
    as_slide_error,
)
from slide2vec.files import as_path, atomic_path, remove
from slide2vec.images.ahead import ahead, stopping
from slide2vec.images.dense_encoder import GridEncoder, geometry_record
from slide2vec.images.dense_options import DenseImageOptions
from slide2vec.images.dense_run import batch_size_of
from slide2vec.images.devices import spread
from slide2vec.images.pixels import Pixels
from slide2vec.images.pooled import ImageModel
from slide2vec.progress import RunStarted, SlideFinished, SlidePlanned, TilesEncoded, active_reporter
from slide2vec.readers import SlideReader, open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, load_coordinates

__all__ = ["PatchTokensArtifact", "check_patch_tokens", "save_patch_tokens"]

logger = logging.getLogger(__name__)

PATCH_TOKENS = "patch_tokens"


@dataclass(frozen=True, kw_only=True)
class PatchTokensArtifact:
    """The patch tokens of a slide's tiles, (num_tiles, feature_dim, *grid_shape) float16; `np.load(path,
    mmap_mode="r")` reads those that are looked at."""

    sample_id: str
    path: Path
    metadata_path: Path
    num_tiles: int
    feature_dim: int
    grid_shape: tuple[int, int]

    @property
    def metadata(self) -> dict[str, Any]:
        """The sidecar; read anew each time."""
        return read_metadata(self.metadata_path)


class PatchTokenModel(Protocol):
    """A model of any level, as far as patch tokens of its tiles need it."""

    @property
    def tile_model(self) -> ImageModel: ...


def save_patch_tokens(
    self: PatchTokenModel,
    tile_artifacts: Iterable[TileEmbeddingArtifact],
    *,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[PatchTokensArtifact]:
    """Write the patch tokens of every tile of slides that `embed_tiles` or a Pipeline has embedded:
    `patch_tokens/<sample_id>.npy`, (N, d, rows, columns) float16, in the order of their tiles. The slides
    are read, and the tiles encoded, once more; memory does not grow with their number.

    Raises:
        EmbedSlidesError: some slides failed, or (`on_error="skip"`) are left out.
        ConfigError, UnsupportedError: the encoder has no patch tokens of such tiles.
        OutputLockedError: another process writes into the output directory.
    """
    execution, output_dir = with_output_dir(execution, "save_patch_tokens")
    with output_lock(output_dir, execution.shard):
        made = _of_slides(_Call(self.tile_model, execution, output_dir), tile_artifacts)
    failed = {name: each for name, each in made.items() if isinstance(each, Exception)}
    if failed and on_error == "raise":
        raise EmbedSlidesError.of(
            failed, [None if isinstance(each, Exception) else each for each in made.values()]
        )
    return [each for each in made.values() if not isinstance(each, Exception)]


def check_patch_tokens(model: ImageModel, config: PreprocessingConfig, execution: ExecutionOptions) -> None:
    """Before slides are embedded, whose patch tokens are to be written then.

    Args:
        config: with requested_tile_size_px resolved.

    Raises:
        ConfigError, UnsupportedError: the encoder has no patch tokens of such tiles, or regions are embedded.
    """
    assert config.requested_tile_size_px is not None
    if config.hierarchical:
        raise ConfigError(
            "save_patch_tokens=True is of tiles, and regions are embedded: leave region_tile_multiple and "
            "requested_region_size_px out"
        )
    _Call(model, execution, Path()).encoder(config.requested_tile_size_px)


@dataclass(frozen=True)
class _Call:
    """What the slides of a call have in common."""

    model: ImageModel
    execution: ExecutionOptions
    output_dir: Path
    encoders: dict[int, GridEncoder] = field(default_factory=dict)

    def encoder(self, side: int) -> GridEncoder:
        """Of tiles of a size."""
        resized_to = self.model.origin.get("input_size_px")
        if resized_to not in (None, side):
            raise ConfigError(
                f"save_patch_tokens: tiles of {side} px are resized to input_size_px={resized_to}; leave "
                "input_size_px out, or embed tiles of that size"
            )
        if side not in self.encoders:
            half = self.execution.updated(output_dtype="fp16")
            dense = DenseImageOptions(target_size=side)
            self.encoders[side] = GridEncoder(self.model, dense, half, "save_patch_tokens")
        return self.encoders[side]


def _of_slides(
    call: _Call, artifacts: Iterable[TileEmbeddingArtifact]
) -> dict[str, PatchTokensArtifact | Exception]:
    """What each slide came to, by name."""
    made: dict[str, PatchTokensArtifact | Exception] = {}
    given = list(artifacts)
    reporter = active_reporter()
    reporter.emit(RunStarted(len(given), call.model.name))
    for artifact in given:
        if not isinstance(artifact, TileEmbeddingArtifact):
            raise ManifestError(
                f"save_patch_tokens takes artifacts of embed_tiles, got {type(artifact).__name__}: regions "
                "and embeddings of slides have no tiles of their own"
            )
        try:
            made[artifact.name] = _of_slide(call, artifact)
        except Exception as error:  # of libraries, on a damaged slide
            if isinstance(error, ConfigError | OutputError | NotImplementedError):
                raise
            made[artifact.name] = as_slide_error(error, artifact.sample_id, "making patch tokens")
            logger.warning("%s", made[artifact.name])
        reporter.emit(SlideFinished(artifact.sample_id, artifact.num_tiles))
    return made


def _of_slide(call: _Call, artifact: TileEmbeddingArtifact) -> PatchTokensArtifact:
    sidecar = artifact.metadata
    tiling = _tiling(artifact, sidecar)
    encoder = call.encoder(tiling.geometry.requested_tile_size_px)
    identity = {"tiles": sidecar.get("compatibility"), **encoder.identity}
    path = call.output_dir / PATCH_TOKENS / f"{artifact.name}.npy"
    if (done := _done(path, artifact, identity)) is not None:
        return done
    active_reporter().emit(SlidePlanned(artifact.sample_id, len(tiling), tiling.backend))
    slide = Slide(
        sample_id=artifact.sample_id,
        image_path=as_path(sidecar["image_path"]),
        spacing_at_level_0=tiling.spacing_at_level_0,
    )
    with open_slide(slide, "auto") as reader, atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            dim = _write(file, _grids(reader, tiling, encoder, call.execution), len(tiling), encoder)
        remove(sidecar_of(path))
    metadata = {
        "artifact_type": PATCH_TOKENS,
        "sample_id": artifact.sample_id,
        "format": "npy",
        "dtype": "float16",
        "num_tiles": len(tiling),
        "feature_dim": dim,
        **geometry_record(encoder.geometry),
        "compatibility": identity,
    }
    write_json(sidecar_of(path), metadata)
    return _artifact(path, metadata)


def _tiling(artifact: TileEmbeddingArtifact, sidecar: Mapping[str, Any]) -> Tiling:
    """The tiles that are embedded.

    Raises:
        ArtifactError: they are not known, or were not read from the slide.
    """
    name, compatibility = artifact.sample_id, sidecar.get("compatibility")
    source = compatibility.get("tiles_from") if isinstance(compatibility, Mapping) else None
    coordinates = sidecar.get("coordinates_meta_path")
    if source not in (None, "slide") or not coordinates:
        raise ArtifactError(
            f"slide {name}: patch tokens are made of tiles that were read from the slide and have coordinate "
            f"files; those of {artifact.path} came from {source or 'an unknown place'}"
        )
    folder = as_path(coordinates).parent
    check_same_files(sidecar, folder, name)
    tiling = load_coordinates(folder, name)
    skipped = {(each["x"], each["y"]) for each in sidecar.get("skipped_tiles") or ()}
    places = zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)
    tiling = tiling.without([index for index, place in enumerate(places) if place in skipped])
    if len(tiling) != artifact.num_tiles:
        raise ArtifactError(
            f"slide {name}: {artifact.path} has {artifact.num_tiles} tiles, its coordinates {len(tiling)}: "
            "embed it again"
        )
    return tiling


def _done(
    path: Path, artifact: TileEmbeddingArtifact, identity: Mapping[str, Any]
) -> PatchTokensArtifact | None:
    """What an earlier call has made of the same tiles in the same way."""
    try:
        found = read_metadata(sidecar_of(path))
    except ArtifactError:
        return None
    whole = path.is_file() and found.get("compatibility") == dict(identity)
    return _artifact(path, found) if whole and found.get("num_tiles") == artifact.num_tiles else None


def _artifact(path: Path, metadata: Mapping[str, Any]) -> PatchTokensArtifact:
    rows, columns = metadata["grid_shape"]
    return PatchTokensArtifact(
        sample_id=metadata["sample_id"],
        path=path,
        metadata_path=sidecar_of(path),
        num_tiles=metadata["num_tiles"],
        feature_dim=metadata["feature_dim"],
        grid_shape=(rows, columns),
    )


def _write(file: BinaryIO, grids: Iterator[torch.Tensor], count: int, encoder: GridEncoder) -> int:
    """Write all grids after NumPy's header; returns d."""
    dim = None
    for batch in grids:
        if dim is None:
            dim = batch.shape[1]
            _write_header(file, (count, dim, *encoder.geometry.grid_shape))
        file.write(batch.contiguous().numpy().tobytes())
    if dim is None:  # a slide without tissue
        dim = 0
        _write_header(file, (0, 0, *encoder.geometry.grid_shape))
    return dim


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _grids(
    reader: SlideReader, tiling: Tiling, encoder: GridEncoder, execution: ExecutionOptions
) -> Iterator[torch.Tensor]:
    """(B, d, rows, columns) of the next tiles."""
    size = batch_size_of(encoder, execution)
    readers = execution.budget(encoder.device.type).reading_threads
    places = zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)
    encoders = encoder.on_each_device(-(-len(tiling) // size))

    def read(place: tuple[int, int]) -> Pixels:
        return _tile(reader, tiling, place)

    with stopping(ThreadPoolExecutor(readers, "slide2vec-read")) as pool:
        room = readers + 2 * size * len(encoders)
        tiles = (future.result() for _, future in ahead(pool, read, places, room))
        batches = iter(lambda: list(islice(tiles, size)), [])
        first = 0
        for grids in spread(encoders, _encoded, batches):
            if not bool(grids.isfinite().all()):
                last = first + len(grids) - 1
                raise SlideReadError(
                    f"slide {tiling.sample_id}: patch tokens of tiles {first} to {last} hold NaN, or do not "
                    f"fit into float16, in {encoder.precision}"
                )
            yield grids
            active_reporter().emit(TilesEncoded(len(grids), tiling.sample_id))
            first += len(grids)


def _encoded(encoder: GridEncoder, batch: list[Pixels]) -> torch.Tensor:
    return encoder.grids(torch.from_numpy(np.stack(batch)))


def _tile(reader: SlideReader, tiling: Tiling, place: tuple[int, int]) -> Pixels:
    geometry = tiling.geometry
    read, side = geometry.read_tile_size_px, geometry.requested_tile_size_px
    try:
        pixels = reader.read_region(place, geometry.read_level, (read, read))
    except Exception as error:  # of libraries; an OSError would count as one of the file that is written
        raise as_slide_error(error, tiling.sample_id, "reading its tiles") from error
    if read == side:
        return pixels
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
