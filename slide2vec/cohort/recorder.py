"""Records a run: its process list, the artifacts that were written, and what failed. There is one per run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from slide2vec.artifacts.places import Kind
from slide2vec.cohort.pending_patients import Patient, by_patient, patient_of
from slide2vec.cohort.process_list import Key, ProcessList, Row, key_of, read_process_list
from slide2vec.cohort.results import Artifact, FailedPatient, FailedSlide, RunResult
from slide2vec.cohort.shard_lists import list_path, merged_process_list
from slide2vec.errors import ArtifactError
from slide2vec.labels import split_class_name
from slide2vec.progress import RunSummary
from slide2vec.recipes import Level
from slide2vec.slides import Slide

__all__ = ["NO_TISSUE", "RunRecorder", "first_rows", "remark"]

logger = logging.getLogger(__name__)

NO_TISSUE = "no tissue: 0 tiles"


class RunRecorder:
    """Keeps the record of a run: of its slides (see `Recorder`), of patients, and of the whole.

    Args:
        slides: of the run; results are in their order.
        table: the process list.
        encoder: its name there; "" where slides are only tiled.
        level: of the model; None where slides are only tiled.
        kind: what the run makes.
    """

    def __init__(
        self, slides: Sequence[Slide], table: ProcessList, encoder: str, level: Level | None, kind: Kind
    ) -> None:
        self.encoder = encoder
        self.slides, self.kind = slides, kind
        self.resumed = 0
        self.recomputed: Counter[str] = Counter()
        self._list, self._level = table, level
        self._artifacts: dict[Kind, dict[str, Artifact]] = {
            "tile": {},
            "hierarchical": {},
            "slide": {},
            "patient": {},
        }
        self._failed: dict[str, FailedSlide] = {}
        self._failed_patients: dict[str, FailedPatient] = {}
        self._empty: set[str] = set()
        self._skipped: dict[str, int] = {}
        self._remarks: dict[str, tuple[str, ...]] = {}

    # slides -------------------------------------------------------------------------

    def note(self, sample_id: str, **columns: Any) -> None:
        """See `Recorder`."""
        self._list.update(sample_id, self.encoder, **columns)

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """See `Recorder`."""
        self._artifacts[kind][name] = artifact
        if kind == self.kind and kind in ("tile", "hierarchical"):
            self.note(name, feature_path=artifact.path)

    def tiles_done(self, sample_id: str, metadata: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        tiles, skipped = metadata.get("num_tiles"), metadata.get("skipped_tiles") or ()
        remarks = metadata.get("remarks") or ()
        if tiles == 0:
            self._empty.add(sample_id)
        if skipped:
            self._skipped[sample_id] = len(skipped)
        if remarks:
            self._remarks[sample_id] = tuple(remarks)
        status = {} if self._level is None else {"feature_status": "success"}
        self.note(sample_id, num_tiles=tiles, error=remark(tiles or 0, skipped, remarks), **status)

    def fail(self, failed: FailedSlide, traceback: str) -> None:
        """See `Recorder`."""
        name = failed.sample_id
        self._failed[name] = failed
        if failed.stage == "aggregation":  # after the stream, which reports its own
            logger.error("%s", failed.error)
        status: dict[str, str] = {}
        if self._level is not None and failed.stage != "aggregation":
            status["feature_status"] = "error"
        if self.kind in ("slide", "patient"):
            status["aggregation_status"] = "error"
        self.note(
            name,
            tiling_status="failed" if failed.stage == "tiling" else "success",
            error=str(failed.error) or type(failed.error).__name__,
            traceback=traceback,
            **status,
        )

    # patients -----------------------------------------------------------------------

    def fail_patient(self, patient: Patient, error: Exception) -> None:
        """A patient cannot be embedded; recorded with those of their slides that have not failed."""
        self._failed_patients[patient.patient_id] = FailedPatient(patient.patient_id, error)
        logger.error("%s", error)
        for slide in patient.slides:
            if slide.sample_id not in patient.failed:
                self.note(slide.sample_id, aggregation_status="error", error=str(error))

    def note_patient(self, patient: Patient, **columns: Any) -> None:
        """Set columns of the slides of a patient that have an embedding, or of all where none has."""
        for name in patient.embeddings or [slide.sample_id for slide in patient.slides]:
            self.note(name, **columns)

    def has(self, slide: Slide) -> bool:
        """Whether it is known what became of a slide: what the run makes of it is there, or it failed."""
        made = patient_of(slide) if self.kind == "patient" else slide.sample_id
        return slide.sample_id in {*self._failed, *self._empty} or made in self._artifacts[self.kind]

    def made(self, kind: Kind) -> Mapping[str, Artifact]:
        """The artifacts of a kind that are there, by sample_id or patient_id."""
        return self._artifacts[kind]

    # the whole run -----------------------------------------------------------------------------

    def result(self, summary: RunSummary | None) -> RunResult:
        """What the run gave, in the order of its slides."""
        names = [slide.sample_id for slide in self.slides]
        patients = list(by_patient(self.slides)) if self.kind == "patient" else []
        made: dict[Kind, list[Any]] = {
            kind: [found[name] for name in (patients if kind == "patient" else names) if name in found]
            for kind, found in self._artifacts.items()
        }
        return RunResult(
            tile_artifacts=made["tile"],
            hierarchical_artifacts=made["hierarchical"],
            slide_artifacts=made["slide"],
            patient_artifacts=made["patient"],
            process_list_path=self._list.path,
            failed=tuple(self._failed[name] for name in names if name in self._failed),
            failed_patients=tuple(self._failed_patients[p] for p in patients if p in self._failed_patients),
            without_tissue=tuple(name for name in names if name in self._empty),
            skipped_tiles={name: self._skipped[name] for name in names if name in self._skipped},
            remarks={name: self._remarks[name] for name in names if name in self._remarks},
            resumed=self.resumed,
            recomputed=dict(self.recomputed),
            summary=summary,
        )

    @property
    def complete(self) -> str:
        """How much is on disk, in words."""
        what, total = "slides", len(self.slides)
        if self.kind == "patient":
            what, total = "patients", len(by_patient(self.slides))
        return f"{len(self._artifacts[self.kind])} of {total} {what} are complete"


def first_rows(
    output_dir: Path,
    shard: str | None,
    runs: Iterable[tuple[Iterable[Slide], Mapping[str, Any]]],
) -> Iterable[Mapping[str, Any]]:
    """A row per slide and encoder, then those that earlier process lists have of other slides and encoders.

    Args:
        shard: only of its own list, and only of other encoders.
        runs: of each encoder, its slides, and the columns that are the same for all of them.
    """
    named = [(slides, common, str(common.get("encoder_name") or "")) for slides, common in runs]
    previous = _previous_rows(output_dir, shard, {encoder for _, _, encoder in named})
    for slides, common, encoder in named:
        for slide in slides:
            previous.pop((slide.sample_id, encoder), None)
            previous.pop((slide.sample_id, ""), None)  # that it was tiled is in the new row, too
            yield {
                "sample_id": split_class_name(slide.sample_id)[1],
                **({} if slide.annotation is None else {"annotation": slide.annotation}),
                "image_path": slide.image_path,
                "mask_path": slide.mask_path,
                "spacing_at_level_0": slide.spacing_at_level_0,
                **common,
            }
    yield from previous.values()


def _previous_rows(output_dir: Path, shard: str | None, encoders: Set[str]) -> dict[Key, Row]:
    try:
        if shard is None:
            return dict(merged_process_list(output_dir).rows)
        path = list_path(output_dir, shard)
        rows = read_process_list(path) if path.exists() else []
        return {key_of(row): row for row in rows if key_of(row)[1] not in encoders | {""}}
    except ArtifactError as error:
        logger.warning("%s; a new one is begun", error)
        return {}


def remark(tiles: int, skipped: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> str | None:
    """What to say of a slide that did not fail.

    Args:
        skipped: tiles left out, with their x and y.
        remarks: what is implausible about its tissue and tiles.
    """
    sentences = "; ".join(remarks)
    if skipped:
        where = ", ".join(f"({bad['x']}, {bad['y']})" for bad in skipped)
        lost = f"{len(skipped)} tiles could not be decoded and were left out, at level-0 px {where}"
        return f"{lost}; {sentences}" if sentences else lost
    if not tiles:
        return f"{NO_TISSUE}: {sentences}" if sentences else NO_TISSUE
    return sentences or None
