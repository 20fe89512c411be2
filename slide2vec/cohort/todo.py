"""What is left to do of a run, and what earlier runs have finished of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from slide2vec.artifacts import PatientEmbeddingArtifact, SlideEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.artifacts.places import Kind
from slide2vec.cohort.finished import Finished
from slide2vec.cohort.patients import by_patient
from slide2vec.cohort.results import Artifact
from slide2vec.slides import Slide

__all__ = ["Kept", "Todo", "everything", "what_is_left"]

#: Threads that look at the files of finished slides, on network storage perhaps.
_LOOKERS = 16

#: What can be made use of besides what is wanted.
_USEFUL: Mapping[Kind, tuple[Kind, ...]] = {"slide": ("tile",), "patient": ("tile", "slide")}
#: What was found of each kind: the artifact, or what differs, or None.
_There: TypeAlias = "Mapping[Kind, Artifact | str | None]"


@dataclass(frozen=True)
class Kept:
    """A slide that is complete as it is, with its artifacts, that of its patient among them."""

    slide: Slide
    artifacts: Mapping[Kind, Artifact]


@dataclass(frozen=True, kw_only=True)
class Todo:
    """Every slide of a run, where it is to be taken up.

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


def everything(slides: Sequence[Slide], main: Kind) -> Todo:
    """All slides; those of a patient one after the other, so that patients are complete early."""
    if main != "patient":
        return Todo(slides=list(slides))
    return Todo(slides=[slide for theirs in by_patient(slides).values() for slide in theirs])


def what_is_left(slides: Sequence[Slide], main: Kind, wanted: Sequence[Kind], finished: Finished) -> Todo:
    """Sort slides by what earlier runs have finished of them with the settings of this one.

    Args:
        main: what the run makes.
        wanted: what it writes of each slide.
    """
    kinds = dict.fromkeys((*wanted, *_USEFUL.get(main, ())))

    def look(slide: Slide) -> _There:
        return finished.find(kinds, slide)

    def patient(name: str, theirs: Sequence[Slide]) -> Artifact | str | None:
        asked = {slide.sample_id: finished.look(slide) for slide in theirs}
        identities = {name: None if found is None else found["slide"] for name, found in asked.items()}
        return finished.find_patient(name, theirs, identities)

    todo = Todo()
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="resume") as pool:
        there = dict(zip((slide.sample_id for slide in slides), pool.map(look, slides), strict=True))
        if main == "patient":
            theirs = by_patient(slides)
            found = list(pool.map(patient, theirs.keys(), theirs.values()))
            for group, made in zip(theirs.values(), found, strict=True):
                _sort_patient(group, there, made, wanted, todo)
        else:
            for slide in slides:
                _sort_slide(slide, there[slide.sample_id], main, wanted, todo)
    return todo


def _sort_slide(slide: Slide, there: _There, main: Kind, wanted: Sequence[Kind], todo: Todo) -> None:
    artifacts = _artifacts(there)
    if all(kind in artifacts for kind in wanted):
        todo.kept.append(Kept(slide, {kind: artifacts[kind] for kind in wanted}))
    else:
        _take_up(slide, there, main, wanted, todo)


def _sort_patient(
    slides: Sequence[Slide],
    there: Mapping[str, _There],
    patient: Artifact | str | None,
    wanted: Sequence[Kind],
    todo: Todo,
) -> None:
    """A patient is kept with all slides, or taken up with all."""
    found = {slide.sample_id: _artifacts(there[slide.sample_id]) for slide in slides}
    if isinstance(patient, PatientEmbeddingArtifact):
        without = set(patient.metadata.get("slides_without_embedding") or ())
        if all(name in without or all(kind in found[name] for kind in wanted) for name in found):
            for slide in slides:
                made = {kind: a for kind, a in found[slide.sample_id].items() if kind in wanted}
                todo.kept.append(Kept(slide, {**made, "patient": patient}))
            return
    for slide in slides:
        _take_up(slide, {**there[slide.sample_id], "patient": patient}, "patient", wanted, todo)


def _artifacts(there: _There) -> dict[Kind, Artifact]:
    return {kind: item for kind, item in there.items() if item is not None and not isinstance(item, str)}


def _take_up(slide: Slide, there: _There, main: Kind, wanted: Sequence[Kind], todo: Todo) -> None:
    """Go on with a slide from the furthest that is there of it."""
    tiles, embedding = there.get("tile"), there.get("slide")
    differs = [item for kind in (main, *wanted) if isinstance(item := there.get(kind), str)]
    todo.recomputed.update(differs[:1])
    complete = isinstance(tiles, TileEmbeddingArtifact) or "tile" not in wanted
    if main == "patient" and isinstance(embedding, SlideEmbeddingArtifact) and complete:
        todo.embeddings.append((slide, embedding))
    elif main in ("slide", "patient") and isinstance(tiles, TileEmbeddingArtifact):
        todo.tiles.append((slide, tiles))
    else:
        todo.slides.append(slide)
