"""Dense features of regions of slides."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from slide2vec.artifacts.dense_files import (
    DENSE_REGIONS,
    DenseRegionArtifact,
    region_grid_path,
    sidecar_of,
    write_grid,
)
from slide2vec.cohort.lock import output_lock
from slide2vec.config import ExecutionOptions
from slide2vec.errors import ConfigError, ManifestError, Slide2VecError, as_slide_error
from slide2vec.geometry import LevelChoice, TileGeometry, tile_geometry
from slide2vec.images.dense_encoder import GridEncoder, dense_options, geometry_record
from slide2vec.images.dense_options import DenseOptions, SlideRegions
from slide2vec.images.dense_run import encode_and_write, grids_in_order
from slide2vec.images.devices import output_here
from slide2vec.images.pixels import Pixels
from slide2vec.images.pooled import ImageModel
from slide2vec.images.read_record import read_record
from slide2vec.images.reuse import grid_made_alike
from slide2vec.progress import live_progress
from slide2vec.readers import SlideReader, open_slide, resolve_spacing
from slide2vec.readers.fingerprint import fingerprint
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide

__all__ = ["embed_regions_dense"]


@dataclass(frozen=True)
class ReadPlan:
    """How regions of a slide are read.

    Attributes:
        record: as sidecars have it.
        content: of the slide's files, what they are known by.
    """

    geometry: TileGeometry
    record: Mapping[str, Any]
    content: Mapping[str, Any]


class OpenSlides:
    """Slides that are open while regions of them are read; each is opened once, and closed with its last one.

    Args:
        wanted: regions of each slide that will be read.
    """

    def __init__(self, wanted: Counter[Slide], backend: str) -> None:
        self._wanted, self._backend = wanted, backend
        self._open: dict[Slide, SlideReader] = {}
        self._lock = threading.Lock()

    def read(self, slide: Slide, x: int, y: int, geometry: TileGeometry) -> Pixels:
        """The pixels of a region, at the level that is read."""
        try:
            with self._lock:
                if slide not in self._open:
                    self._open[slide] = open_slide(slide, self._backend)
                reader = self._open[slide]
            return reader.read_region((x, y), geometry.read_level, (geometry.read_tile_size_px,) * 2)
        finally:
            self._one_less(slide)

    def _one_less(self, slide: Slide) -> None:
        with self._lock:
            self._wanted[slide] -= 1
            reader = self._open.pop(slide, None) if not self._wanted[slide] else None
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Close those that are open."""
        for reader in self._open.values():
            reader.close()


@dataclass(frozen=True)
class _Call:
    """What the regions of a call have in common."""

    output_dir: Path
    dense: DenseOptions
    encoder: GridEncoder
    identity: Mapping[str, Any]
    plans: Mapping[Slide, ReadPlan | Exception]


@dataclass(frozen=True)
class _Region:
    """A region of a slide that can be read."""

    call: _Call
    slide: Slide
    annotation: str | None
    x: int
    y: int

    @property
    def plan(self) -> ReadPlan:
        """Raises what is wrong with the slide."""
        found = self.call.plans[self.slide]
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def path(self) -> Path:
        """Of its grid."""
        return region_grid_path(self.call.output_dir, self.slide.sample_id, self.annotation, self.x, self.y)

    @property
    def compatibility(self) -> dict[str, Any]:
        """What decides its grid."""
        plan = self.plan
        read = {k: v for k, v in plan.record.items() if k not in ("backend", "requested_backend")}
        return {**read, **self.call.identity, "image": dict(plan.content)}

    def done(self) -> DenseRegionArtifact | None:
        """Its grid, where an earlier call has made it in the same way."""
        found = grid_made_alike(self.path, self.compatibility)
        return None if found is None else self.artifact(found)

    def artifact(self, metadata: Mapping[str, Any]) -> DenseRegionArtifact:
        """What its sidecar says of it."""
        rows, columns = metadata["grid_shape"]
        return DenseRegionArtifact(
            sample_id=self.slide.sample_id,
            x=self.x,
            y=self.y,
            path=self.path,
            metadata_path=sidecar_of(self.path),
            feature_dim=metadata["feature_dim"],
            grid_shape=(rows, columns),
            annotation=metadata["annotation"],
        )


@dataclass(frozen=True)
class _RegionJob:
    """A region that is to be encoded. See `GridJob`."""

    region: _Region
    slides: OpenSlides

    @property
    def name(self) -> str:
        return f"slide {self.region.slide.sample_id}, region {self.region.x},{self.region.y}"

    def read(self) -> Pixels:
        region, geometry = self.region, self.region.plan.geometry
        try:
            pixels = self.slides.read(region.slide, region.x, region.y, geometry)
        except Exception as error:  # of libraries, on a damaged slide
            doing = f"reading region {region.x},{region.y}"
            raise as_slide_error(error, region.slide.sample_id, doing) from error
        side = geometry.requested_tile_size_px
        if geometry.read_tile_size_px == side:
            return pixels
        return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), np.uint8)

    def write(self, grid: torch.Tensor) -> DenseRegionArtifact:
        region, call = self.region, self.region.call
        metadata = {
            "artifact_type": DENSE_REGIONS,
            "sample_id": region.slide.sample_id,
            "annotation": None if region.annotation == "merged" else region.annotation,
            "x": region.x,
            "y": region.y,
            "format": "pt",
            "dtype": str(grid.dtype).removeprefix("torch."),
            "feature_dim": grid.shape[0],
            **geometry_record(call.encoder.geometry),
            **region.plan.record,
            **dense_options(call.dense),
            "compatibility": region.compatibility,
        }
        write_grid(region.path, grid, metadata)
        return region.artifact(metadata)


