"""Tiles of previous runs: with which settings they were found, and how these differ from the present ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

from slide2vec.config import FilterConfig, PreprocessingConfig, QualityConfig, SegmentationConfig
from slide2vec.errors import TilingError
from slide2vec.files import names_below
from slide2vec.slides import Slide
from slide2vec.tiling.coordinates import load_header
from slide2vec.tiling.previous_files import qc_of, segmenter_of
from slide2vec.tiling.tissue_methods import checkpoint_of
from slide2vec.tiling.types import PRECOMPUTED, Tiling

__all__ = [
    "CHECKPOINT",
    "PreviousTiles",
    "any_previous",
    "differences",
    "given_options",
    "previous_tiles",
    "with_previous_options",
]

_SUFFIX = ".coordinates.meta.json"
#: Threads that read metadata, on network storage perhaps.
_LOOKERS = 16
#: Metadata files that are tried before a folder counts as one without any that can be read.
_TRIES = 16
_SEGMENTATION = ("method", "sthresh", "sthresh_up", "mthresh", "close")

#: The digest of a segmenter's weights: no option, but tiles that were found with others are others.
CHECKPOINT = "segmentation weights"

#: By option, what was found and what is asked for.
Differences = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class PreviousTiles:
    """How the tiles of a slide were found.

    Attributes:
        size_px, spacing_um: of the tiles (of the regions, with such), as they were asked for; µm/px.
        overlap: of neighbouring tiles, as a fraction.
        options: tolerance, tissue_threshold, segmentation_…, filtering_…, qc_…, as in `given_options`.
        with_mask: the tissue is that of a mask raster.
        spacing_at_level_0: µm/px, as it was given for the slide; None where the file's own was taken.
    """

    size_px: int
    spacing_um: float
    overlap: float
    options: Mapping[str, Any]
    with_mask: bool
    spacing_at_level_0: float | None
    base_spacing_um: float

    @classmethod
    def of(cls, tiling: Tiling, tile_size_px: int | None) -> PreviousTiles:
        """From what coordinate files say.

        Args:
            tile_size_px: that the run asks for, which is what `ref_tile_size` is without being asked for.
        """
        made, geometry = tiling.segmentation, tiling.geometry
        options: dict[str, Any] = {
            "tolerance": geometry.tolerance,
            "tissue_threshold": tiling.tissue_threshold,
            "segmentation_downsample": made.requested_downsample,
            "masks": _sampled_as(tiling.annotation, tiling.strategy),
        }
        with_mask = made.method == PRECOMPUTED
        if not with_mask:
            recorded = {name: getattr(made, name) for name in _SEGMENTATION}
            options |= {
                f"segmentation_{name}": value for name, value in recorded.items() if value is not None
            }
        filtering = tiling.filtering
        if filtering.ref_tile_size == tile_size_px:
            filtering = filtering.updated(ref_tile_size=None)
        options |= {f"filtering_{name}": value for name, value in filtering.model_dump().items()}
        return cls(
            geometry.requested_tile_size_px,
            geometry.requested_spacing_um,
            geometry.overlap,
            options,
            with_mask,
            tiling.spacing_at_level_0,
            geometry.base_spacing_um,
        )


def given_options(config: PreprocessingConfig, slide: Slide | None = None) -> Set[str]:
    """The options that the user gave, for all slides or for this one; sections with their fields
    ("segmentation_method")."""
    given = set(config.model_fields_set) - {"segmentation", "filtering", "qc"}
    given |= {f"qc_{name}" for name in config.qc.model_fields_set}
    given |= {f"segmentation_{name}" for name in config.segmentation.model_fields_set}
    given |= {f"filtering_{name}" for name in config.filtering.model_fields_set}
    given |= {"tissue_threshold"} if config.masks.by_class else set()  # masks says it
    return given | set(slide.tiling if slide is not None else ())


def _sampled_as(annotation: str | None, strategy: str | None) -> str:
    """What tiles are of, in words."""
    return "of tissue" if strategy is None else f"of {annotation}, {strategy}"


def _asked(config: PreprocessingConfig, sample_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {"tolerance": config.tolerance, "tissue_threshold": config.tissue_threshold}
    own = config.masks.class_of(sample_id) if config.masks.by_class else None
    found["masks"] = _sampled_as(own, config.masks.strategy if config.masks.by_class else None)
    found |= {f"segmentation_{name}": value for name, value in config.segmentation.model_dump().items()}
    found[CHECKPOINT] = checkpoint_of(config.segmentation)
    found |= {f"qc_{name}": value for name, value in config.qc.model_dump().items()}
    return found | {f"filtering_{name}": value for name, value in config.filtering.model_dump().items()}


def any_previous(directory: Path, config: PreprocessingConfig) -> PreviousTiles | None:
    """How the tiles of some slide in a directory of coordinate files were found; None without any."""
    for name in names_below(directory, _SUFFIX)[:_TRIES]:
        found = _earlier(directory, name, config)
        if found is not None:
            return found
    return None


def previous_tiles(
    directory: Path, slides: Sequence[Slide], config: PreprocessingConfig
) -> dict[str, PreviousTiles]:
    """How the tiles of slides were found that have coordinate files in a directory, by sample_id."""
    there = set(names_below(directory, _SUFFIX))
    names = [slide.sample_id for slide in slides if slide.sample_id in there]
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="earlier") as pool:
        found = pool.map(lambda name: _earlier(directory, name, config), names)
        return {name: each for name, each in zip(names, found, strict=True) if each is not None}


def _earlier(directory: Path, sample_id: str, config: PreprocessingConfig) -> PreviousTiles | None:
    """None where there are no files, or damaged ones: the slide is tiled anew."""
    try:
        found = PreviousTiles.of(load_header(directory, sample_id), config.requested_tile_size_px)
    except TilingError:
        return None
    recorded = qc_of(directory, sample_id)
    measured = recorded if isinstance(recorded, Mapping) else {}
    options = {
        f"qc_{name}": measured.get(name, usual) for name, usual in QualityConfig().model_dump().items()
    }
    options[CHECKPOINT] = segmenter_of(directory, sample_id)
    return replace(found, options={**found.options, **options})


def differences(earlier: PreviousTiles, slide: Slide, config: PreprocessingConfig) -> Differences:
    """What of a slide's tiles was found otherwise than it is asked for.

    Raises:
        ManifestError: the slide's own tiling options are wrong.
    """
    asked = _asked(config.for_slide(slide.sample_id, slide.tiling), slide.sample_id)
    found = {
        name: (value, asked.get(name))
        for name, value in earlier.options.items()
        if not _same(name, value, asked.get(name))
    }
    with_mask = slide.mask_path is not None
    if earlier.with_mask != with_mask:
        masked = {True: "with a mask", False: "without a mask"}
        return {"mask_path": (masked[earlier.with_mask], masked[with_mask])}
    if with_mask:  # the segmentation options have no effect then
        found = {name: both for name, both in found.items() if not name.startswith("segmentation")}
    given, now = earlier.spacing_at_level_0, slide.spacing_at_level_0
    if given != now and not (given is None and now is not None and isclose(now, earlier.base_spacing_um)):
        found["spacing_at_level_0"] = given, now
    return found


def _same(name: str, found: Any, asked: Any) -> bool:
    if name == "segmentation_downsample":  # which HS2P records as a whole number
        return int(found) == int(asked)
    return bool(found == asked)


def with_previous_options(
    slides: Sequence[Slide], config: PreprocessingConfig, there: Mapping[str, PreviousTiles]
) -> tuple[list[Slide], PreprocessingConfig]:
    """Slides and configuration with the settings of tiles that are there, where the user gave none.

    What most slides have in common goes into the configuration, and so to slides without tiles; what others
    have is theirs.

    Args:
        there: by sample_id.
    """
    options: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for slide in slides:
        if slide.sample_id in there:
            free = _free(there[slide.sample_id], slide, config)
            options[tuple(free.items())] += not there[slide.sample_id].with_mask
    if not options:
        return list(slides), config
    common = _with(config, dict(options.most_common(1)[0][0]))
    return [_own(slide, common, there.get(slide.sample_id)) for slide in slides], common


def _free(earlier: PreviousTiles, slide: Slide, config: PreprocessingConfig) -> dict[str, Any]:
    """The options of its tiles that the user has not given."""
    given = given_options(config, slide)
    return {name: value for name, value in earlier.options.items() if name not in given}


def _with(config: PreprocessingConfig, options: Mapping[str, Any]) -> PreprocessingConfig:
    """With options in effect; they do not count as given."""
    made: dict[str, Any] = {
        name: options[name] for name in ("tolerance", "tissue_threshold") if name in options
    }
    parts: tuple[tuple[str, SegmentationConfig | FilterConfig | QualityConfig], ...] = (
        ("segmentation", config.segmentation),
        ("filtering", config.filtering),
        ("qc", config.qc),
    )
    for section, part in parts:
        fields = type(part).model_fields
        own = {name: options[f"{section}_{name}"] for name in fields if f"{section}_{name}" in options}
        if not all(_same(f"{section}_{name}", value, getattr(part, name)) for name, value in own.items()):
            made[section] = part.updated(**own).set_only(part.model_fields_set)
    return config.updated(**made).set_only(config.model_fields_set)


def _own(slide: Slide, config: PreprocessingConfig, earlier: PreviousTiles | None) -> Slide:
    """The slide with what its tiles have otherwise than the configuration says."""
    if earlier is None:
        return slide
    if earlier.spacing_at_level_0 is not None and slide.spacing_at_level_0 is None:
        slide = replace(slide, spacing_at_level_0=earlier.spacing_at_level_0)
    given = given_options(config, slide)
    found = differences(earlier, slide, config)
    own = {
        name: was
        for name, (was, _) in found.items()
        if name in earlier.options and name not in given and name not in ("tolerance", CHECKPOINT)
    }
    return replace(slide, tiling={**slide.tiling, **own}) if own else slide
