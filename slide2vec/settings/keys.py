"""The keys of a configuration file: what each sets, its default, and its older spellings.

The layout is that of the original slide2vec, 4.0 to 7.1.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from slide2vec.config import (
    ExecutionOptions,
    FilterConfig,
    Location,
    MaskSamplingConfig,
    PreprocessingConfig,
    PreviewConfig,
    QualityConfig,
    SegmentationConfig,
)
from slide2vec.errors import ConfigError
from slide2vec.slides import IdFrom

__all__ = ["FIXED", "FREE", "KEYS", "LABELS", "OLDER", "SECTIONS", "WITHOUT_EFFECT", "Key"]


@dataclass(frozen=True)
class Key:
    """A key of the file.

    Attributes:
        type: what pydantic checks its values against.
        default: where the file says nothing, or leaves it blank.
        owner, field: the configuration class and the field that it sets; None for those of RunSettings
            and for those that other keys are made from.
    """

    type: Any
    default: Any = None
    owner: type[BaseModel] | None = None
    field: str = ""

    def checked(self, value: Any) -> Any:
        """A plain value as the type of the key.

        Raises:
            ConfigError: saying what is allowed and what was given.
        """
        given = f"got {reprlib.repr(value)}"
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"NUL is not allowed, {given}")
        try:
            text = json.dumps(value, allow_nan=False)
        except ValueError:
            raise ConfigError(f"must be a finite number, {given}") from None
        try:  # JSON has the types of YAML: text is no number, 1 is not true, but a list may be a tuple
            return TypeAdapter(self.type).validate_json(text, strict=True)
        except ValidationError as error:
            own = next((c for item in error.errors() if (c := (item.get("ctx") or {}).get("error"))), None)
            if isinstance(own, ConfigError):
                raise own from None
            wrong = dict.fromkeys(item["msg"].lower() for item in error.errors())
            raise ConfigError(f"{'; or '.join(wrong)}, {given}") from None


_OWN: Any = object()


def _of(owner: type[BaseModel], field: str, default: Any = _OWN) -> Key:
    """A key that sets a field; the default is the field's, or that of the original's files."""
    info = owner.model_fields[field]
    kind = Annotated[(info.annotation, Field(), *info.metadata)]  # type: ignore[name-defined]
    if default is _OWN:
        default = info.default
    return Key(kind, default, owner, field)


def _all_of(prefix: str, owner: type[BaseModel], names: Iterable[str]) -> dict[str, Key]:
    return {f"{prefix}.{name}": _of(owner, name) for name in names}


Text = str | None

#: All keys, in the order in which they are written.
KEYS: dict[str, Key] = {
    "csv": Key(Location | None),
    "output_dir": _of(ExecutionOptions, "output_dir", Path("output")),
    "slides_dir": Key(Location | None),
    "id_from": Key(IdFrom, "name"),
    "resume": _of(PreprocessingConfig, "resume"),
    "fingerprint": _of(PreprocessingConfig, "fingerprint"),
    "resume_dirname": Key(Text),
    "save_tiles": _of(PreprocessingConfig, "save_tiles"),
    "on_bad_tile": _of(PreprocessingConfig, "on_bad_tile"),
    "on_bad_slide": _of(ExecutionOptions, "on_bad_slide"),
    "output_format": _of(ExecutionOptions, "output_format"),
    "seed": Key(Annotated[int, Field(ge=0, lt=2**32)], 0),
    "model.name": Key(Text),
    "model.output_variant": Key(Text),
    "model.weights": Key(Text),
    "model.device": Key(Text),
    **_all_of(
        "model",
        ExecutionOptions,
        ("batch_size", "save_tile_embeddings", "save_slide_embeddings", "save_latents", "save_patch_tokens"),
    ),
    "model.input_size_px": Key(Annotated[int, Field(gt=0)] | None),
    "model.allow_non_recommended_settings": Key(bool, False),
    **_all_of(
        "tiling",
        PreprocessingConfig,
        (
            "backend",
            "on_the_fly",
            "gpu_decode",
            "preparer",
            "use_supertiles",
            "read_coordinates_from",
            "read_tiles_from",
        ),
    ),
    **_all_of(
        "tiling.params",
        PreprocessingConfig,
        (
            "requested_spacing_um",
            "tolerance",
            "requested_tile_size_px",
            "requested_region_size_px",
            "region_tile_multiple",
            "overlap",
        ),
    ),
    "tiling.params.tissue_threshold": _of(PreprocessingConfig, "tissue_threshold", 0.1),
    **_all_of("tiling.seg_params", SegmentationConfig, SegmentationConfig.model_fields),
    "tiling.seg_params.use_hsv": Key(bool | None),
    "tiling.seg_params.use_otsu": Key(bool | None),
    **_all_of("tiling.filter_params", FilterConfig, FilterConfig.model_fields),
    **_all_of("tiling.qc", QualityConfig, QualityConfig.model_fields),
    "tiling.preview.save_mask_preview": _of(PreviewConfig, "save_mask_preview", True),
    "tiling.preview.save_tiling_preview": _of(PreviewConfig, "save_tiling_preview", True),
    **_all_of(
        "tiling.preview",
        PreviewConfig,
        ("downsample", "tissue_contour_color", "mask_overlay_alpha"),
    ),
    **_all_of("tiling.masks", MaskSamplingConfig, ("output_mode", "strategy")),
    "speed.precision": _of(ExecutionOptions, "precision"),
    "speed.engine": _of(ExecutionOptions, "engine"),
    "speed.build_engine": _of(ExecutionOptions, "build_engine"),
    "speed.torch_compile": _of(ExecutionOptions, "torch_compile"),
    "speed.output_dtype": _of(ExecutionOptions, "output_dtype"),
    "speed.num_dataloader_workers": _of(ExecutionOptions, "num_workers"),
    "speed.num_preprocessing_workers": _of(ExecutionOptions, "num_preprocessing_workers"),
    "speed.num_cucim_workers": _of(PreprocessingConfig, "num_cucim_workers"),
    "speed.num_gpus": _of(ExecutionOptions, "num_gpus"),
    "speed.devices": _of(ExecutionOptions, "devices"),
    "speed.executor": _of(ExecutionOptions, "executor"),
    "speed.ray_address": _of(ExecutionOptions, "ray_address"),
    "speed.shard": _of(ExecutionOptions, "shard"),
    "speed.prefetch_factor_embedding": _of(ExecutionOptions, "prefetch_factor"),
    "speed.persistent_workers_embedding": _of(ExecutionOptions, "persistent_workers"),
    "speed.stage_dir": _of(ExecutionOptions, "stage_dir"),
    "speed.stage_gb": _of(ExecutionOptions, "stage_gb"),
    "speed.encoders_gb": _of(ExecutionOptions, "encoders_gb"),
    "speed.scratch_dir": _of(ExecutionOptions, "scratch_dir"),
    "speed.scratch_gb": _of(ExecutionOptions, "scratch_gb"),
    "wandb.enable": Key(bool, False),
}

#: Other spellings, of other versions of the original, and what they set.
OLDER: Mapping[str, tuple[str, ...]] = {
    "tiling.masks.min_coverage.tissue": ("tiling.params.tissue_threshold",),
    "tiling.params.target_spacing_um": ("tiling.params.requested_spacing_um",),
    "tiling.params.target_tile_size_px": ("tiling.params.requested_tile_size_px",),
    "tiling.params.target_region_size_px": ("tiling.params.requested_region_size_px",),
    "tiling.preview.mask_overlay_color": ("tiling.preview.tissue_contour_color",),
    "tiling.preview.save": ("tiling.preview.save_mask_preview", "tiling.preview.save_tiling_preview"),
    "tiling.seg_params.sam2_checkpoint_path": ("tiling.seg_params.weights",),
    "speed.num_workers": ("speed.num_dataloader_workers",),
    "speed.num_workers_embedding": ("speed.num_dataloader_workers",),
    "speed.prefetch_factor": ("speed.prefetch_factor_embedding",),
}

#: Keys of the original that change nothing here, and the values that deserve no warning.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "tiling.adaptive_batching": (False,),
    "tiling.jpeg_backend": ("pil", "turbojpeg"),
    "tiling.mask_backend": ("auto",),
    "tiling.independent_sampling": (True,),
    "tiling.seg_params.sam2_device": ("cpu",),
    "tiling.seg_params.sam2_num_workers": (),
}

#: Keys of the original for what is not supported: the only value allowed, and what to say of others.
FIXED: Mapping[str, tuple[Any, str]] = {
    "tiling.seg_params.sam2_config_path": (
        None,
        "the method sam2 is SAM 2.1 with Hiera-T, as AtlasPatch has it, and no other",
    ),
}

#: Sections whose keys are labels of masks, by the field that they make.
LABELS: Mapping[str, str] = {
    field: f"tiling.masks.{field}" for field in ("pixel_mapping", "min_coverage", "colors")
}

#: Sections whose keys are the user's.
FREE = frozenset({"wandb", "versions", *LABELS.values()})


def _sections() -> frozenset[str]:
    """All that have keys below them."""
    keys = [*KEYS, *OLDER, *WITHOUT_EFFECT, *FIXED]
    above = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 1)}
    return frozenset(above | FREE)


SECTIONS = _sections()
