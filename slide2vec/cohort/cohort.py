"""The books of a run over a cohort: what is to be done, what became of it, and the files it makes.

Every slide's files are published the moment it is complete: coordinates, features, sidecar, in this
order, each whole or not at all. A slide counts as finished when its sidecar says so; the process list
is for people and other tools.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slide2vec.cohort.embedder import Encoder, identities_of
from slide2vec.cohort.finished import Artifact, Finished, Kind
from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.patients import Patient, by_patient, patient_of
from slide2vec.cohort.process_list import ProcessList, read_process_list
from slide2vec.cohort.results import FailedPatient, FailedSlide, RunResult, Stage
from slide2vec.cohort.todo import Kept, Todo, everything, what_is_left
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ArtifactError, ConfigError, OutputError
from slide2vec.files import atomic_path, remove_partial
from slide2vec.progress import RunSummary
from slide2vec.recipes import Level
from slide2vec.slides import Slide
from slide2vec.stream import IN_PLACE, InPlace, SlidePlan, plan_slide
from slide2vec.tiling import Tiling, write_coordinates
from slide2vec.tiling.coordinates import coordinate_paths

__all__ = ["Cohort", "Planned"]

logger = logging.getLogger(__name__)

_FOLDERS = (
    *("", "tiles", "tile_embeddings", "hierarchical_embeddings", "slide_embeddings", "slide_latents"),
    *("patient_embeddings", "preview/mask", "preview/tiling"),
)


@dataclass(frozen=True)
class Planned:
    """What is known of a slide whose coordinates are published; `compatibility` by kind of artifact."""

    tiles: int
    coordinates: tuple[Path | None, Path]
    compatibility: Mapping[Kind, Mapping[str, Any]]


class Cohort:
    """A run into an output directory, which it holds while its context lasts.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: None where slides are only tiled.
        tilings: of slides whose tiles are known, by sample_id.
        settings: text to keep as config.yaml.

    Raises:
        OutputLockedError: another run writes there.
        OutputError: a file cannot be written.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        encoder: Encoder | None = None,
        tilings: Mapping[str, Tiling] | None = None,
        settings: str | None = None,
    ) -> None:
        if execution.output_dir is None:
            raise ConfigError("a run on disk needs ExecutionOptions(output_dir=…)")
        self.slides, self.config, self.execution = slides, config, execution
        self.output_dir = execution.output_dir
        self._encoder, self._tilings, self._settings = encoder, tilings or {}, settings
        self.identities = identities_of(encoder, config, execution)
        #: What is made of each slide; what is made of patients comes on top.
        self.wanted = self._wanted_kinds()
        self.finished = Finished(
            config,
            execution,
            self.identities,
            self._tilings,
            latents=execution.save_latents and encoder is not None and encoder.has_latents,
        )
        self.planned: dict[str, Planned] = {}
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
        self._recomputed: Counter[str] = Counter()
        self._resumed = 0
        self._stack = ExitStack()

    @property
    def level(self) -> Level:
        """Of the model."""
        return self._encoder.level if self._encoder else "tile"

    @property
    def kind(self) -> Kind:
        """What the run makes."""
        return "hierarchical" if "hierarchical" in self.identities else self.level

    @property
    def tiles_kind(self) -> Kind:
        """Of the artifacts that hold embeddings of tiles."""
        return "hierarchical" if self.config.hierarchical else "tile"

    def _wanted_kinds(self) -> tuple[Kind, ...]:
        if self.level == "tile":
            return (self.kind,)
        wanted: list[Kind] = ["tile"] if self.execution.save_tile_embeddings else []
        if self.level == "slide" or self.execution.save_slide_embeddings:
            wanted.append("slide")
        return tuple(wanted)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(output_lock(self.output_dir))
            for folder in _FOLDERS:
                remove_partial(self.output_dir / folder)
            if self._settings is not None:
                with atomic_path(self.output_dir / "config.yaml") as temporary:
                    temporary.write_text(self._settings, encoding="utf-8")
            path = self.output_dir / "process_list.csv"
            self._list = stack.enter_context(ProcessList(path, self._rows(path)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _rows(self, path: Path) -> Iterable[dict[str, Any]]:
        """A row per slide, then those that the process list has of other slides."""
        previous = _previous_rows(path)
        for slide in self.slides:
            row = {
                "sample_id": slide.sample_id,
                "image_path": slide.image_path,
                "mask_path": slide.mask_path,
                "requested_backend": self.config.backend,
                "spacing_at_level_0": slide.spacing_at_level_0,
            }
            if self._encoder:
                row |= {
                    "feature_status": "tbp",
                    "encoder_name": self._encoder.name,
                    "output_variant": self._encoder.variant,
                    "feature_kind": self.kind,
                    "aggregation_status": None if self.level == "tile" else "tbp",
                }
            yield row
            previous.pop(slide.sample_id, None)
        yield from previous.values()

    # what is to be done ------------------------------------------------------------------------

    def todo(self) -> Todo:
        """What is not finished; everything, unless the run resumes another."""
        if self._encoder is None or not self.config.resume:
            self._warn_of_finished()
            return everything(self.slides, self.kind)
        found = what_is_left(self.slides, self.kind, self.wanted, self.finished)
        for kept in found.kept:
            self._keep(kept)
        self._recomputed = found.recomputed
        for reason, count in self._recomputed.items():
            logger.warning("%d slides were finished with another %s: they are embedded anew", count, reason)
        return found

    def _warn_of_finished(self) -> None:
        if self._encoder is None:
            return
        folder = self.output_dir / f"{self.kind}_embeddings"
        names = by_patient(self.slides) if self.kind == "patient" else [s.sample_id for s in self.slides]
        there = sum((folder / f"{name}.meta.json").exists() for name in names)
        if there:
            logger.warning(
                "%d %s are finished in %s and are embedded anew: resume keeps those that agree",
                *(there, "patients" if self.kind == "patient" else "slides", self.output_dir),
            )

    def _keep(self, kept: Kept) -> None:
        name, main = kept.slide.sample_id, kept.artifacts[self.kind]
        self._resumed += 1
        for kind, artifact in kept.artifacts.items():
            self.add(kind, patient_of(kept.slide) if kind == "patient" else name, artifact)
        recorded = main.metadata
        if self.kind == "patient":
            skipped = (recorded.get("skipped_slides") or {}).get(name)
            recorded = (recorded.get("slides") or {}).get(name) or {}
            if skipped is not None:
                self.note(name, feature_status="error", aggregation_status="error", error=skipped)
                return
        self.describe(name, recorded)
        self.tiles_done(name, recorded)
        if self.kind in ("slide", "patient"):
            done = {"feature_path": main.path} if recorded.get("num_tiles") else {}
            self.note(name, aggregation_status="success" if done else "skipped", **done)

    # what becomes of it ------------------------------------------------------------------------

    def plan(self, slide: Slide, stager: InPlace = IN_PLACE) -> SlidePlan:
        """Plan a slide and publish its coordinates. Called in threads.

        Raises:
            SlideError: the slide cannot be tiled.
            OutputError: a file cannot be written.
        """
        given = self._tilings.get(slide.sample_id)
        plan = plan_slide(slide, self.config, self.output_dir, given, stager)
        try:
            self._publish_plan(plan)
        except BaseException:
            plan.source.close()
            raise
        return plan

    def _publish_plan(self, plan: SlidePlan) -> None:
        name, tiles = plan.slide.sample_id, len(plan.tiling)
        identities = self.finished.compatibilities(plan.slide) if self._encoder else {}
        if plan.coordinates_dir is None:
            npz, meta = write_coordinates(self.output_dir / "tiles", plan.tiling.recorded)
        else:
            arrays, meta = coordinate_paths(plan.coordinates_dir, name)
            npz = arrays if tiles else None
        self.planned[name] = Planned(tiles, (npz, meta), identities)
        self.note(
            name,
            backend=plan.source.backend,
            tiling_status="success",
            num_tiles=tiles,
            coordinates_npz_path=npz,
            coordinates_meta_path=meta,
            tiles_tar_path=plan.tiles_tar_path,
            mask_preview_path=plan.mask_preview_path,
            tiling_preview_path=plan.tiling_preview_path,
            error=_remark(tiles, [asdict(bad) for bad in plan.skipped]),
        )

    def tiled(self, plan: SlidePlan) -> None:
        """A slide that is only tiled is complete."""
        name = plan.slide.sample_id
        del self.planned[name]
        if not len(plan.tiling):
            self._empty.add(name)
        if plan.skipped:
            self._skipped[name] = len(plan.skipped)

    def note(self, sample_id: str, **columns: Any) -> None:
        """Set columns of a slide in the process list."""
        self._list.update(sample_id, **columns)

    def describe(self, sample_id: str, recorded: Mapping[str, Any]) -> None:
        """Note what a sidecar says of a slide that was planned by an earlier run."""
        names = ("backend", "coordinates_npz_path", "coordinates_meta_path", "tiles_tar_path")
        self.note(
            sample_id,
            tiling_status="success",
            mask_preview_path=self._preview("mask", sample_id),
            tiling_preview_path=self._preview("tiling", sample_id),
            **{name: recorded.get(name) for name in names},
        )

    def _preview(self, kind: str, sample_id: str) -> Path | None:
        path = self.output_dir / "preview" / kind / f"{sample_id}.jpg"
        return path if path.is_file() else None

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """An artifact is on disk; `name` is its slide's or patient's."""
        self._artifacts[kind][name] = artifact
        if kind == self.tiles_kind and kind == self.kind:
            self.note(name, feature_path=artifact.path)

    def tiles_done(self, sample_id: str, about: Mapping[str, Any]) -> None:
        """The tiles of a slide are embedded; `about` is what sidecars say of them."""
        tiles, skipped = about.get("num_tiles"), about.get("skipped_tiles") or ()
        self.planned.pop(sample_id, None)
        if tiles == 0:
            self._empty.add(sample_id)
        if skipped:
            self._skipped[sample_id] = len(skipped)
        self.note(sample_id, num_tiles=tiles, feature_status="success", error=_remark(tiles or 0, skipped))

    def fail(self, slide: Slide, error: Exception, stage: Stage) -> None:
        """Record a slide's failure.

        Raises:
            OutputError: the failure is the run's: a file cannot be written.
        """
        if isinstance(error, OutputError):
            raise error
        name = slide.sample_id
        self.planned.pop(name, None)
        text = "".join(traceback.format_exception(error))
        _forget_frames(error)
        self._failed[name] = FailedSlide(name, slide.image_path, stage, error)
        if stage == "aggregation":  # after the stream, which tells of its own
            logger.error("%s", error)
        status: dict[str, str] = {}
        if self._encoder and stage != "aggregation":
            status["feature_status"] = "error"
        if self.kind in ("slide", "patient"):
            status["aggregation_status"] = "error"
        self.note(
            name,
            tiling_status="failed" if stage == "tiling" else "success",
            error=str(error) or type(error).__name__,
            traceback=text,
            **status,
        )

    def fail_patient(self, patient: Patient, error: Exception) -> None:
        """Record that a patient cannot be embedded, with those of their slides that have not failed."""
        self._failed_patients[patient.patient_id] = FailedPatient(patient.patient_id, error)
        logger.error("%s", error)
        for slide in patient.slides:
            if slide.sample_id not in patient.failed:
                self.note(slide.sample_id, aggregation_status="error", error=str(error))

    def note_patient(self, patient: Patient, **columns: Any) -> None:
        """Set columns of the slides of a patient that have an embedding, or of all where none has."""
        for name in patient.embeddings or [slide.sample_id for slide in patient.slides]:
            self.note(name, **columns)

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
            resumed=self._resumed,
            recomputed=dict(self._recomputed),
            summary=summary,
        )

    @property
    def complete(self) -> str:
        """How much is on disk, in words."""
        what, total = "slides", len(self.slides)
        if self.kind == "patient":
            what, total = "patients", len(by_patient(self.slides))
        return f"{len(self._artifacts[self.kind])} of {total} {what} are complete"


def _previous_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return {row["sample_id"]: dict(row) for row in read_process_list(path)}
    except ArtifactError as error:
        logger.warning("%s; a new one is begun", error)
        return {}


def _remark(tiles: int, skipped: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of a slide that did not fail."""
    if skipped:
        where = ", ".join(f"({bad['x']}, {bad['y']})" for bad in skipped)
        return f"{len(skipped)} tiles could not be decoded and were left out, at level-0 px {where}"
    return None if tiles else "no tissue: 0 tiles"


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error, which hold pixels, and of what caused it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
