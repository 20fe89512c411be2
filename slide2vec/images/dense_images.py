"""Dense features of ready images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from slide2vec.artifacts.dense_files import (
    DENSE_IMAGES,
    DenseImageArtifact,
    image_grid_path,
    sidecar_of,
    write_grid,
)
from slide2vec.cohort.lock import output_lock
from slide2vec.config import ExecutionOptions
from slide2vec.errors import ConfigError, ImageError, Slide2VecError, SlideOpenError
from slide2vec.geometry import LevelChoice, select_level
from slide2vec.images.dense_encoder import GridEncoder, dense_options, geometry_record
from slide2vec.images.dense_options import DenseImageOptions
from slide2vec.images.dense_run import encode_and_write, grids_in_order
from slide2vec.images.devices import output_here
from slide2vec.images.pixels import Pixels, rgb
from slide2vec.images.pooled import ImageModel
from slide2vec.images.read_record import read_record
from slide2vec.images.reuse import grid_made_alike
from slide2vec.images.specs import ImageLike, ImageSpec, as_images
from slide2vec.progress import live_progress
from slide2vec.readers import SlideReader, open_slide, resolve_spacing
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide

__all__ = ["dense_spacing", "embed_images_dense"]

#: Files without a spacing of their own, which Pillow reads.
_WITHOUT_SPACING = (".png", ".jpg", ".jpeg")
_PIL = "pil"


@dataclass(frozen=True)
class _Call:
    """What the images of a call have in common."""

    output_dir: Path
    dense: DenseImageOptions
    spacing_um: float
    spacing_source: str
    encoder: GridEncoder
    identity: Mapping[str, Any]
    model: ImageModel


@dataclass(frozen=True)
class _ImageJob:
    """An image that can be read. See `GridJob`.

    Attributes:
        record: how it is read, as its sidecar says it.
    """

    call: _Call
    image: ImageSpec
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"image {self.image.sample_id}"

    @property
    def path(self) -> Path:
        """Of its grid."""
        return image_grid_path(self.call.output_dir, self.image.sample_id)

    @property
    def compatibility(self) -> dict[str, Any]:
        """What decides its grid."""
        read = {k: v for k, v in self.record.items() if k not in ("backend", "requested_backend")}
        return {"image_path": self.image.source, **read, **self.call.identity}

    def read(self) -> Pixels:
        pixels = _pixels(self.image, self.record)
        height, width = self.record["output_size"]
        if pixels.shape[:2] == (height, width):
            return pixels
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)

    def write(self, grid: torch.Tensor) -> DenseImageArtifact:
        call = self.call
        metadata = {
            "artifact_type": DENSE_IMAGES,
            "sample_id": self.image.sample_id,
            "image_path": self.image.source,
            "format": "pt",
            "dtype": str(grid.dtype).removeprefix("torch."),
            "feature_dim": grid.shape[0],
            **geometry_record(call.encoder.geometry),
            "encoder_name": call.model.name,
            "encoder_level": call.model.level,
            "encoder_input_regime": "declared",
            **self.record,
            "read_tile_size_px": None,
            "requested_tile_size_px": None,
            **dense_options(call.dense),
            "compatibility": self.compatibility,
        }
        write_grid(self.path, grid, metadata)
        return self.artifact(metadata)

    def done(self) -> DenseImageArtifact | None:
        """Its grid, where an earlier call has made it in the same way."""
        found = grid_made_alike(self.path, self.compatibility)
        return None if found is None else self.artifact(found)

    def artifact(self, metadata: Mapping[str, Any]) -> DenseImageArtifact:
        """What its sidecar says of it."""
        rows, columns = metadata["grid_shape"]
        return DenseImageArtifact(
            sample_id=self.image.sample_id,
            path=self.path,
            metadata_path=sidecar_of(self.path),
            feature_dim=metadata["feature_dim"],
            grid_shape=(rows, columns),
        )


def embed_images_dense(
    self: ImageModel,
    images: Iterable[ImageLike],
    *,
    dense: DenseImageOptions,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[DenseImageArtifact]:
    """As `embed_regions_dense`, of whole ready images, to `dense_image_embeddings/<sample_id>.pt`. They
    are normalised, never cropped or enlarged; PNG, JPEG and pixels in memory need a spacing."""
    if not isinstance(dense, DenseImageOptions):
        raise ConfigError(f"embed_images_dense takes dense=DenseImageOptions(…), got {type(dense).__name__}")
    execution, output_dir = output_here(execution, "embed_images_dense")
    asked = as_images(images, "embed_images_dense")
    spacing = dense_spacing(self, dense)
    encoder = GridEncoder(self, dense, execution, "embed_images_dense")
    with output_lock(output_dir), live_progress():
        call = _Call(output_dir, dense, *spacing, encoder, encoder.identity, self)
        planned = [_planned(call, image) for image in asked]
        made = [each if isinstance(each, Exception) else each.done() for each in planned]
        left = [job for job, done in zip(planned, made, strict=True) if done is None]
        jobs = [job for job in left if not isinstance(job, Exception)]
        done_now = iter(encode_and_write(jobs, encoder, execution, self.name, "images") if jobs else ())
        results: Sequence[DenseImageArtifact | Exception] = [
            next(done_now) if done is None else done for done in made
        ]
    return grids_in_order([image.sample_id for image in asked], results, on_error)


def dense_spacing(model: ImageModel, dense: DenseImageOptions) -> tuple[float, str]:
    """µm/px that images are read at, and who says so: "explicit" or "model_default".

    Raises:
        ConfigError: the preset has none, or it was not trained on the one asked for.
    """
    spacing, tile_size = model.recipe.tiles(dense.spacing_um, model.recipe.tile_size_px)
    allowed = bool(model.origin.get("allow_non_recommended_settings"))
    model.recipe.check_recommended(spacing, tile_size, allowed=allowed)
    return spacing, "model_default" if dense.spacing_um is None else "explicit"


def _planned(call: _Call, image: ImageSpec) -> _ImageJob | Exception:
    """How an image is read, or why it cannot be."""
    try:
        record = _record(call, image)
        observed, declared = tuple(record["output_size"]), call.dense.size
        if observed != declared:
            raise ImageError(
                f"image {image.sample_id}: it has {observed} px (height, width) at "
                f"{record['effective_spacing_um']:g} µm/px, and target_size declares {declared}: nothing is "
                "fitted; give images of other sizes to a call of their own"
            )
        return _ImageJob(call, image, record)
    except Slide2VecError as error:
        return error
    except Exception as error:  # of libraries, on a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        made = ImageError(f"image {image.sample_id} ({image.source}): {what}")
        made.__cause__ = error
        return made


def _record(call: _Call, image: ImageSpec) -> dict[str, Any]:
    spacing = image.spacing_at_level_0
    if image.path is None or image.path.suffix.lower() in _WITHOUT_SPACING:
        return _record_of_pil(call, image)
    try:
        with open_slide(_slide(image), call.dense.backend) as reader:
            return _record_of_slide(call, image, reader)
    except SlideOpenError:
        if spacing is None:
            raise
        return _record_of_pil(call, image)  # an image that is no slide, a TIFF in strips say


def _record_of_slide(call: _Call, image: ImageSpec, reader: SlideReader) -> dict[str, Any]:
    base = resolve_spacing(reader, _slide(image))
    level = select_level(call.spacing_um, base, planning_downsamples(reader), call.dense.tolerance)
    width, height = reader.level_dimensions[level.level]
    return _with_sizes(call, image, reader.backend, base, level, (height, width))


def _record_of_pil(call: _Call, image: ImageSpec) -> dict[str, Any]:
    base = image.spacing_at_level_0
    if base is None:
        raise ImageError(
            f"image {image.sample_id}: {image.source} says nothing of its spacing: give "
            "spacing_at_level_0 (µm/px)"
        )
    width, height = rgb(image).size
    level = select_level(call.spacing_um, base, [1.0], call.dense.tolerance)
    return _with_sizes(call, image, _PIL, base, level, (height, width))


def _with_sizes(
    call: _Call, image: ImageSpec, backend: str, base: float, level: LevelChoice, size: tuple[int, int]
) -> dict[str, Any]:
    scale = 1.0 if level.is_within_tolerance else level.spacing_um / call.spacing_um
    return read_record(
        call.dense,
        call.spacing_um,
        call.spacing_source,
        backend=backend,
        base_spacing_um=base,
        spacing_at_level_0=image.spacing_at_level_0,
        level=level,
        read_size=size,
        output_size=(round(size[0] * scale), round(size[1] * scale)),
    )


def _pixels(image: ImageSpec, record: Mapping[str, Any]) -> Pixels:
    """A level as it is."""
    if record["backend"] == _PIL:
        return np.asarray(rgb(image), np.uint8)
    height, width = record["read_size"]
    try:
        with open_slide(_slide(image), record["backend"]) as reader:
            return reader.read_region((0, 0), record["read_level"], (width, height))
    except Slide2VecError:
        raise
    except Exception as error:  # of libraries, on a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {image.sample_id} ({image.source}): {what}") from error


def _slide(image: ImageSpec) -> Slide:
    assert image.path is not None
    return Slide(
        sample_id=image.sample_id, image_path=image.path, spacing_at_level_0=image.spacing_at_level_0
    )
