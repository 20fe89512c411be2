"""What a run over a cohort gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from slide2vec.artifacts import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
)
from slide2vec.progress import RunSummary

__all__ = ["Artifact", "FailedPatient", "FailedSlide", "RunResult", "Stage"]

Artifact: TypeAlias = (
    TileEmbeddingArtifact | HierarchicalEmbeddingArtifact | SlideEmbeddingArtifact | PatientEmbeddingArtifact
)

Stage: TypeAlias = Literal["tiling", "embedding", "aggregation"]


@dataclass(frozen=True)
class FailedSlide:
    """A slide that could not be tiled or embedded, or whose tiles could not be aggregated, and why."""

    sample_id: str
    image_path: Path
    stage: Stage
    error: Exception


@dataclass(frozen=True)
class FailedPatient:
    """A patient who could not be embedded, and why."""

    patient_id: str
    error: Exception


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The artifacts of a run, in the order of its slides, those finished by earlier runs included.

    Attributes:
        tile_artifacts, hierarchical_artifacts, slide_artifacts, patient_artifacts: by what they embed.
        process_list_path: the table of all slides.
        failed: slides that failed; the others are complete.
        failed_patients: patients without an embedding because a slide of theirs, or their own
            aggregation, failed.
        without_tissue: sample_ids of slides with 0 tiles.
        skipped_tiles: sample_id -> tiles left out because they could not be decoded.
        remarks: sample_id -> what is implausible about its tissue and tiles, in sentences.
        resumed: slides that an earlier run had finished with the same settings.
        recomputed: what differed -> slides that an earlier run had finished otherwise.
        summary: speed and bottleneck; None when nothing was left to do.
    """

    tile_artifacts: list[TileEmbeddingArtifact] = field(default_factory=list)
    hierarchical_artifacts: list[HierarchicalEmbeddingArtifact] = field(default_factory=list)
    slide_artifacts: list[SlideEmbeddingArtifact] = field(default_factory=list)
    patient_artifacts: list[PatientEmbeddingArtifact] = field(default_factory=list)
    process_list_path: Path
    failed: tuple[FailedSlide, ...] = ()
    failed_patients: tuple[FailedPatient, ...] = ()
    without_tissue: tuple[str, ...] = ()
    skipped_tiles: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resumed: int = 0
    recomputed: Mapping[str, int] = field(default_factory=dict)
    summary: RunSummary | None = None
