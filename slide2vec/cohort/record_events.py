"""What becomes of single slides on their way onto disk, as calls and as values for another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from slide2vec.artifacts.places import Kind
from slide2vec.cohort.results import Artifact, FailedSlide
from slide2vec.slides import Slide

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ForwardingRecorder",
    "OnSlideCompleted",
    "RecordEvent",
    "Recorder",
    "SlideCompleted",
    "without_patient",
]


class Recorder(Protocol):
    """Takes note of what becomes of single slides, from whoever embeds them."""

    def note(self, sample_id: str, **columns: Any) -> None:
        """Set columns of a slide in the process list."""
        ...

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """An artifact is on disk; `name` is its slide's or patient's."""
        ...

    def tiles_done(self, sample_id: str, metadata: Mapping[str, Any]) -> None:
        """The tiles of a slide are embedded, or only found; `metadata` is what their sidecars say."""
        ...

    def fail(self, failed: FailedSlide, traceback: str) -> None:
        """A slide has failed."""
        ...


@dataclass(frozen=True)
class RecordEvent:
    """A call of a `Recorder` as a value, to be sent to the run's own recorder, from another process
    perhaps."""

    what: Literal["note", "add", "tiles_done", "fail"]
    values: tuple[Any, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, recorder: Recorder) -> None:
        """Make the call."""
        getattr(recorder, self.what)(*self.values, **self.columns)


class ForwardingRecorder:
    """A recorder that sends every call to the run's own. See `Recorder`."""

    def __init__(self, post: Callable[[RecordEvent], None]) -> None:
        self._post = post

    def note(self, sample_id: str, **columns: Any) -> None:
        """See `Recorder`."""
        self._post(RecordEvent("note", (sample_id,), columns))

    def add(self, kind: Kind, name: str, artifact: Artifact) -> None:
        """See `Recorder`."""
        self._post(RecordEvent("add", (kind, name, artifact)))

    def tiles_done(self, sample_id: str, metadata: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        self._post(RecordEvent("tiles_done", (sample_id, metadata)))

    def fail(self, failed: FailedSlide, traceback: str) -> None:
        """See `Recorder`."""
        self._post(RecordEvent("fail", (failed, traceback)))


@dataclass(frozen=True)
class SlideCompleted:
    """A slide that is complete, for its patient.

    Attributes:
        embedding: (D,) float32; None without tissue, or where the slide failed.
        metadata: of the slide, for the sidecar of its patient.
        identity: of its embedding; None where its files could not be read.
    """

    slide: Slide
    embedding: Tensor | None = None
    error: Exception | None = None
    metadata: Mapping[str, Any] | None = None
    identity: Mapping[str, Any] | None = None


#: Called with each completed slide; gives the artifacts of its patient, if it was the last of theirs.
OnSlideCompleted: TypeAlias = Callable[[SlideCompleted], Iterable[Artifact]]


def without_patient(slide: SlideCompleted) -> Iterable[Artifact]:
    """For models that embed no patients: nothing is written after a slide."""
    return ()
