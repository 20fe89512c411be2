"""Resume: what earlier runs have finished with these settings, and what is left to do."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from slide2vec.artifacts import PatientEmbeddingArtifact, SlideEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.artifacts.places import Kind
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.identity import CompletedArtifacts
from slide2vec.cohort.pending_patients import by_patient, patient_of
from slide2vec.cohort.recorder import RunRecorder
from slide2vec.cohort.results import Artifact
from slide2vec.files import names_below
from slide2vec.slides import Slide

__all__ = ["Kept", "ResumePlan", "plan_everything", "plan_resume", "resume_run"]

logger = logging.getLogger(__name__)

#: Threads that look at the files of finished slides, on network storage perhaps.
_LOOKERS = 16

#: What can be made use of besides what is wanted.
_USEFUL: Mapping[Kind, tuple[Kind, ...]] = {"slide": ("tile",), "patient": ("tile", "slide")}
#: What was found of each kind: the artifact, or what differs, or None.
_FoundArtifacts: TypeAlias = "Mapping[Kind, Artifact | str | None]"


@dataclass(frozen=True)
class Kept:
    """A slide that is complete as it is, with its artifacts, that of its patient among them."""

    slide: Slide
    artifacts: Mapping[Kind, Artifact]


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """Every slide of a run, by how much of it is left to do.

    Attributes:
        slides: to be embedded from their tiles on.
        tiles: slides whose tile embeddings are there, and what comes after them is not.
        embeddings: slides that are there themselves, of patients who are not.
        kept: what is complete.
        recomputed: what differed -> slides that an earlier run had finished otherwise.
    """

    slides: list[Slide] = field(default_factory=list)
    tiles: list[tuple[Slide, TileEmbeddingArtifact]] = field(default_factory=list)
    embeddings: list[tuple[Slide, SlideEmbeddingArtifact]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    recomputed: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.slides or self.tiles or self.embeddings)

    def in_progress(self) -> list[Slide]:
        """The slides that are not complete."""
        return [*self.slides, *(slide for slide, _ in self.tiles), *(slide for slide, _ in self.embeddings)]


def plan_everything(slides: Sequence[Slide], main: Kind) -> ResumePlan:
    """All slides; those of a patient one after the other, so that patients are complete early."""
    if main != "patient":
        return ResumePlan(slides=list(slides))
    return ResumePlan(slides=[slide for theirs in by_patient(slides).values() for slide in theirs])


def plan_resume(
    slides: Sequence[Slide], main: Kind, wanted: Sequence[Kind], completed: CompletedArtifacts
) -> ResumePlan:
    """Sort slides by what earlier runs have finished of them with the settings of this one.

    Args:
        main: what the run makes.
        wanted: what it writes of each slide.
    """
    kinds = dict.fromkeys((*wanted, *_USEFUL.get(main, ())))

    def look(slide: Slide) -> _FoundArtifacts:
        return completed.find(kinds, slide)

    def patient(name: str, theirs: Sequence[Slide]) -> Artifact | str | None:
        asked = {slide.sample_id: completed.look(slide) for slide in theirs}
        identities = {name: None if found is None else found["slide"] for name, found in asked.items()}
        return completed.find_patient(name, theirs, identities)

    plan = ResumePlan()
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="resume") as pool:
        there = dict(zip((slide.sample_id for slide in slides), pool.map(look, slides), strict=True))
        if main == "patient":
            theirs = by_patient(slides)
            found = list(pool.map(patient, theirs.keys(), theirs.values()))
            for group, made in zip(theirs.values(), found, strict=True):
                _sort_patient(group, there, made, wanted, plan)
        else:
            for slide in slides:
                _sort_slide(slide, there[slide.sample_id], main, wanted, plan)
    return plan


def _sort_slide(
    slide: Slide, there: _FoundArtifacts, main: Kind, wanted: Sequence[Kind], plan: ResumePlan
) -> None:
    artifacts = _artifacts(there)
    if all(kind in artifacts for kind in wanted):
        plan.kept.append(Kept(slide, {kind: artifacts[kind] for kind in wanted}))
    else:
        _resume_slide(slide, there, main, wanted, plan)


def _sort_patient(
    slides: Sequence[Slide],
    there: Mapping[str, _FoundArtifacts],
    patient: Artifact | str | None,
    wanted: Sequence[Kind],
    plan: ResumePlan,
) -> None:
    """A patient is kept with all slides, or embedded again with all."""
    found = {slide.sample_id: _artifacts(there[slide.sample_id]) for slide in slides}
    if isinstance(patient, PatientEmbeddingArtifact):
        without = set(patient.metadata.get("slides_without_embedding") or ())
        if all(name in without or all(kind in found[name] for kind in wanted) for name in found):
            for slide in slides:
                made = {kind: a for kind, a in found[slide.sample_id].items() if kind in wanted}
                plan.kept.append(Kept(slide, {**made, "patient": patient}))
            return
    for slide in slides:
        _resume_slide(slide, {**there[slide.sample_id], "patient": patient}, "patient", wanted, plan)


def _artifacts(there: _FoundArtifacts) -> dict[Kind, Artifact]:
    return {kind: item for kind, item in there.items() if item is not None and not isinstance(item, str)}


def _resume_slide(
    slide: Slide, there: _FoundArtifacts, main: Kind, wanted: Sequence[Kind], plan: ResumePlan
) -> None:
    """Go on with a slide from the furthest that is there of it."""
    tiles, embedding = there.get("tile"), there.get("slide")
    differs = [item for kind in (main, *wanted) if isinstance(item := there.get(kind), str)]
    plan.recomputed.update(differs[:1])
    complete = isinstance(tiles, TileEmbeddingArtifact) or "tile" not in wanted
    if main == "patient" and isinstance(embedding, SlideEmbeddingArtifact) and complete:
        plan.embeddings.append((slide, embedding))
    elif main in ("slide", "patient") and isinstance(tiles, TileEmbeddingArtifact):
        plan.tiles.append((slide, tiles))
    else:
        plan.slides.append(slide)


def resume_run(cohort: Cohort, recorder: RunRecorder) -> ResumePlan:
    """What is left to do; what is finished is recorded. Everything, unless the run resumes another."""
    if not cohort.config.resume:
        _warn_of_finished(cohort, recorder)
        return plan_everything(recorder.slides, cohort.kind)
    found = plan_resume(recorder.slides, cohort.kind, cohort.wanted, cohort.completed)
    for kept in found.kept:
        _keep(kept, cohort, recorder)
    for slide in [kept.slide for kept in found.kept] + [
        slide for slide, _ in (*found.tiles, *found.embeddings)
    ]:
        cohort.files.forget(slide.sample_id)  # their files are not read
    recorder.recomputed = found.recomputed
    for reason, count in found.recomputed.items():
        logger.warning("%d slides were finished with another %s: they are embedded anew", count, reason)
    return found


def _warn_of_finished(cohort: Cohort, recorder: RunRecorder) -> None:
    folder = cohort.place.features / f"{cohort.kind}_embeddings"
    patients = cohort.kind == "patient"
    names = by_patient(recorder.slides) if patients else [slide.sample_id for slide in recorder.slides]
    # One listing: a request per slide would take minutes behind a URL.
    made = set(names_below(folder, ".meta.json"))
    there = sum(name in made for name in names)
    if there:
        what = ("patient" if patients else "slide") + ("s" if there > 1 else "")
        logger.warning(
            "%d %s finished in %s, embedded anew: resume keeps those that agree",
            *(there, what, cohort.place.features),
        )


def _keep(kept: Kept, cohort: Cohort, recorder: RunRecorder) -> None:
    name, main = kept.slide.sample_id, kept.artifacts[cohort.kind]
    recorder.resumed += 1
    for kind, artifact in kept.artifacts.items():
        recorder.add(kind, patient_of(kept.slide) if kind == "patient" else name, artifact)
    recorded = main.metadata
    if cohort.kind == "patient":
        skipped = (recorded.get("skipped_slides") or {}).get(name)
        recorded = (recorded.get("slides") or {}).get(name) or {}
        if skipped is not None:
            recorder.note(name, feature_status="error", aggregation_status="error", error=skipped)
            return
    cohort.describe(name, recorded)
    recorder.tiles_done(name, recorded)
    if cohort.kind in ("slide", "patient"):
        done = {"feature_path": main.path} if recorded.get("num_tiles") else {}
        recorder.note(name, aggregation_status="success" if done else "skipped", **done)
