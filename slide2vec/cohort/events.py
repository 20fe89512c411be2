"""What is told of single slides on their way onto disk, from another process perhaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from slide2vec.artifacts.places import Kind
from slide2vec.cohort.results import Artifact, FailedSlide
from slide2vec.slides import Slide

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entries", "Entry", "PostedEntries", "Settle", "Settled", "settled_alone"]


class Entries(Protocol):
    """What is entered of single slides, by whoever embeds them."""

    def note(self, sample_id: str, **columns: Any) -> None:
        """Set columns of a slide in the process list."""
        ...

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """An artifact is on disk; `name` is its slide's or patient's."""
        ...

    def tiles_done(self, sample_id: str, about: Mapping[str, Any]) -> None:
        """The tiles of a slide are embedded, or only found; `about` is what sidecars say of them."""
        ...

    def fail(self, failed: FailedSlide, traceback: str) -> None:
        """A slide has failed."""
        ...


@dataclass(frozen=True)
class Entry:
    """An entry on its way to the books, from another process perhaps."""

    what: Literal["note", "add", "tiles_done", "fail"]
    values: tuple[Any, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def enter(self, entries: Entries) -> None:
        """Make it."""
        getattr(entries, self.what)(*self.values, **self.columns)


class PostedEntries:
    """See `Entries`: hands them over to be sent to the books."""

    def __init__(self, post: Callable[[Entry], None]) -> None:
        self._post = post

    def note(self, sample_id: str, **columns: Any) -> None:
        """See `Entries`."""
        self._post(Entry("note", (sample_id,), columns))

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """See `Entries`."""
        self._post(Entry("add", (kind, name, artifact)))

    def tiles_done(self, sample_id: str, about: Mapping[str, Any]) -> None:
        """See `Entries`."""
        self._post(Entry("tiles_done", (sample_id, about)))

    def fail(self, failed: FailedSlide, traceback: str) -> None:
        """See `Entries`."""
        self._post(Entry("fail", (failed, traceback)))


@dataclass(frozen=True)
class Settled:
    """A slide that is through, for its patient.

    Attributes:
        embedding: (D,) float32; None without tissue, or where the slide failed.
        about: what sidecars of patients say of it.
        identity: of its embedding; None where its files could not be read.
    """

    slide: Slide
    embedding: Tensor | None = None
    error: Exception | None = None
    about: Mapping[str, Any] | None = None
    identity: Mapping[str, Any] | None = None


#: What comes after a slide: artifacts of its patient.
Settle: TypeAlias = Callable[[Settled], Iterable[Artifact]]


def settled_alone(slide: Settled) -> Iterable[Artifact]:
    """Nothing comes after a slide that belongs to no patient."""
    return ()
