"""Where a run takes up what an earlier one has left."""

from __future__ import annotations

import logging

from slide2vec.cohort.books import Books
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.patients import by_patient, patient_of
from slide2vec.cohort.todo import Kept, Todo, everything, what_is_left
from slide2vec.files import entries

__all__ = ["take_up"]

logger = logging.getLogger(__name__)


def take_up(cohort: Cohort, books: Books) -> Todo:
    """What is not finished, and what is, entered in the books; everything, unless the run resumes another."""
    if not cohort.config.resume:
        _warn_of_finished(cohort, books)
        return everything(books.slides, cohort.kind)
    found = what_is_left(books.slides, cohort.kind, cohort.wanted, cohort.finished)
    for kept in found.kept:
        _keep(kept, cohort, books)
    for slide in [kept.slide for kept in found.kept] + [
        slide for slide, _ in (*found.tiles, *found.embeddings)
    ]:
        cohort.files.forget(slide.sample_id)  # their files are not read
    books.recomputed = found.recomputed
    for reason, count in found.recomputed.items():
        logger.warning("%d slides were finished with another %s: they are embedded anew", count, reason)
    return found


def _warn_of_finished(cohort: Cohort, books: Books) -> None:
    folder = cohort.place.features / f"{cohort.kind}_embeddings"
    patients = cohort.kind == "patient"
    names = by_patient(books.slides) if patients else [slide.sample_id for slide in books.slides]
    # One listing: a request per slide would take minutes behind a URL.
    made = {path.name for path in entries(folder)}
    there = sum(f"{name}.meta.json" in made for name in names)
    if there:
        logger.warning(
            "%d %s are finished in %s and are embedded anew: resume keeps those that agree",
            *(there, "patients" if patients else "slides", cohort.place.features),
        )


def _keep(kept: Kept, cohort: Cohort, books: Books) -> None:
    name, main = kept.slide.sample_id, kept.artifacts[cohort.kind]
    books.resumed += 1
    for kind, artifact in kept.artifacts.items():
        books.add(kind, patient_of(kept.slide) if kind == "patient" else name, artifact)
    recorded = main.metadata
    if cohort.kind == "patient":
        skipped = (recorded.get("skipped_slides") or {}).get(name)
        recorded = (recorded.get("slides") or {}).get(name) or {}
        if skipped is not None:
            books.note(name, feature_status="error", aggregation_status="error", error=skipped)
            return
    cohort.describe(name, recorded)
    books.tiles_done(name, recorded)
    if cohort.kind in ("slide", "patient"):
        done = {"feature_path": main.path} if recorded.get("num_tiles") else {}
        books.note(name, aggregation_status="success" if done else "skipped", **done)
