"""Files of patients: each is written with the last of their slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from slide2vec.artifacts import write_patient_embedding
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.pending_patients import Patient, PendingPatients
from slide2vec.cohort.record_events import SlideCompleted
from slide2vec.cohort.recorder import RunRecorder
from slide2vec.cohort.results import Artifact
from slide2vec.cohort.resume import ResumePlan
from slide2vec.errors import OutputError, PatientError, Slide2VecError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PatientWriter"]


class PatientWriter:
    """Embeds and writes patients who are complete. Used from one thread."""

    def __init__(self, cohort: Cohort, recorder: RunRecorder, embedder: Embedder, todo: ResumePlan) -> None:
        self._cohort, self._recorder, self._embedder = cohort, recorder, embedder
        self._execution = cohort.execution
        self._patients = PendingPatients(todo.in_progress())
        #: What sidecars of patients say of each slide.
        self._slides_metadata: dict[str, Mapping[str, Any]] = {}
        self._identities: dict[str, Mapping[str, Any] | None] = {}

    def on_slide_completed(self, completed_slide: SlideCompleted) -> Iterator[Artifact]:
        """A slide is complete; the artifact of its patient, if it was the last of theirs.

        Raises:
            OutputError: a file cannot be written.
        """
        name = completed_slide.slide.sample_id
        if completed_slide.metadata is not None:
            self._slides_metadata[name] = completed_slide.metadata
        self._identities[name] = completed_slide.identity
        patient = self._patients.on_slide_completed(name, completed_slide.embedding, completed_slide.error)
        if patient is None:
            return
        try:
            made = self._embedding(patient)
            written = None if made is None else self._write(patient, made)
        except Slide2VecError as failure:
            if isinstance(failure, OutputError) and self._cohort.is_of_the_run(failure):
                raise
            self._recorder.fail_patient(patient, failure)
            return
        if written is None:
            self._recorder.note_patient(patient, aggregation_status="skipped")
        else:
            yield written

    def _embedding(self, patient: Patient) -> Tensor | None:
        """None for a patient without tissue."""
        if patient.failed and (self._execution.on_bad_slide == "fail" or not patient.embeddings):
            raise PatientError(
                f"patient {patient.patient_id}: {len(patient.failed)} of {len(patient.slides)} slides failed "
                f'({", ".join(patient.failed)}); on_bad_slide="skip" embeds patients from their other slides'
            ) from next(iter(patient.failed.values()))
        if not patient.embeddings:
            return None
        return self._embedder.patient_embedding(patient.in_order())

    def _write(self, patient: Patient, embedding: Tensor) -> Artifact:
        cohort, names = self._cohort, [slide.sample_id for slide in patient.slides]
        artifact = write_patient_embedding(
            cohort.place.features,
            patient.patient_id,
            embedding.to(getattr(torch, self._execution.vector_dtype)),
            num_slides=len(patient.embeddings),
            file_format=self._execution.output_format,
            encoder=cohort.identities["patient"],
            metadata={
                "slides": {
                    name: self._slides_metadata[name] for name in names if name in self._slides_metadata
                },
                "slides_without_embedding": [name for name in names if name not in patient.embeddings],
                "skipped_slides": {name: str(error) for name, error in patient.failed.items()},
            },
            compatibility=cohort.completed.patient_compatibility(
                {name: self._identities[name] for name in names}
            ),
        )
        for name in names:
            self._slides_metadata.pop(name, None)
            del self._identities[name]
        self._recorder.add("patient", patient.patient_id, artifact)
        self._recorder.note_patient(patient, aggregation_status="success", feature_path=artifact.path)
        return artifact
