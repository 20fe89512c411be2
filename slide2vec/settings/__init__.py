"""A run as a configuration file: the YAML of the original slide2vec, with `key=value` overrides.

docs/configuration.md lists the keys.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slide2vec.config import (
    ExecutionOptions,
    FilterConfig,
    MaskSamplingConfig,
    PreprocessingConfig,
    PreviewConfig,
    QualityConfig,
    SegmentationConfig,
)
from slide2vec.errors import ConfigError, PresetError
from slide2vec.files import is_remote
from slide2vec.recipes import load_recipe
from slide2vec.settings.keys import KEYS
from slide2vec.settings.mask_keys import label_keys, masks_of
from slide2vec.settings.text import as_yaml, parse_yaml, read_yaml
from slide2vec.settings.values import Source, Values, escaped, nested
from slide2vec.slides import IdFrom

__all__ = ["RunSettings", "load_settings", "settings_as_yaml", "versions"]

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run: which slides, which model, how they are tiled, and where everything goes.

    Attributes:
        manifest_path: CSV of slides; None where they come from elsewhere.
        slides_dir, id_from: how it is read, see `slide2vec.manifests.read_manifest`.
        preset, output_variant, weights, seed, device, input_size_px, allow_non_recommended_settings: as in
            `Model.from_preset`.
        preprocessing: with None where the preset decides.
        execution: its output_dir is where this run writes.
    """

    manifest_path: Path | None = None
    slides_dir: Path | None = None
    id_from: IdFrom = "name"
    preset: str
    output_variant: str | None = None
    weights: str | None = None
    seed: int = 0
    device: str | None = None
    input_size_px: int | None = None
    allow_non_recommended_settings: bool = False
    preprocessing: PreprocessingConfig
    execution: ExecutionOptions

    @property
    def presets(self) -> list[str]:
        """The names in `preset`, which may have several, with commas between them."""
        return preset_names(self.preset)


#: Fields of RunSettings and their keys; those of its configuration objects are in `KEYS`.
_RUN = {
    "manifest_path": "csv",
    "slides_dir": "slides_dir",
    "id_from": "id_from",
    "preset": "model.name",
    "output_variant": "model.output_variant",
    "weights": "model.weights",
    "seed": "seed",
    "device": "model.device",
    "input_size_px": "model.input_size_px",
    "allow_non_recommended_settings": "model.allow_non_recommended_settings",
}


