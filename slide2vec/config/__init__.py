"""What a user may set: PreprocessingConfig and, in `execution`, ExecutionOptions; frozen, validated,
keyword-only.

Defaults follow HS2P and the original slide2vec; `None` means "chosen for the model, the slide or
the machine", as each field says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, field_validator, model_validator

from slide2vec.choices import (
    BACKENDS,
    SEGMENTATION_METHODS,
    Backend,
    PreparerChoice,
    SegmentationMethod,
    learned_methods,
)
from slide2vec.config.execution import ExecutionOptions, shard_numbers
from slide2vec.config.frozen import FrozenConfig
from slide2vec.config.masks import TISSUE_THRESHOLD, MaskSamplingConfig
from slide2vec.errors import ConfigError, ManifestError
from slide2vec.files import as_path, is_remote
from slide2vec.labels import TISSUE

__all__ = [
    "ExecutionOptions",
    "FilterConfig",
    "Location",
    "MaskSamplingConfig",
    "PreprocessingConfig",
    "PreviewConfig",
    "QualityConfig",
    "SegmentationConfig",
    "shard_numbers",
]

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
GrayLevel = Annotated[int, Field(ge=0, le=255)]
#: A path of this machine, or a URL: then a `upath.UPath`, see `slide2vec.files.as_path`.
Location = Annotated[Path, PlainValidator(as_path), PlainSerializer(str, when_used="json")]


def _on_this_machine(given: object) -> Path:
    if is_remote(path := as_path(given)):
        raise ConfigError(f"{path} is behind a URL; tile archives are read from local folders: copy them")
    return path


#: Methods that the other fields of SegmentationConfig are for.
_WITH_OPTIONS = ("hsv", "otsu", "threshold")


class SegmentationConfig(FrozenConfig):
    """How tissue is distinguished from background.

    Attributes:
        method: "hsv", "otsu" and "threshold" are HS2P's: colours in the range of stained tissue; saturation
            above Otsu's threshold; above `sthresh`. "auto" compares with the light through the slide's own
            glass, at 8 µm/px: any stain, pale tissue, tinted glass, fluorescence, without pen; it takes no
            other option. "hest", "grandqc", "grandqc-artefact" (at 1.5 µm/px; "-1um", "-2um") and "sam2" are
            networks (docs/tissue.md), and take weights and device.
        downsample: of the level on which tissue is looked for, about.
        sthresh, sthresh_up: saturation from and to which "threshold" takes tissue, 0 to 255.
        mthresh: side of the median kernel of "otsu" and "threshold", px, odd.
        close: side of the kernel that closes gaps, px.
        weights: of a network: a file or directory; "random" to try it (what it finds means nothing); None =
            those published, from the Hugging Face hub.
        device: that a network runs on, "cpu" or "cuda:1"; None = the device of a worker's encoder, else a GPU
            where there is one.
    """

    method: Annotated[SegmentationMethod, PlainValidator(SEGMENTATION_METHODS.checked)] = "hsv"
    downsample: Annotated[float, Field(gt=0)] = 64
    sthresh: GrayLevel = 8
    sthresh_up: GrayLevel = 255
    mthresh: Annotated[int, Field(gt=0, description="odd median kernel")] = 7
    close: Annotated[int, Field(ge=0)] = 4
    # Not what decides where tissue is: the digest of the weights is, wherever they are.
    weights: Annotated[str | Path | None, Field(exclude=True)] = None
    device: Annotated[str | None, Field(exclude=True)] = None

    @field_validator("mthresh")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ConfigError(f"the median kernel must be odd, got {value}; try {value + 1}")
        return value

    @model_validator(mode="after")
    def _segmenters_decide_themselves(self) -> Self:
        others = [name for name in type(self).model_fields if name != "method"]
        changed = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        for name in ("weights", "device"):
            if name in changed and self.method not in learned_methods():
                raise ConfigError(
                    f"{name}={getattr(self, name)} is for methods that are networks, "
                    f"{', '.join(learned_methods())}; {self.method} has none"
                )
        changed = [name for name in changed if name not in ("weights", "device")]
        if self.method not in _WITH_OPTIONS and changed:
            name = changed[0]
            raise ConfigError(
                f"{name}={getattr(self, name)} is for another method than {self.method}, which decides by "
                "itself: leave it out, or choose hsv, otsu or threshold"
            )
        return self


class FilterConfig(FrozenConfig):
    """Which contours and tiles are kept. `ref_tile_size` None means the requested tile size.

    `a_t` and `a_h` are areas in units of ref_tile_size²; `a_h` is recorded, but every hole is
    excluded whatever its size, as HS2P does.
    """

    ref_tile_size: Positive | None = None
    a_t: Annotated[float, Field(ge=0)] = 4
    a_h: Annotated[float, Field(ge=0)] = 2
    filter_white: bool = False
    filter_black: bool = False
    white_threshold: GrayLevel = 220
    black_threshold: GrayLevel = 25
    fraction_threshold: Fraction = 0.9
    filter_grayspace: bool = False
    grayspace_saturation_threshold: Fraction = 0.05
    grayspace_fraction_threshold: Fraction = 0.6
    filter_blur: bool = False
    blur_threshold: Annotated[float, Field(ge=0)] = 50.0
    qc_spacing_um: Annotated[float, Field(gt=0)] = 2.0


class QualityConfig(FrozenConfig):
    """Artefacts of tiles: whether they are measured, and of how much of each a tile is left out.

    Attributes:
        measure: write what was measured into the coordinate files; a limit measures, too.
        method: "classical", or GrandQC's network at 1.5, 1 or 2 µm/px (docs/tissue.md).
        max_background, max_bubble, max_fold, max_pen: the largest share of a tile that is kept, 0 to 1; None
            keeps all.
        max_blur: the same, of its tissue.
        max_spot: the same of dark spots and foreign objects, which only a network finds.
        weights: of the network, as `SegmentationConfig.weights`.
        device: that it runs on, as `SegmentationConfig.device`.
    """

    measure: bool = False
    method: Literal["classical", "grandqc-artefact", "grandqc-artefact-1um", "grandqc-artefact-2um"] = (
        "classical"
    )
    max_background: Fraction | None = None
    max_blur: Fraction | None = None
    max_bubble: Fraction | None = None
    max_fold: Fraction | None = None
    max_pen: Fraction | None = None
    max_spot: Fraction | None = None
    weights: Annotated[str | Path | None, Field(exclude=True)] = None
    device: Annotated[str | None, Field(exclude=True)] = None

    @model_validator(mode="after")
    def _a_network_for_what_is_its_own(self) -> Self:
        for name in ("max_spot", "weights", "device"):
            if self.method == "classical" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is for a network, and method is {self.method}: say "
                    'method="grandqc-artefact", or leave it out'
                )
        return self

    def network(self) -> SegmentationConfig | None:
        """The segmenter that finds the artefacts; None where none does."""
        if self.method == "classical":
            return None
        return SegmentationConfig(method=self.method, weights=self.weights, device=self.device)

    @property
    def on(self) -> bool:
        """Whether anything is measured."""
        return self != type(self)()


class PreviewConfig(FrozenConfig):
    """Which pictures to write beside the embeddings (needs ExecutionOptions.output_dir).

    Attributes:
        save_mask_preview: the slide with its tissue outlined.
        save_tiling_preview: the slide with its tiles.
        downsample: of the pictures; less where a slide is small, so that they have 1,000 px at least.
        tissue_contour_color: (red, green, blue) of the outline.
        mask_overlay_alpha: opacity of a tint of that colour over the tissue, 0 to 1; 0 leaves the stain as it
            is.
    """

    save_mask_preview: bool = False
    save_tiling_preview: bool = False
    downsample: Annotated[float, Field(gt=0)] = 32
    tissue_contour_color: tuple[GrayLevel, GrayLevel, GrayLevel] = (157, 219, 129)
    mask_overlay_alpha: Fraction = 0.0


class PreprocessingConfig(FrozenConfig):
    """How slides are tiled and read.

    Attributes:
        backend: reader; "auto" picks per slide (tiff, dicom, cucim, vips, openslide, asap) by what opens it.
        requested_spacing_um: µm/px of the tiles; None = the preset's.
        requested_tile_size_px: side of the tiles at that spacing; None = the preset's.
        region_tile_multiple: hierarchical extraction: regions of so many tiles a side (2 or more).
        requested_region_size_px: the same as the side of a region in px, a multiple of the tile's.
        tolerance: relative spacing difference within which a level is read as it is.
        overlap: of neighbouring tiles, as a fraction of their side.
        tissue_threshold: smallest tissue fraction of a tile that is kept; the same as
            masks.min_coverage["tissue"] of masks of tissue. Other labels have their own there.
        masks: labels of the masks of slides, and which of them are sampled; a mapping will do.
        read_coordinates_from: directory of HS2P coordinate files to use instead of tiling; may be a URL.
        read_tiles_from: directory of tile archives to use instead of reading slides.
        on_the_fly: read tiles from the slides while embedding; False writes them to archives under
            the output directory first and embeds those.
        save_tiles: also write the tiles to archives under the output directory.
        on_bad_tile: "fail" the slide when pixels of a tile cannot be decoded, or "skip" the tile:
            it is left out of coordinates and embeddings, and recorded.
        gpu_decode: "auto" decodes on the GPU what comes out right there, and the rest on the CPU; True fails
            slides that the GPU cannot decode; False never decodes there. "shared" is "auto", and the CPU
            decodes beside the GPU what it is too busy for: which tiles depends on timing, and with it the
            last bits of their features.
        preparer: what brings tiles to the encoder's input; "auto" is PyTorch on the CPU; on a GPU
            "triton", which does not resize, or "dali", where they are installed.
        use_supertiles: read blocks of neighbouring tiles at once (same pixels, faster).
        num_cucim_workers: has no effect: a reading thread reads one block at a time, and the job's CPUs are
            not shared out twice.
        resume: keep what a previous run into the same output directory finished with these settings.
        fingerprint: of a slide's files, by which resume knows them: "ends" digests the first and the last
            64 KB of each, "whole" all of it as well, which reads every slide once more.
        segmentation, filtering, qc, preview: mappings merged over the defaults of their classes.
    """

    backend: Annotated[Backend, PlainValidator(BACKENDS.checked)] = "auto"
    requested_spacing_um: Annotated[float, Field(gt=0)] | None = None
    requested_tile_size_px: Positive | None = None
    requested_region_size_px: Positive | None = None
    region_tile_multiple: Annotated[int, Field(ge=2)] | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tissue_threshold: Fraction = TISSUE_THRESHOLD
    masks: MaskSamplingConfig = MaskSamplingConfig()
    read_coordinates_from: Location | None = None
    read_tiles_from: Annotated[Path, PlainValidator(_on_this_machine)] | None = None
    on_the_fly: bool = True
    save_tiles: bool = False
    on_bad_tile: Literal["fail", "skip"] = "fail"
    gpu_decode: bool | Literal["auto", "shared"] = "auto"
    preparer: PreparerChoice = "auto"
    use_supertiles: bool = True
    num_cucim_workers: Positive = 4
    resume: bool = False
    fingerprint: Literal["ends", "whole"] = "ends"
    segmentation: SegmentationConfig = SegmentationConfig()
    filtering: FilterConfig = FilterConfig()
    qc: QualityConfig = QualityConfig()
    preview: PreviewConfig = PreviewConfig()

    def __init__(self, **values: Any) -> None:
        given = values.get("masks")
        if isinstance(given, Mapping):
            given = values["masks"] = MaskSamplingConfig(**given)
        if isinstance(given, MaskSamplingConfig) and not given.by_class:
            values = self._with_one_threshold(given, values)
        super().__init__(**values)

    @staticmethod
    def _with_one_threshold(masks: MaskSamplingConfig, values: dict[str, Any]) -> dict[str, Any]:
        """Masks of tissue and tissue_threshold say the same thing, whichever was given.

        Raises:
            ConfigError: both were, and differ.
        """
        of_masks = masks.min_coverage[TISSUE] if "min_coverage" in masks.model_fields_set else None
        threshold = values.get("tissue_threshold", of_masks)
        if of_masks is not None and threshold != of_masks:
            raise ConfigError(
                f"tissue_threshold={threshold} and masks.min_coverage[{TISSUE!r}]={of_masks} say the same "
                "thing differently; keep one of them"
            )
        masks = masks.updated().set_only(masks.model_fields_set - {"min_coverage"})
        return {**values, "masks": masks} | ({} if threshold is None else {"tissue_threshold": threshold})

    @model_validator(mode="after")
    def _masks_say_the_threshold(self) -> Self:
        if not self.masks.by_class and self.masks.min_coverage[TISSUE] != self.tissue_threshold:
            masks = self.masks.updated(min_coverage={TISSUE: self.tissue_threshold})
            self.__dict__["masks"] = masks.set_only(self.masks.model_fields_set - {"min_coverage"})
        return self

    @property
    def hierarchical(self) -> bool:
        """Whether tiles are grouped into regions."""
        return self.region_tile_multiple is not None or self.requested_region_size_px is not None

    def resolved(self, spacing_um: float, tile_size_px: int) -> Self:
        """With the spacing (µm/px) and tile size that the preset decides, and regions by size and multiple.

        Raises:
            ConfigError: the regions are no multiple of these tiles.
        """
        made = self.updated(requested_spacing_um=spacing_um, requested_tile_size_px=tile_size_px)
        if made.hierarchical:
            region, multiple = made.requested_region_size_px, made.region_tile_multiple
            multiple = multiple or (region or 0) // tile_size_px
            made = made.updated(
                region_tile_multiple=multiple, requested_region_size_px=tile_size_px * multiple
            )
        return made.set_only(self.model_fields_set)

    def for_slide(self, sample_id: str, options: Mapping[str, Any]) -> Self:
        """With the options of a single slide (see `Slide.tiling`).

        Raises:
            ManifestError: one of them does not exist or has a value that is not allowed.
        """
        own = self.masks.threshold_of(sample_id)
        if own and "tissue_threshold" in options:
            raise ManifestError(
                f"slide {sample_id}: tissue_threshold is one of tissue, and its tiles are of annotations: "
                "masks.min_coverage has the thresholds of labels"
            )
        if not options and not own:
            return self
        made: dict[str, dict[str, Any]] = {"segmentation": {}, "filtering": {}, "qc": {}}
        color = self.masks.color_of(sample_id)
        drawn = {} if color is None else {"tissue_contour_color": color}
        own |= {name: value for name, value in options.items() if name == "tissue_threshold"}
        for name, value in options.items():
            section, _, field = name.partition("_")
            if section in made:
                made[section][field] = value
            elif name not in own:
                raise ManifestError(
                    f"slide {sample_id}: tiling has no option {name!r}; allowed: tissue_threshold, "
                    "segmentation_…, filtering_…, qc_…"
                )
        try:
            return self.updated(
                segmentation=self.segmentation.updated(**made["segmentation"]),
                filtering=self.filtering.updated(**made["filtering"]),
                qc=self.qc.updated(**made["qc"]),
                preview=self.preview.updated(**drawn),
                **own,
            )
        except ConfigError as error:
            raise ManifestError(f"slide {sample_id}: {error}") from None

    def on_device(self, device: str) -> Self:
        """With networks that find tissue or artefacts on a device, where nobody says another."""
        made: dict[str, Any] = {}
        if self.segmentation.method in learned_methods() and self.segmentation.device is None:
            made["segmentation"] = self.segmentation.updated(device=device)
        if self.qc.network() is not None and self.qc.device is None:
            made["qc"] = self.qc.updated(device=device)
        return self.updated(**made).set_only(self.model_fields_set) if made else self

    @model_validator(mode="after")
    def _tiles_that_are_there_are_not_measured(self) -> Self:
        there = self.read_coordinates_from or self.read_tiles_from
        if self.qc.on and there is not None:
            raise ConfigError(
                f"qc measures tiles that are looked for, and {there} has them already: leave qc out, or tile "
                "the slides anew"
            )
        return self

    @model_validator(mode="after")
    def _regions_do_not_overlap(self) -> Self:
        if self.hierarchical and self.overlap:
            raise ConfigError(
                f"overlap={self.overlap:g} with regions: the tiles of a region lie side by side, and so do "
                "regions; leave overlap out, or region_tile_multiple and requested_region_size_px"
            )
        return self

    @model_validator(mode="after")
    def _region_is_a_multiple(self) -> Self:
        region, tile, multiple = (
            self.requested_region_size_px,
            self.requested_tile_size_px,
            self.region_tile_multiple,
        )
        if region is None or tile is None:
            return self
        if region % tile or region // tile < 2 or (multiple is not None and region != tile * multiple):
            raise ConfigError(
                f"requested_region_size_px={region} must be requested_tile_size_px={tile} times "
                f"{multiple if multiple else 'a whole number of 2 or more'}"
            )
        return self
