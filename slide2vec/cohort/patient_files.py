"""Files of patients: each is written with the last of their slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from slide2vec.artifacts import write_patient_embedding
from slide2vec.cohort.books import Books
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.events import Settled
from slide2vec.cohort.patients import Patient, Patients
from slide2vec.cohort.results import Artifact
from slide2vec.cohort.todo import Todo
from slide2vec.errors import OutputError, PatientError, Slide2VecError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PatientPublisher"]


class PatientPublisher:
    """Embeds and writes patients who are complete. Used from one thread."""

    def __init__(self, cohort: Cohort, books: Books, embedder: Embedder, todo: Todo) -> None:
        self._cohort, self._books, self._embedder = cohort, books, embedder
        self._execution = cohort.execution
        self._patients = Patients(todo.in_progress())
        #: What sidecars of patients say of each slide.
        self._about: dict[str, Mapping[str, Any]] = {}
        self._identities: dict[str, Mapping[str, Any] | None] = {}

    def settle(self, settled: Settled) -> Iterator[Artifact]:
        """A slide is through; the artifact of its patient, if it was the last of theirs.

        Raises:
            OutputError: a file cannot be written.
        """
        name = settled.slide.sample_id
        if settled.about is not None:
            self._about[name] = settled.about
        self._identities[name] = settled.identity
        patient = self._patients.settle(name, settled.embedding, settled.error)
        if patient is None:
            return
        try:
            made = self._embedding(patient)
            written = None if made is None else self._write(patient, made)
        except Slide2VecError as failure:
            if isinstance(failure, OutputError) and self._cohort.is_of_the_run(failure):
                raise
            self._books.fail_patient(patient, failure)
            return
        if written is None:
            self._books.note_patient(patient, aggregation_status="skipped")
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
                "slides": {name: self._about[name] for name in names if name in self._about},
                "slides_without_embedding": [name for name in names if name not in patient.embeddings],
                "skipped_slides": {name: str(error) for name, error in patient.failed.items()},
            },
            compatibility=cohort.finished.patient_compatibility(
                {name: self._identities[name] for name in names}
            ),
        )
        for name in names:
            self._about.pop(name, None)
            del self._identities[name]
        self._books.add("patient", patient.patient_id, artifact)
        self._books.note_patient(patient, aggregation_status="success", feature_path=artifact.path)
        return artifact