def embed_regions_dense(
    self: ImageModel,
    regions: Iterable[SlideRegions],
    *,
    dense: DenseOptions,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[DenseRegionArtifact]:
    """Write a grid of patch tokens (d, rows, columns) of each region of slides, to
    `dense_embeddings/[<class>/]<sample_id>/<x>_<y>.pt`; in input order. What an earlier call did in the
    same way stays.

    Raises:
        EmbedImagesError: some regions cannot be read; the others are there. See `embed_images`.
        ConfigError: a ValueError: the encoder does not take such regions or windows.
        UnsupportedError: a NotImplementedError: it has no such tokens.
        ManifestError, ModelLevelError: ValueErrors, as for `embed_images`.
    """
    if not isinstance(dense, DenseOptions):
        raise ConfigError(f"embed_regions_dense takes dense=DenseOptions(…), got {type(dense).__name__}")
    execution, output_dir = output_here(execution, "embed_regions_dense")
    asked = _checked(regions)
    encoder = GridEncoder(self, dense, execution, "embed_regions_dense")
    self.recipe.check_recommended(dense.spacing_um, self.recipe.tile_size_px, allowed=True)
    with output_lock(output_dir), live_progress():
        plans = {each.slide: _plan(each.slide, dense) for each in asked if len(each.coordinates)}
        call = _Call(output_dir, dense, encoder, encoder.identity, plans)
        found = [
            _Region(call, each.slide, each.annotation, x, y)
            for each in asked
            for x, y in each.coordinates.tolist()
        ]
        made = _made_before(found)
        made |= _make(
            {each.path: each for each in found if each.path not in made}, call, execution, self.name
        )
    names = [f"{each.slide.sample_id} {each.x},{each.y}" for each in found]
    return grids_in_order(names, [made[each.path] for each in found], on_error)


def _checked(regions: Iterable[SlideRegions]) -> list[SlideRegions]:
    asked, owners = list(regions), dict[str, Slide]()
    for each in asked:
        if not isinstance(each, SlideRegions):
            raise ManifestError(
                f"embed_regions_dense takes a list of SlideRegions, got {type(each).__name__}"
            )
        other = owners.setdefault(each.sample_id, each.slide)
        if other != each.slide:
            raise ManifestError(
                f"embed_regions_dense: sample_id {each.sample_id!r} is of two slides ({other.image_path} and "
                f"{each.slide.image_path}), or of two spacings: files are named by it"
            )
    return asked


def _made_before(regions: Sequence[_Region]) -> dict[Path, DenseRegionArtifact | Exception]:
    """Grids of an earlier call, and what is wrong with slides that cannot be read."""
    made: dict[Path, DenseRegionArtifact | Exception] = {}
    for region in regions:
        try:
            done = region.done()
        except Slide2VecError as error:
            made[region.path] = error
            continue
        if done is not None:
            made[region.path] = done
    return made


def _make(
    left: Mapping[Path, _Region], call: _Call, execution: ExecutionOptions, preset: str
) -> dict[Path, DenseRegionArtifact | Exception]:
    if not left:
        return {}
    slides = OpenSlides(Counter(region.slide for region in left.values()), call.dense.backend)
    with closing(slides):
        jobs = [_RegionJob(region, slides) for region in left.values()]
        return dict(
            zip(left, encode_and_write(jobs, call.encoder, execution, preset, "regions"), strict=True)
        )


def _plan(slide: Slide, dense: DenseOptions) -> ReadPlan | Exception:
    """How a slide is read, or why it cannot be."""
    try:
        with open_slide(slide, dense.backend) as reader:
            geometry = tile_geometry(
                requested_tile_size_px=dense.target_size,
                requested_spacing_um=dense.spacing_um,
                base_spacing_um=resolve_spacing(reader, slide),
                downsamples=planning_downsamples(reader),
                tolerance=dense.tolerance,
            )
            record = {
                **read_record(
                    dense,
                    dense.spacing_um,
                    "explicit",
                    backend=reader.backend,
                    base_spacing_um=geometry.base_spacing_um,
                    spacing_at_level_0=slide.spacing_at_level_0,
                    level=LevelChoice(
                        level=geometry.read_level,
                        spacing_um=geometry.read_spacing_um,
                        is_within_tolerance=geometry.is_within_tolerance,
                    ),
                    read_size=(geometry.read_tile_size_px,) * 2,
                    output_size=(dense.target_size,) * 2,
                ),
                "read_tile_size_px": geometry.read_tile_size_px,
                "requested_tile_size_px": dense.target_size,
            }
        return ReadPlan(geometry, record, fingerprint(slide.image_path))
    except Exception as error:  # of libraries, on a damaged slide
        return as_slide_error(error, slide.sample_id, "opening it")
