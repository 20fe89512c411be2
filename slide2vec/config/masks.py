"""Which labels masks have, and which of them are sampled."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from slide2vec.config.frozen import FrozenConfig
from slide2vec.errors import ConfigError
from slide2vec.labels import (
    MERGED,
    TISSUE,
    checked_colors,
    checked_coverage,
    checked_mapping,
    split_class_name,
)

__all__ = ["TISSUE_THRESHOLD", "MaskSamplingConfig"]

#: The labels of a mask of tissue, and the least share of a tile that is kept; as HS2P's.
_TISSUE_MAPPING: dict[str, tuple[int, ...]] = {"background": (0,), TISSUE: (1,)}
TISSUE_THRESHOLD = 0.01
_TISSUE_COVERAGE = {TISSUE: TISSUE_THRESHOLD}


class MaskSamplingConfig(FrozenConfig):
    """The labels of annotation masks, and which of them tiles are made of. The fields are HS2P's.

    As long as the labels are "background" (0) and "tissue" (1), and tissue is what is sampled, a mask is one
    of tissue, in place of segmentation. Other labels need a mask for every slide.

    Attributes:
        pixel_mapping: label -> its value in masks, or several; every value that a mask holds has to have a
            label. Labels become names of folders.
        colors: label -> (red, green, blue) in previews, None for that of tissue; of all labels.
        min_coverage: label -> least share of a tile that it has to cover. Only these labels are sampled.
        output_mode: "per_annotation": each sampled label has tiles and embeddings of its own; "merged": all
            have them together, each tile once.
        strategy: "joint": one grid over all sampled labels; "independent": each label has its own.
    """

    pixel_mapping: dict[str, tuple[int, ...]] = _TISSUE_MAPPING
    colors: dict[str, tuple[int, int, int] | None] | None = None
    min_coverage: dict[str, float] = _TISSUE_COVERAGE
    output_mode: Literal["per_annotation", "merged"] = "per_annotation"
    strategy: Literal["joint", "independent"] = "joint"

    @field_validator("pixel_mapping", mode="before")
    @classmethod
    def _labels_and_values(cls, given: Any) -> Any:
        return checked_mapping(given)

    @field_validator("colors", mode="before")
    @classmethod
    def _colors_of_all(cls, given: Any, info: ValidationInfo) -> Any:
        return checked_colors(given, list(info.data.get("pixel_mapping", ())))

    @field_validator("min_coverage", mode="before")
    @classmethod
    def _coverage_of_labels(cls, given: Any, info: ValidationInfo) -> Any:
        return checked_coverage(given, list(info.data.get("pixel_mapping", ())))

    @model_validator(mode="after")
    def _samples_known_labels(self) -> Self:
        if TISSUE in self.min_coverage and TISSUE not in self.pixel_mapping:  # the default
            raise ConfigError(
                f"min_coverage says which of {', '.join(self.pixel_mapping)} are sampled, and from which "
                "share of a tile on; give it"
            )
        return self

    @property
    def by_class(self) -> bool:
        """Whether tiles are made of annotations, rather than of tissue."""
        return self.pixel_mapping != _TISSUE_MAPPING or self.min_coverage.keys() != {TISSUE}

    @property
    def classes(self) -> tuple[str, ...]:
        """What each slide has tiles of: the sampled labels, or "merged", or "tissue"."""
        if not self.by_class:
            return (TISSUE,)
        return (MERGED,) if self.output_mode == "merged" else tuple(self.min_coverage)

    def class_of(self, sample_id: str) -> str:
        """The class of a slide that is named as by `slide2vec.labels.class_name`."""
        folder, _ = split_class_name(sample_id)
        return folder or (MERGED if self.classes == (MERGED,) else TISSUE)

    def threshold_of(self, sample_id: str) -> dict[str, float]:
        """`tissue_threshold` of a class of a slide, as it is recorded of its tiles; nothing where they are of
        tissue."""
        return (
            {"tissue_threshold": self.min_coverage.get(self.class_of(sample_id), 0.0)}
            if self.by_class
            else {}
        )

    def color_of(self, sample_id: str) -> tuple[int, int, int] | None:
        """Of a class of a slide in previews; None: as of tissue."""
        return (self.colors or {}).get(self.class_of(sample_id)) if self.by_class else None

    def identity(self, sample_id: str) -> dict[str, Any] | None:
        """What decides the tiles of a class of a slide, JSON-ready; None where they are of tissue."""
        if not self.by_class:
            return None
        own = self.class_of(sample_id)
        together = own == MERGED or self.strategy == "joint"
        return {
            "annotation": own,
            "strategy": self.strategy,
            # in order: areas of later labels lie over those of earlier ones
            "pixel_mapping": [[label, sorted(values)] for label, values in self.pixel_mapping.items()],
            "sampled": sorted(self.min_coverage) if together else [own],
            "min_coverage": {
                label: share
                for label, share in sorted(self.min_coverage.items())
                if own == MERGED or label == own
            },
        }
