"""What tiling a slide gives: its tissue and its tiles (or regions). Frozen; arrays are not to be written
to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import FilterConfig, QualityConfig
from slide2vec.geometry import TileGeometry, subtile_geometry

__all__ = ["PRECOMPUTED", "BadTile", "Segmentation", "Tiling", "TissueMask", "TissuePiece", "expand_regions"]

#: The method of a tissue mask that the user gave.
PRECOMPUTED = "precomputed_mask"


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """How a slide's tissue mask came about; what a coordinate file records of it.

    Attributes:
        method: the name of one of `SegmentationConfig`, or "precomputed_mask" for a mask raster.
        requested_downsample: of the mask, as configured.
        downsample: of the mask, as it is (rounded).
        level: of the slide that was segmented, or whose size the mask raster was brought to.
        spacing_um: of the mask, µm/px.
        sthresh, sthresh_up, mthresh, close: as applied; None with a mask raster.
        checkpoint: the digest of a learned method's weights; coordinate files have no place for it, and the
            source record beside them has.
        tissue_value, mask_level, mask_spacing_um, mask_backend, requested_mask_backend: how a mask
            raster was read; None without one.
    """

    method: str
    requested_downsample: float
    downsample: int
    level: int
    spacing_um: float
    sthresh: int | None = None
    sthresh_up: int | None = None
    mthresh: int | None = None
    close: int | None = None
    checkpoint: str | None = None
    tissue_value: int | None = None
    mask_level: int | None = None
    mask_spacing_um: float | None = None
    mask_backend: str | None = None
    requested_mask_backend: str | None = None


@dataclass(frozen=True, eq=False)
class TissuePiece:
    """A connected piece of tissue.

    Attributes:
        contour: (n, 1, 2) int32, (x, y) of its outline, px of the mask.
        holes: outlines of its holes, likewise; they run through the tissue around each hole.
    """

    contour: NDArray[np.int32]
    holes: tuple[NDArray[np.int32], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class TissueMask:
    """The tissue of a slide.

    Attributes:
        mask: (h, w) uint8, above 0 where there is tissue, the small pieces included.
        pieces: the pieces large enough to be tiled.
        scale: (x, y), level-0 px per px of the mask.
        segmentation: how the mask came about.
        smallest_area: px of the mask that a piece has to exceed to be tiled.
        left_out: (px of the mask) areas of the pieces that do not.
        overview: (h', w', 3) uint8, RGB of every `overview_step`-th pixel that was segmented; None with a
            mask raster.
        labels: (h, w) uint8, what a segmenter found, by the numbers of `names`; None with other methods.
    """

    mask: NDArray[np.uint8]
    pieces: tuple[TissuePiece, ...]
    scale: tuple[float, float]
    segmentation: Segmentation
    smallest_area: float = 0.0
    left_out: tuple[float, ...] = ()
    overview: NDArray[np.uint8] | None = None
    overview_step: int = 1
    labels: NDArray[np.uint8] | None = None
    names: tuple[str, ...] = ()

    @property
    def overview_mask(self) -> NDArray[np.bool_]:
        """Which pixels of the overview are tissue, (h', w') bool."""
        return self.mask[:: self.overview_step, :: self.overview_step] > 0

    @property
    def overview_scale(self) -> float:
        """Level-0 px per px of the overview, along x."""
        return self.scale[0] * self.overview_step


@dataclass(frozen=True)
class BadTile:
    """A tile whose pixels cannot be decoded: x, y in level-0 px, and why."""

    x: int
    y: int
    error: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """The tiles of one slide.

    Attributes:
        sample_id, image_path, mask_path, spacing_at_level_0: as in `Slide`.
        backend, requested_backend: that read the slide, and as configured ("auto").
        dimensions: (width, height) of level 0, px.
        downsamples: of each level along x, level 0 first.
        geometry: sizes, steps, level and spacings of the tiles.
        x, y: (N,) int64, level-0 px, top-left corners, sorted by x, then y, without duplicates; with
            `regions`, region by region, and row by row within one.
        tissue_fractions: (N,) float32, 0 to 1.
        tissue_threshold: the smallest tissue fraction that was kept.
        segmentation: how tissue was found.
        filtering: which contours and tiles were kept (`ref_tile_size` is set).
        regions: the regions that the tiles make up, all of one number of tiles; None without.
        annotation: the class that they are of, "merged" for several at once; None where they are of tissue.
            The sample_id is as `slide2vec.labels.class_name` has it.
        strategy: by which classes were sampled, "joint" or "independent"; None where tiles are of tissue.
        remarks: what is implausible about them (see `slide2vec.tiling.remarks`).
        artefacts: (N,) float32 each, the share of every tile that is blurred, under pen, …, by
            `slide2vec.tiling.coordinates.ARTEFACTS`; empty where they were not measured.
        qc: how much of these a tile may have.
    """

    sample_id: str
    image_path: Path
    mask_path: Path | None
    spacing_at_level_0: float | None
    backend: str
    requested_backend: str
    dimensions: tuple[int, int]
    downsamples: tuple[float, ...]
    geometry: TileGeometry
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tissue_fractions: NDArray[np.float32]
    tissue_threshold: float
    segmentation: Segmentation
    filtering: FilterConfig
    regions: Tiling | None = None
    annotation: str | None = None
    strategy: str | None = None
    remarks: tuple[str, ...] = ()
    artefacts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    qc: QualityConfig = field(default_factory=QualityConfig)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def recorded(self) -> Tiling:
        """What coordinate files hold: its regions, where it has them, else the tiling itself."""
        return self if self.regions is None else self.regions

    @property
    def region_tile_multiple(self) -> int:
        """Tiles along a side of a region; 1 without regions."""
        return self.recorded.geometry.requested_tile_size_px // self.geometry.requested_tile_size_px

    def kept(self, bad: Iterable[int]) -> NDArray[np.bool_]:
        """Which tiles stay when some, given by their indices, cannot be had: (N,) bool.

        A region stays whole or goes whole.
        """
        kept = np.ones(len(self), bool)
        kept[list(bad)] = False
        per_region = self.region_tile_multiple**2
        return kept.reshape(-1, per_region).all(1).repeat(per_region)

    def without(self, bad: Iterable[int]) -> Tiling:
        """The tiling without tiles, given by their indices, and without the regions that hold one."""
        kept = self.kept(bad)
        regions = None
        if self.regions is not None:
            regions = self.regions._only(kept[:: self.region_tile_multiple**2])
        return replace(self._only(kept), regions=regions)

    def _only(self, kept: NDArray[np.bool_]) -> Tiling:
        return replace(
            self,
            x=self.x[kept],
            y=self.y[kept],
            tissue_fractions=self.tissue_fractions[kept],
            artefacts={name: share[kept] for name, share in self.artefacts.items()},
        )


def expand_regions(regions: Tiling, multiple: int) -> Tiling:
    """The tiles of regions: tile k of a region is in its row k // multiple, column k % multiple.

    Args:
        regions: (R,) regions of `multiple` tiles a side.

    Returns:
        The R · multiple² tiles, region by region, with the tissue fraction and artefacts of their region;
        `regions` are in it.
    """
    geometry = subtile_geometry(regions.geometry, multiple)
    rows, columns = np.divmod(np.arange(multiple**2, dtype=np.int64), multiple)
    return replace(
        regions,
        geometry=geometry,
        x=(regions.x[:, None] + columns * geometry.tile_size_lv0).ravel(),
        y=(regions.y[:, None] + rows * geometry.tile_size_lv0).ravel(),
        tissue_fractions=regions.tissue_fractions.repeat(multiple**2),
        artefacts={name: share.repeat(multiple**2) for name, share in regions.artefacts.items()},
        regions=regions,
    )
