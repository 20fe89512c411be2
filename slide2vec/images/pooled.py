"""An embedding of each ready image: decoded and fitted in threads while the encoder runs, written in others.

threads: rgb ── fitted ──▶ batches ── BatchEncoder ──▶ features ──▶ threads: file, sidecar
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch

from slide2vec.artifacts import ImageEmbeddingArtifact
from slide2vec.artifacts.finite import remedy
from slide2vec.artifacts.image_files import write_image_embedding
from slide2vec.artifacts.records import recorded_dtype
from slide2vec.cohort.lock import output_lock
from slide2vec.config import ExecutionOptions
from slide2vec.errors import (
    EmbedImagesError,
    ImageError,
    ManifestError,
    ModelLevelError,
)
from slide2vec.images.ahead import WRITERS, ahead, stopping
from slide2vec.images.devices import check_alike, on_each_device, output_here
from slide2vec.images.pixels import Pixels, fitted, image_geometry, rgb, transform_record
from slide2vec.images.reuse import find_done
from slide2vec.images.specs import ImageLike, ImageSpec, as_images
from slide2vec.progress import (
    RunStarted,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
    active_reporter,
    live_progress,
)
from slide2vec.recipes import ImageGeometry, Level, Recipe
from slide2vec.stream.batch_encoder import IN_FLIGHT, InFlightBatch

if TYPE_CHECKING:
    from torch import nn

    from slide2vec.runtime import Engine
    from slide2vec.stream.batch_encoder import BatchEncoder

__all__ = ["BatchSource", "ImageModel", "embed_images", "embedded_images", "image_identity"]

logger = logging.getLogger(__name__)

#: Name under which the images of a call are counted in its progress.
_ALL = "images"


class BatchSource(Protocol):
    """What encodes batches of pictures, or has another module do so: a `TileEmbedder`."""

    recipe: Recipe

    @property
    def weights_digest(self) -> str:
        """Of the weights' values; not certain before `confirm_weights`."""
        ...

    def confirm_weights(self) -> None:
        """Wait until the weights are certainly those of the digest. Nothing is finished before.

        Raises:
            WeightsError: they are not.
        """
        ...

    def encoding(self, execution: ExecutionOptions, side_px: int) -> tuple[Engine, BatchEncoder]:
        """An engine, and what puts batches of (n, side_px, side_px, 3) uint8 through it."""
        ...

    def with_encoder(
        self, encoder: nn.Module, name: str, dim: int, tile_size_px: int, *, normalised: bool = False
    ) -> Self: ...

    def select(self, execution: ExecutionOptions, tile_size_px: int | None = None) -> Any: ...


class ImageModel(Protocol):
    """A model, as far as ready images need it."""

    recipe: Recipe
    variant: str
    device: torch.device
    precision: str
    origin: Mapping[str, Any]
    #: Builds it anew, as `loader(device=…)`; None where it was not made by `Model.from_preset`.
    loader: Callable[..., Any] | None

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]: ...

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def encoder(self) -> nn.Module: ...

    @property
    def tile_encoding(self) -> BatchSource: ...

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]: ...


def image_identity(model: ImageModel, execution: ExecutionOptions) -> dict[str, Any]:
    """What decides the embedding of a ready image, besides the image; JSON-ready."""
    geometry = image_geometry(model.recipe)
    made = model.identity(execution, geometry.crop)
    return {
        "encoder_name": model.name,
        "output_variant": model.variant,
        "weights": made["weights"],
        "precision": made["precision"],
        "runtime": made["runtime"],
        "feature_dtype": recorded_dtype(execution.feature_dtype(made["precision"])),
        "transform": transform_record(model.recipe, geometry),
    }


