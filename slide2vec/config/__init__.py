"""What a user may set: PreprocessingConfig and ExecutionOptions, frozen, validated, keyword-only.

Defaults follow HS2P and the original slide2vec; `None` means "chosen for the model, the slide or
the machine", as each field says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, field_validator, model_validator

from slide2vec.choices import (
    BACKENDS,
    OUTPUT_FORMATS,
    SEGMENTATION_METHODS,
    Backend,
    EngineChoice,
    Executor,
    OutputFormat,
    Precision,
    PreparerChoice,
    SegmentationMethod,
    learned_methods,
)
from slide2vec.config.frozen import FrozenConfig
from slide2vec.config.masks import TISSUE_THRESHOLD, MaskSamplingConfig
from slide2vec.cpus import Budget
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
Location = Annotated[Path, PlainValidator(as_path)]


def _on_this_machine(given: object) -> Path:
    if is_remote(path := as_path(given)):
        raise ConfigError(f"{path} is behind a URL; tile archives are read from local folders: copy them")
    return path


def _writable(given: object) -> Path:
    if str(path := as_path(given)).startswith(("http://", "https://")):
        raise ConfigError(f"{path}: web pages cannot be written to; s3://, gs:// and folders can")
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
    """Which pictures to write beside the embeddings (needs ExecutionOptions.output_dir)."""

    save_mask_preview: bool = False
    save_tiling_preview: bool = False
    downsample: Annotated[float, Field(gt=0)] = 32
    tissue_contour_color: tuple[GrayLevel, GrayLevel, GrayLevel] = (157, 219, 129)
    mask_overlay_alpha: Fraction = 0.5


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


class ExecutionOptions(FrozenConfig):
    """How a run uses the machine and what it writes.

    Attributes:
        output_dir: where artifacts and previews go; None = nothing is written. May be a URL that fsspec
            opens (s3://bucket/folder, gs://…; by the extra [cloud]): every file is then written locally and
            published by one upload. Credentials and endpoint are the store's own affair
            (AWS_PROFILE, AWS_ENDPOINT_URL, …); a `upath.UPath` brings others.
        output_format: of embedding files.
        batch_size: tiles per forward pass; None = chosen for the encoder and device.
        num_workers: reading threads; None = the job's CPUs (see `slide2vec.cpus`).
        num_preprocessing_workers: slides planned (segmented, tiled) at once; None = the job's CPUs.
        num_gpus: devices to use; None = all, unless the model was given one. Each has a process of its own;
            `embed_slide` shares out the tiles of the slide, everything else whole slides.
        devices: the same by name, and on a CPU: ("cuda:0", "cuda:2"), ("cpu", "cpu").
        executor: "local": the devices of this machine; "ray": the GPUs of a Ray cluster, num_gpus of them or
            all that there are, now or later. On a cluster without GPUs, or with num_gpus=0, a worker on the
            CPUs of each node; with devices=("cpu", "cpu") as many as that. All nodes see the slides, weights
            and output_dir at the same paths, on storage that they share. A GPU of a cluster that the model's
            own machine does not have may need `precision`, which is the preset's on a GPU, fp32 on a CPU.
        ray_address: of the cluster's head, "auto" where one runs on this machine; None = the one that
            RAY_ADDRESS names, else a new one of this machine alone.
        precision: None = the preset's (fp32 on a CPU). "fp8" needs an engine.
        engine: what runs the encoder. "auto": an engine that `slide2vec build-engine` made for it, this
            precision and this machine, else PyTorch; "torch"; or a runtime whose engine has to be there.
        build_engine: with engine="auto": "auto" builds an engine before the first slide where the run then
            ends sooner, the build included, and one device of this process does all of it; "never" leaves
            that to `slide2vec build-engine`.
        torch_compile: use PyTorch's just-in-time compiler, where PyTorch runs it.
        prefetch_factor: batches that may be ready before the encoder needs them, at least.
        persistent_workers: has no effect: readers are threads, started within a millisecond per call.
        save_tile_embeddings, save_slide_embeddings, save_latents: extra artifacts of slide-level
            and patient-level models.
        save_patch_tokens: of tile-level models: also write the patch tokens of every tile, see
            `Model.save_patch_tokens`, once all slides are embedded.
        output_dtype: of the embeddings; None = fp16 for those of tiles where precision="fp16" is asked for
            here and they are computed in it, else fp32.
        stage_dir: folder on a local disk to which the next slides are copied while the present ones are
            embedded, for slides on slow or remote storage; None = slides are read where they are.
        stage_gb: GB (1e9 bytes) that the copies of a process may take there; None = half of what is free when
            it begins. A larger slide is read where it is.
        on_image_mismatch: of `Model.embed_images`, where an earlier embedding of a sample_id is of another
            image: "raise", or "reencode" to replace it.
        encoders_gb: of several encoders over the same slides, GB (1e9 bytes) that those in the memory of one
            device may take. Encoders that do not fit together take turns in groups, each of which reads the
            slides. None = 0.7 of what is free there when a call begins (on a CPU: free to this job).
        on_bad_slide: "fail" the patient one of whose slides cannot be embedded, or "skip" the slide and
            embed the patient from the others.
        shard: "i/n", i from 1 to n: a Pipeline embeds the i-th of n parts of its slides, balanced by the
            size of their files; the same part in every process that is given the same slides.
    """

    output_dir: Annotated[Path, PlainValidator(_writable)] | None = None
    output_format: Annotated[OutputFormat, PlainValidator(OUTPUT_FORMATS.checked)] = "pt"
    batch_size: Positive | None = None
    num_workers: Positive | None = None
    num_preprocessing_workers: Positive | None = None
    num_gpus: Annotated[int, Field(ge=0)] | None = None
    devices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    executor: Executor = "local"
    ray_address: str | None = None
    precision: Precision | None = None
    engine: EngineChoice = "auto"
    build_engine: Literal["auto", "never"] = "auto"
    torch_compile: bool = False
    prefetch_factor: Positive = 4
    persistent_workers: bool = True
    save_tile_embeddings: bool = False
    save_slide_embeddings: bool = False
    save_latents: bool = False
    save_patch_tokens: bool = False
    output_dtype: Literal["fp16", "fp32"] | None = None
    on_image_mismatch: Literal["raise", "reencode"] = "raise"
    on_bad_slide: Literal["fail", "skip"] = "fail"
    stage_dir: Path | None = None
    stage_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    encoders_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    shard: str | None = None

    @model_validator(mode="after")
    def _shard_is_of_a_run_on_disk(self) -> Self:
        if self.shard is not None and self.output_dir is None:
            raise ConfigError(
                f"shard={self.shard} is for a Pipeline, whose output_dir is common to all shards: give "
                "output_dir, or leave shard out"
            )
        return self

    @field_validator("shard")
    @classmethod
    def _shard_is_i_of_n(cls, value: str | None) -> str | None:
        return None if value is None else "{}/{}".format(*shard_numbers(value))

    @model_validator(mode="after")
    def _fits_the_executor(self) -> Self:
        if self.executor != "ray" and self.ray_address is not None:
            raise ConfigError(
                f'ray_address={self.ray_address} is for executor="ray"; say so, or leave it out'
            )
        if self.executor == "ray" and any(name != "cpu" for name in self.devices or ()):
            raise ConfigError(
                f'devices={", ".join(self.devices or ())} with executor="ray": say num_gpus=, for Ray '
                'chooses which; only workers on CPUs can be named, ("cpu", "cpu")'
            )
        return self

    def feature_dtype(self, precision: str) -> Literal["float16", "float32"]:
        """Of the embeddings, for a run in `precision`; fp16 is for runs that ask for it, not for presets."""
        asked = self.output_dtype or ("fp16" if self.precision == precision == "fp16" else "fp32")
        return "float16" if asked == "fp16" else "float32"

    @property
    def vector_dtype(self) -> Literal["float16", "float32"]:
        """Of the embeddings of slides and patients on disk."""
        return "float16" if self.output_dtype == "fp16" else "float32"

    def budget(self, device_type: str, gflops: float | None = None) -> Budget:
        """Threads of the stations of a process whose encoder runs on "cpu", "cuda" or "mps".

        Args:
            gflops: the encoder's work per tile; None = a lot.

        Raises:
            ConfigError: the environment variable SLIDE2VEC_CPUS is no positive integer.
        """
        return Budget.of(
            device_type,
            num_workers=self.num_workers,
            num_preprocessing_workers=self.num_preprocessing_workers,
            gflops=gflops,
        )


def shard_numbers(shard: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16).

    Raises:
        ConfigError: it is not i/n with 1 <= i <= n.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard.strip())
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(
            f'a shard is "i/n", the i-th of n from 1/n to n/n, got {shard!r}; in a SLURM array that counts '
            "from 0: $((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT"
        )
    return number, count
