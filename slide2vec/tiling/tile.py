"""Tile one slide: segment its tissue, lay the grid, filter the tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import MaskSamplingConfig, PreprocessingConfig, SegmentationConfig
from slide2vec.errors import ConfigError, SpacingError, TilingError
from slide2vec.geometry import TileGeometry, region_geometry, tile_geometry
from slide2vec.readers import SlideReader
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide
from slide2vec.tiling.class_tiles import class_mask, class_tiles
from slide2vec.tiling.contours import find_pieces, smallest_area
from slide2vec.tiling.grid import tissue_tiles
from slide2vec.tiling.quality import good_tiles
from slide2vec.tiling.remarks import TilingFacts, remarks
from slide2vec.tiling.segment import Segmented, segment_tissue
from slide2vec.tiling.tile_quality import measure_tiles, within_limits
from slide2vec.tiling.tissue_methods import checkpoint_of
from slide2vec.tiling.types import PRECOMPUTED, Tiling, TissueMask
from slide2vec.tiling.user_masks import read_labels

__all__ = ["TissueOnce", "tile_slide", "tissue_again"]


class TissueOnce:
    """Keeps the tissue mask of one slide, for tilings that differ in their tiles only."""

    def __init__(self) -> None:
        self._found: dict[str, Segmented] = {}

    def mask(self, settings: SegmentationConfig, find: Callable[[], Segmented]) -> Segmented:
        """The mask found with these settings; found now, if it is the first time."""
        key = f"{settings.model_dump_json()} {settings.weights}"
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def tile_slide(
    reader: SlideReader,
    slide: Slide,
    base_spacing_um: float,
    config: PreprocessingConfig,
    mask_copy: Path | None = None,
    once: TissueOnce | None = None,
) -> tuple[Tiling, TissueMask]:
    """The tiles (or regions) of a slide that hold tissue, and the tissue. A slide without tissue has none.

    With `masks` of other labels they are those of one class, which the slide is named by (see
    `slide2vec.labels.class_name`), and so is the "tissue".

    Args:
        base_spacing_um: µm/px of level 0.
        config: with requested_spacing_um and requested_tile_size_px set. With region_tile_multiple, the
            tiling is one of regions: grid, tissue fraction and pixel filters are theirs, as in HS2P with
            tiles of that size.
        mask_copy: of the slide's mask raster, to be read in its place.
        once: the slide's tissue, where it is tiled more than once.

    Raises:
        SpacingError: finer tiles are asked for than the slide has pixels.
        MaskError: the slide's mask cannot be used.
        SlideReadError: pixels cannot be decoded.
    """
    geometry = _geometry(reader, slide, base_spacing_um, config)
    filtering = config.filtering
    if filtering.ref_tile_size is None:  # of the tile with regions, too: as large pieces of tissue count
        filtering = filtering.updated(ref_tile_size=config.requested_tile_size_px)
    config = config.updated(filtering=filtering)
    raw = _raw_tissue(reader, slide, base_spacing_um, config, mask_copy, once)

    def as_tissue(mask: NDArray[np.uint8]) -> TissueMask:
        return _as_tissue(replace(raw, mask=mask), reader.dimensions, geometry, config)

    masks, own, threshold = config.masks, None, config.tissue_threshold
    if masks.by_class:
        own = _sampled_class(slide, masks)
        threshold = masks.min_coverage.get(own, 0.0)
        tissue = as_tissue(class_mask(raw.mask, masks, own))
        x, y, fractions = class_tiles(raw.mask, as_tissue, masks, own, geometry, reader.dimensions)
    else:
        tissue = as_tissue(raw.mask)
        x, y, fractions = tissue_tiles(tissue, geometry, reader.dimensions, threshold)
    good = good_tiles(reader, x, y, geometry, filtering)
    artefacts = measure_tiles(reader, x, y, geometry, config.qc) if config.qc.on else {}
    good &= within_limits(artefacts, config.qc, len(x))
    found = TilingFacts(
        tissue=tissue,
        geometry=geometry,
        dimensions=reader.dimensions,
        in_grid=len(x),
        tiles=int(good.sum()),
        tissue_threshold=threshold,
        filtering=filtering,
        annotation=own,
    )
    tiling = Tiling(
        sample_id=slide.sample_id,
        image_path=slide.image_path,
        mask_path=slide.mask_path,
        spacing_at_level_0=slide.spacing_at_level_0,
        backend=reader.backend,
        requested_backend=config.backend,
        dimensions=reader.dimensions,
        downsamples=planning_downsamples(reader),
        geometry=geometry,
        x=x[good],
        y=y[good],
        tissue_fractions=fractions[good],
        tissue_threshold=threshold,
        segmentation=tissue.segmentation,
        filtering=filtering,
        annotation=own,
        strategy=masks.strategy if masks.by_class else None,
        remarks=remarks(found),
        artefacts={name: share[good] for name, share in artefacts.items()},
        qc=config.qc,
    )
    return tiling, tissue


def tissue_again(reader: SlideReader, slide: Slide, tiling: Tiling, masks: MaskSamplingConfig) -> TissueMask:
    """The tissue (or class) that a tiling is of, found anew with the settings that it was found with.

    Args:
        slide: named as the tiling is.
        masks: with the labels of the tiling's class, if it is of one.

    Raises:
        ConfigError: it was found with a method that is not known here.
        TilingError: it was found by a network with other weights than those published.
        MaskError, SlideReadError: as `tile_slide`.
    """
    made = tiling.segmentation
    known = {name: getattr(made, name) for name in ("sthresh", "sthresh_up", "mthresh", "close")}
    own = {name: value for name, value in known.items() if value is not None}
    if made.method != PRECOMPUTED:
        own["method"] = made.method
    config = PreprocessingConfig(
        masks=masks,
        filtering=tiling.filtering,
        segmentation={"downsample": made.requested_downsample, **own},
    )
    if made.checkpoint is not None and (now := checkpoint_of(config.segmentation)) != made.checkpoint:
        raise TilingError(
            f"slide {slide.sample_id}: its tissue was found by {made.method} with weights {made.checkpoint}, "
            f"and those that are published are {now}"
        )
    geometry = tiling.geometry
    raw = _raw_tissue(reader, slide, geometry.base_spacing_um, config, None, None)
    if masks.by_class:
        raw = replace(raw, mask=class_mask(raw.mask, masks, masks.class_of(slide.sample_id)))
    return _as_tissue(raw, reader.dimensions, geometry, config)


def _sampled_class(slide: Slide, masks: MaskSamplingConfig) -> str:
    own = masks.class_of(slide.sample_id)
    if own not in masks.classes:
        raise ConfigError(
            f"slide {slide.sample_id}: it is not said of which class tiles are wanted, and masks samples "
            f"{', '.join(masks.classes)}: name it by its class (slide2vec.manifests.by_class)"
        )
    return own


def _raw_tissue(
    reader: SlideReader,
    slide: Slide,
    base_spacing_um: float,
    config: PreprocessingConfig,
    mask_copy: Path | None,
    once: TissueOnce | None,
) -> Segmented:
    """The mask of a slide: of the file that it has, else of tissue, from its pixels."""

    def find() -> Segmented:
        if slide.mask_path is not None or config.masks.by_class:
            asked = config.segmentation, config.masks
            labels, how = read_labels(reader, slide, base_spacing_um, *asked, copy=mask_copy)
            return Segmented(labels if config.masks.by_class else labels * np.uint8(255), how)
        return segment_tissue(reader, slide.sample_id, base_spacing_um, config.segmentation)

    return (once or TissueOnce()).mask(config.segmentation, find)


def _as_tissue(
    found: Segmented, dimensions: tuple[int, int], geometry: TileGeometry, config: PreprocessingConfig
) -> TissueMask:
    height, width = found.mask.shape
    scale = (dimensions[0] / width, dimensions[1] / height)
    reference = config.filtering.ref_tile_size or geometry.requested_tile_size_px
    least = smallest_area(config.filtering.a_t, reference, geometry, scale)
    pieces, left_out = find_pieces(found.mask, least)
    return TissueMask(
        mask=found.mask,
        pieces=pieces,
        scale=scale,
        segmentation=found.segmentation,
        smallest_area=least,
        left_out=left_out,
        overview=found.overview,
        overview_step=found.step,
        labels=found.labels,
        names=found.names,
    )


def _geometry(
    reader: SlideReader, slide: Slide, base_spacing_um: float, config: PreprocessingConfig
) -> TileGeometry:
    spacing, size = config.requested_spacing_um, config.requested_tile_size_px
    if spacing is None or size is None:
        raise ConfigError(
            f"slide {slide.sample_id}: tiling needs requested_spacing_um and requested_tile_size_px, got "
            f"{spacing} and {size}; a model fills in its preset's"
        )
    try:
        tile = tile_geometry(
            requested_tile_size_px=size,
            requested_spacing_um=spacing,
            base_spacing_um=base_spacing_um,
            downsamples=planning_downsamples(reader),
            tolerance=config.tolerance,
            overlap=config.overlap,
        )
    except SpacingError as error:
        raise SpacingError(f"slide {slide.sample_id}: {error}") from error
    multiple = config.region_tile_multiple
    return tile if multiple is None else region_geometry(tile, multiple)