def embed_images(
    self: ImageModel,
    images: Iterable[ImageLike],
    *,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[ImageEmbeddingArtifact]:
    """Embed ready images onto disk, each with the transform that the encoder was published with, to
    `image_embeddings/<sample_id>`; in input order. What an earlier call did in the same way stays.

    Args:
        images: `ImageSpec`s, paths, or mappings with the fields of ImageSpec; on disk or in memory.
        execution: its output_dir is where files go.
        on_error: "raise" an EmbedImagesError when all others are there, or "skip" failed images.

    Raises:
        EmbedImagesError: some images cannot be read, or have no finite embedding.
        ConfigError: a ValueError: an earlier embedding of a sample_id was made in another way, or of
            another image (see `ExecutionOptions.on_image_mismatch`).
        ManifestError: a ValueError: ids are not unique, or there is a spacing, which means nothing here.
        ModelLevelError: a ValueError: the preset is not tile-level.
    """
    asked, execution, output_dir = _checked(self, images, execution)
    with output_lock(output_dir), live_progress():
        identity = image_identity(self, execution)
        reused = find_done(asked, output_dir, identity, execution)
        if reused.done:
            logger.info("%d of %d images are embedded already", len(reused.done), len(asked))
        made: dict[str, ImageEmbeddingArtifact | Exception] = dict(reused.done)
        if not reused.left:
            self.tile_encoding.confirm_weights()  # that all is there is said of these weights
        else:
            made |= _embed(self, reused.left, execution, output_dir, identity)
    return _in_order(asked, made, on_error)


def _checked(
    model: ImageModel, images: Iterable[ImageLike], execution: ExecutionOptions | None
) -> tuple[list[ImageSpec], ExecutionOptions, Path]:
    if model.level != "tile":
        raise ModelLevelError(
            f"embed_images needs a tile-level preset; {model.name} is {model.level}-level: take its tile "
            "encoder"
        )
    asked = as_images(images, "embed_images")
    if spaced := [image.sample_id for image in asked if image.spacing_at_level_0 is not None]:
        raise ManifestError(
            f"embed_images: image {spaced[0]} has spacing_at_level_0, which decides nothing here: leave it "
            "out, or use embed_images_dense"
        )
    return asked, *output_here(execution, "embed_images")


def _in_order(
    asked: Sequence[ImageSpec],
    made: Mapping[str, ImageEmbeddingArtifact | Exception],
    on_error: Literal["raise", "skip"],
) -> list[ImageEmbeddingArtifact]:
    """The files of the images in input order.

    Raises:
        EmbedImagesError: some failed, and that is to be raised.
    """
    failed = {name: each for name, each in made.items() if isinstance(each, Exception)}
    results = [None if isinstance(each := made[i.sample_id], Exception) else each for i in asked]
    for error in failed.values():
        logger.warning("%s", error)
    if failed and on_error == "raise":
        raise EmbedImagesError.of(failed, results)
    return [each for each in results if each is not None]


def _embed(
    model: ImageModel,
    images: Sequence[ImageSpec],
    execution: ExecutionOptions,
    output_dir: Path,
    identity: Mapping[str, Any],
) -> dict[str, ImageEmbeddingArtifact | Exception]:
    """Embed and write images; what each came to, by sample_id.

    Raises:
        OutputError: files cannot be written.
    """
    reporter, made = active_reporter(), dict[str, ImageEmbeddingArtifact | Exception]()
    reporter.emit(RunStarted(1, model.name))
    reporter.emit(SlidePlanned(_ALL, len(images), "pillow"))
    side = image_geometry(model.recipe).crop
    with (
        stopping(ThreadPoolExecutor(WRITERS, "slide2vec-write")) as writers,
        closing(embedded_images(model, images, execution)) as embedded,
    ):

        def write(item: tuple[ImageSpec, torch.Tensor | Exception]) -> ImageEmbeddingArtifact | Exception:
            image, values = item
            if isinstance(values, Exception):
                return values
            model.tile_encoding.confirm_weights()
            metadata = _metadata(model, image, execution, identity, side)
            return write_image_embedding(output_dir, values, metadata)

        for (image, _), future in ahead(writers, write, embedded, 4 * WRITERS):
            made[image.sample_id] = future.result()
            reporter.emit(TilesEncoded(1, _ALL))
    reporter.emit(SlideFinished(_ALL, len(images)))
    return made


def _metadata(
    model: ImageModel, image: ImageSpec, execution: ExecutionOptions, identity: Mapping[str, Any], side: int
) -> dict[str, Any]:
    """The keys of slide2vec 7.1.4; `feature_dim` comes with the features."""
    return {
        "artifact_type": "image_embeddings",
        "sample_id": image.sample_id,
        "image_path": image.source,
        "format": execution.output_format,
        "encoder_name": model.name,
        "encoder_level": model.level,
        "encoder_input_regime": "given",
        "encoder_input_size_px": side,
        "feature_dtype": identity["feature_dtype"],
        "compatibility": dict(identity),
    }


def embedded_images(
    model: ImageModel, images: Sequence[ImageSpec], execution: ExecutionOptions
) -> Generator[tuple[ImageSpec, torch.Tensor | Exception], None, None]:
    """Images in their order, each with its embedding (D,) float16 or float32, or with why it has none."""
    geometry = image_geometry(model.recipe)
    encoders = _encoders(model, len(images), execution, geometry.crop)
    engine, encoder = encoders[0]
    dtype = getattr(torch, execution.feature_dtype(engine.precision))
    readers = execution.budget(model.device.type).reading_threads
    flight: deque[tuple[BatchEncoder, list[tuple[ImageSpec, Pixels | Exception]], InFlightBatch | None]]
    flight = deque()
    with stopping(ThreadPoolExecutor(readers, "slide2vec-decode")) as pool:
        room = readers + execution.prefetch_factor * encoder.most * len(encoders)
        decoded = (
            (image, future.result())
            for image, future in ahead(pool, partial(_pixels, geometry), images, room)
        )
        for _, encoder in cycle(encoders):
            if not (batch := _batch(decoded, encoder.most)):
                break
            tiles = [pixels for _, pixels in batch if not isinstance(pixels, Exception)]
            submitted = encoder.submit(torch.from_numpy(np.stack(tiles)), ()) if tiles else None
            flight.append((encoder, batch, submitted))
            if len(flight) >= IN_FLIGHT * len(encoders):
                yield from _collected(*flight.popleft(), engine, dtype)
        while flight:
            yield from _collected(*flight.popleft(), engine, dtype)


def _encoders(
    model: ImageModel, count: int, execution: ExecutionOptions, side: int
) -> list[tuple[Engine, BatchEncoder]]:
    """What encodes images, on each device of a call; they take batches in turn."""
    first = model.tile_encoding.encoding(execution, side)
    models = on_each_device(model, execution, -(-count // first[1].most))
    identity = image_identity(model, execution)
    found = []
    for each in models:
        if each is not model:
            check_alike(each.device, identity, image_identity(each, execution))
            each.tile_encoding.confirm_weights()
        found.append(first if each is model else each.tile_encoding.encoding(execution, side))
    return found


def _pixels(geometry: ImageGeometry, image: ImageSpec) -> Pixels | Exception:
    try:
        return fitted(rgb(image), geometry)
    except ImageError as error:
        return error


def _batch(
    decoded: Iterator[tuple[ImageSpec, Pixels | Exception]], size: int
) -> list[tuple[ImageSpec, Pixels | Exception]]:
    """The next images, of which `size` have pixels; fewer at the end."""
    batch, good = list[tuple[ImageSpec, Pixels | Exception]](), 0
    for image, pixels in decoded:
        batch.append((image, pixels))
        good += not isinstance(pixels, Exception)
        if good == size:
            break
    return batch


def _collected(
    encoder: BatchEncoder,
    batch: Sequence[tuple[ImageSpec, Pixels | Exception]],
    in_flight: InFlightBatch | None,
    engine: Engine,
    dtype: torch.dtype,
) -> Iterator[tuple[ImageSpec, torch.Tensor | Exception]]:
    rows: Iterator[torch.Tensor] = iter(())
    if in_flight is not None:
        in_flight.done.synchronize()
        # Copied: the memory of the batch is used again, and a row would be stored with all of it.
        rows = iter(in_flight.features.to(dtype, copy=True))
        encoder.release(in_flight)
    for image, pixels in batch:
        if isinstance(pixels, Exception):
            yield image, pixels
            continue
        values = next(rows).clone()
        yield image, values if bool(values.isfinite().all()) else not_finite(image.sample_id, dtype, engine)


def not_finite(sample_id: str, dtype: torch.dtype, engine: Engine) -> ImageError:
    """The features of an image are no numbers."""
    name = str(dtype).removeprefix("torch.")
    wider = 'output_dtype="fp32" (--output-dtype fp32), or ' if dtype == torch.float16 else ""
    return ImageError(
        f"image {sample_id}: its features, as {name}, hold NaN or infinities: "
        f"{wider}{remedy(engine.precision, engine.runtime)}"
    )