def load_settings(
    path: Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> RunSettings:
    """The run that a configuration file describes. What nobody gave is not set in its preprocessing
    (`model_fields_set`).

    Args:
        path: YAML in the layout of the original slide2vec, 4.0 to 7.1; None = only defaults.
        overrides: "a.b=value", the value in YAML; later ones count.
        values: plain values by dotted key, taken literally, which count over both.
        defaults: by dotted key, where nobody gives any; others than those of the original's files.

    Raises:
        ConfigError: the file cannot be read, or something in it is not allowed; names file and key.
    """
    sources = [] if path is None else [Source(str(path), read_yaml(path))]
    sources += [_override(text) for text in overrides]
    literal = {key: escaped(v) if isinstance(v, str) else v for key, v in (values or {}).items()}
    sources.append(Source(COMMAND_LINE, nested(literal)))
    given = Values(sources, defaults or {})
    if given["wandb.enable"]:
        logger.warning("%s: Weights & Biases is not supported; ignored", given.where("wandb.enable"))
    run = {field: given[key] for field, key in _RUN.items()}
    _check_preset(given, path)
    return RunSettings(
        **run,
        preprocessing=_built(
            PreprocessingConfig,
            given,
            segmentation=_segmentation(given),
            filtering=_built(FilterConfig, given),
            qc=_built(QualityConfig, given),
            preview=_built(PreviewConfig, given),
            **masks_of(given),
        ),
        execution=_built(ExecutionOptions, given, output_dir=_output_dir(given)),
    )


def _override(text: str) -> Source:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not key=value, such as tiling.params.overlap=0.5")
    if key[0] in "+~":
        raise ConfigError(f"override {text!r}: the prefixes + and ~ are not supported; write key=value")
    content = parse_yaml(value, f"override {text[:100]!r}")
    return Source(COMMAND_LINE, nested({key.strip(): content}))


def _check_preset(given: Values, path: Path | None) -> None:
    """Find a wrong name before anything slow begins."""
    preset, variant = given["model.name"], given["model.output_variant"]
    if preset is None:
        where = COMMAND_LINE if path is None else path
        raise ConfigError(f"{where}: model.name is missing: name a preset (`slide2vec models` lists them)")
    for name in preset_names(preset):
        try:
            recipe = load_recipe(name)
        except (PresetError, OSError) as error:  # a name may be longer than files have
            raise ConfigError(f"{given.where('model.name')}: {error}") from None
        try:
            recipe.variant(variant)
        except PresetError as error:
            raise ConfigError(f"{given.where('model.output_variant')}: {error}") from None


def preset_names(text: str) -> list[str]:
    """The names in a text that may have several, with commas between them.

    Raises:
        ConfigError: one is there twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or [text]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"preset {', '.join(twice)} was given twice: name it once")
    return names


def _segmentation(given: Values) -> SegmentationConfig:
    method = _segmentation_method(given)
    made: SegmentationConfig = _built(SegmentationConfig, given, method=method)
    named = any(given.is_given(f"tiling.seg_params.{key}") for key in ("method", "use_hsv", "use_otsu"))
    return made if named else made.set_only(made.model_fields_set - {"method"})


def _segmentation_method(given: Values) -> str:
    """The method, which the original up to 4.2 gives as use_hsv and use_otsu."""
    key = "tiling.seg_params.method"
    method = str(given[key])
    use_hsv, use_otsu = given["tiling.seg_params.use_hsv"], given["tiling.seg_params.use_otsu"]
    if use_hsv is None and use_otsu is None:
        return method
    older = "hsv" if use_hsv is not False else "otsu" if use_otsu else "threshold"
    if given.is_given(key) and older != method:
        raise ConfigError(
            f"{given.where(key)}={method}, but use_hsv and use_otsu beside it mean {older}; keep one of them"
        )
    return older


def _output_dir(given: Values) -> Path:
    output_dir: Path = given["output_dir"]
    name = given["resume_dirname"]
    return output_dir / name if given["resume"] and name is not None else output_dir


def _built(owner: type[Any], given: Values, **more: Any) -> Any:
    """A configuration object from the keys that set its fields; its complaints name the keys."""
    keys = {key.field: name for name, key in KEYS.items() if key.owner is owner}
    fields = {field: given[name] for field, name in keys.items()}
    try:
        made = owner(**{**fields, **more})
        return made.set_only({field for field, name in keys.items() if given.is_given(name)} | more.keys())
    except ConfigError as error:
        text = str(error)
        for field, name in keys.items():
            text = text.replace(f"{field}=", f"{name}=")
            text = text.replace(f"{owner.__name__}.{field}:", f"{given.where(name)}:")
        raise ConfigError(text.removeprefix(f"{owner.__name__}: ")) from None


def settings_as_yaml(settings: RunSettings, extra: Mapping[str, Any]) -> str:
    """The run as a configuration file that repeats it; without its shard, as all shards write the same file.

    Args:
        extra: further keys; `versions` is one that `load_settings` ignores.
    """
    owners: dict[type[BaseModel], BaseModel] = {
        PreprocessingConfig: settings.preprocessing,
        ExecutionOptions: settings.execution.updated(shard=None),
        SegmentationConfig: settings.preprocessing.segmentation,
        FilterConfig: settings.preprocessing.filtering,
        QualityConfig: settings.preprocessing.qc,
        PreviewConfig: settings.preprocessing.preview,
        MaskSamplingConfig: settings.preprocessing.masks,
    }
    run = {key: getattr(settings, field) for field, key in _RUN.items()}
    elsewhere = settings.preprocessing.read_coordinates_from is not None
    leaves = {
        name: _plain(getattr(owners[key.owner], key.field) if key.owner else run[name])
        for name, key in KEYS.items()
        if (key.owner or name in run) and not (elsewhere and _is_of_tissue(name))
    }
    return as_yaml({**nested({**leaves, **label_keys(settings.preprocessing.masks)}), **extra})


def _is_of_tissue(key: str) -> bool:
    """Whether it decides which tiles a slide has: with coordinate files, these do."""
    return key.startswith(("tiling.seg_params.", "tiling.filter_params.", "tiling.qc.")) or key in (
        *("tiling.params.tolerance", "tiling.params.overlap", "tiling.params.tissue_threshold"),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path | str) or is_remote(value):
        return escaped(str(value))
    return list(value) if isinstance(value, tuple) else value


#: Packages that may affect embeddings or speed, by the names they are distributed under.
_PACKAGES = {
    "slide2vec": ("slide2vec",),
    "torch": ("torch",),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python"),
    "openslide": ("openslide-python",),
    "openslide-bin": ("openslide-bin",),
    "cucim": ("cucim-cu13", "cucim-cu12", "cucim"),
    "pyvips": ("pyvips",),
    "tifffile": ("tifffile",),
    "simplejpeg": ("simplejpeg",),
    "imagecodecs": ("imagecodecs",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings",),
    "openvino": ("openvino",),
}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that may affect a run."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
