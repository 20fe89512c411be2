"""`tiling.masks` of a configuration file: labels laid over those of the original's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from slide2vec.config import MaskSamplingConfig
from slide2vec.errors import ConfigError
from slide2vec.labels import TISSUE
from slide2vec.settings.keys import LABELS
from slide2vec.settings.values import Values

__all__ = ["label_keys", "masks_of"]

logger = logging.getLogger(__name__)

#: Of tissue in the original's files.
_COLOR = [157, 219, 129]
_DEFAULT = MaskSamplingConfig()
#: Where a file says nothing of a label.
_BASE: Mapping[str, Mapping[str, Any]] = {
    "pixel_mapping": _DEFAULT.pixel_mapping,
    "min_coverage": _DEFAULT.min_coverage,
    "colors": {},
}


def masks_of(given: Values) -> dict[str, MaskSamplingConfig]:
    """`masks` of a file, unless they are what they are without it.

    As in the original, labels are added to "background" and "tissue"; one whose value is blank is removed,
    and one whose least coverage is blank is not sampled, unless it is tissue alone.

    Raises:
        ConfigError: naming the key.
    """
    found = {field: {**_BASE[field], **given.labels(section)} for field, section in LABELS.items()}
    removed = {label for label, value in found["pixel_mapping"].items() if value is None}
    mapping, coverage, colors = (
        {
            label: value
            for label, value in found[field].items()
            if label not in removed and (value is not None or field == "colors")
        }
        for field in ("pixel_mapping", "min_coverage", "colors")
    )
    if not coverage and mapping.keys() == _DEFAULT.pixel_mapping.keys():
        coverage = dict(_DEFAULT.min_coverage)
    if colors:
        colors = {**dict.fromkeys(mapping), **colors}
    plain = {name: given[f"tiling.masks.{name}"] for name in ("output_mode", "strategy")}
    try:
        made = MaskSamplingConfig(
            pixel_mapping=mapping, min_coverage=coverage, colors=colors or None, **plain
        )
    except ConfigError as error:
        raise ConfigError(_named(str(error))) from None
    if made.by_class:
        return {"masks": made}
    if colors and colors.get(TISSUE) not in (None, _COLOR):
        key = f"{LABELS['colors']}.{TISSUE}"
        logger.warning("%s has no effect here: tiling.preview.tissue_contour_color has", given.where(key))
    # the threshold of tissue is a key of its own, too
    made = made.updated(colors=None, min_coverage=_DEFAULT.min_coverage)
    made = made.set_only({"output_mode", "strategy"})
    return {} if made == _DEFAULT else {"masks": made}


def _named(problem: str) -> str:
    return problem.replace("MaskSamplingConfig.", "tiling.masks.").replace(
        "MaskSamplingConfig", "tiling.masks"
    )


def label_keys(masks: MaskSamplingConfig) -> dict[str, Any]:
    """The keys of a file for the labels of masks; none where they are those of tissue, whose threshold is
    `tiling.params.tissue_threshold`."""
    if not masks.by_class:
        return {}
    made: dict[str, Any] = {}
    for field, section in LABELS.items():
        values = getattr(masks, field) or {}
        blank = dict.fromkeys(_BASE[field].keys() - values.keys())
        made |= {
            f"{section}.{label}": list(value) if isinstance(value, tuple) else value
            for label, value in {**blank, **values}.items()
        }
    return made
