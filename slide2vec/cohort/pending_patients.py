"""Patients whose slides are not all complete yet: their slide embeddings are kept here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slide2vec.slides import Slide

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Patient", "PendingPatients", "by_patient", "patient_of"]


def patient_of(slide: Slide) -> str:
    """Whose slide it is; without patient_id it is a patient of its own, by its sample_id."""
    return slide.patient_id or slide.sample_id


def by_patient(slides: Iterable[Slide]) -> dict[str, list[Slide]]:
    """The slides of each patient, patients in order of first appearance."""
    found: dict[str, list[Slide]] = {}
    for slide in slides:
        found.setdefault(patient_of(slide), []).append(slide)
    return found


@dataclass
class Patient:
    """A patient whose slides come in one by one.

    Attributes:
        embeddings: sample_id -> (D,), of the slides that have one.
        failed: sample_id -> error.
        missing: sample_ids that are not complete.
    """

    patient_id: str
    slides: list[Slide]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    def in_order(self) -> dict[str, Tensor]:
        """The embeddings in the order of the slides, whatever order they came in."""
        names = [slide.sample_id for slide in self.slides]
        return {name: self.embeddings[name] for name in names if name in self.embeddings}


class PendingPatients:
    """The patients that are not complete yet. Used from one thread."""

    def __init__(self, slides: Sequence[Slide]) -> None:
        patients = [
            Patient(name, theirs, missing={slide.sample_id for slide in theirs})
            for name, theirs in by_patient(slides).items()
        ]
        self._of = {slide.sample_id: patient for patient in patients for slide in patient.slides}

    def on_slide_completed(
        self, sample_id: str, embedding: Tensor | None = None, error: Exception | None = None
    ) -> Patient | None:
        """A slide is complete; its patient, if it was the last of theirs.

        Args:
            embedding: (D,); None for a slide without tissue, or one that failed.
        """
        patient = self._of[sample_id]
        patient.missing.discard(sample_id)
        if embedding is not None:
            patient.embeddings[sample_id] = embedding
        if error is not None:
            patient.failed[sample_id] = error
        return None if patient.missing else patient
