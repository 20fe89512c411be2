"""Messages between the coordinator and its workers. Plain values, so that they can be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from slide2vec.errors import Slide2VecError

if TYPE_CHECKING:
    from slide2vec.artifacts.places import Place
    from slide2vec.cohort.kept_tiles import TileScratch
    from slide2vec.cohort.record_events import RecordEvent, SlideCompleted
    from slide2vec.config import ExecutionOptions, PreprocessingConfig
    from slide2vec.progress import ProgressEvent, RunSummary
    from slide2vec.slides import Slide
    from slide2vec.stream import SlideOutcome
    from slide2vec.stream.slide_identity import SlideIdentity
    from slide2vec.tiling import Tiling

__all__ = [
    "ALONE",
    "Broken",
    "Command",
    "Done",
    "Embedded",
    "EncoderBroken",
    "EndOfJob",
    "Flush",
    "Job",
    "JobFinished",
    "JobPart",
    "JobStarted",
    "Known",
    "Load",
    "Logged",
    "Lost",
    "ProgressMessage",
    "Ready",
    "Recorded",
    "Report",
    "StartJob",
    "Taken",
    "Task",
    "portable",
]


#: Name of an encoder that is the only one of a job.
ALONE = ""

# to a worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Load the model, or several by name: `loader(device=…)`."""

    loader: Callable[..., Any]
    device: str | None


@dataclass(frozen=True)
class JobPart:
    """What one encoder of a job does; the same for all slides of a call.

    Attributes:
        config: resolved for the model.
        aggregate: slides get their slide embedding, where the model has one.
        identity: of the model, for `execution`: a worker whose own differs is refused.
        place: where artifacts are written; None: embeddings come back.
    """

    config: PreprocessingConfig
    execution: ExecutionOptions
    aggregate: bool
    identity: Mapping[str, Any]
    place: Place | None = None


@dataclass(frozen=True)
class Job:
    """What each encoder does, by name. Several embed slides side by side, which are read once for them.

    Attributes:
        scratch: where decoded tiles wait for later jobs, or have waited for this one.
    """

    parts: Mapping[str, JobPart]
    scratch: TileScratch | None = None


@dataclass(frozen=True)
class StartJob:
    """Slides of this job follow."""

    job: Job


@dataclass(frozen=True)
class Known:
    """What an encoder knows of a slide: its tiles, and what its files are."""

    tiling: Tiling | None = None
    identity: SlideIdentity | None = None


@dataclass(frozen=True)
class Task:
    """A slide to embed, named by its sample_id, with the encoders that do, and what each knows of it."""

    slide: Slide
    known: Mapping[str, Known] = field(default_factory=lambda: {ALONE: Known()})

    @property
    def name(self) -> str:
        return self.slide.sample_id

    def without(self, encoder: str) -> Task:
        """What is left of it when an encoder is done."""
        return replace(self, known={name: each for name, each in self.known.items() if name != encoder})


@dataclass(frozen=True)
class Flush:
    """No slide comes before those that are there are done: encode the partial batch."""


@dataclass(frozen=True)
class EndOfJob:
    """The job has no more slides."""


Command: TypeAlias = Load | StartJob | Task | Flush | EndOfJob


# from a worker -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True)
class JobStarted:
    """The job's slides can come."""


@dataclass(frozen=True)
class Taken:
    """A task has come to the worker: if that dies from now on, the task may be why."""

    name: str


@dataclass(frozen=True)
class ProgressMessage:
    """Something for the progress reporter."""

    event: ProgressEvent
    encoder: str = ALONE


@dataclass(frozen=True)
class Recorded:
    """Something for the recorder of a run on disk."""

    entry: RecordEvent | SlideCompleted
    encoder: str = ALONE


@dataclass(frozen=True)
class Embedded:
    """A slide is embedded, in memory; `features`: its tile embeddings as the pool transports them."""

    outcome: SlideOutcome
    features: Any
    encoder: str = ALONE


@dataclass(frozen=True)
class Done:
    """A slide is complete or has failed with an encoder, and everything about it has been reported."""

    name: str
    encoder: str = ALONE


@dataclass(frozen=True)
class EncoderBroken:
    """One of several encoders has broken off, and not done slides that the worker had for it."""

    encoder: str
    error: Exception


@dataclass(frozen=True)
class JobFinished:
    """The job is finished; encoder and summary of each stream that had anything to do."""

    summaries: tuple[tuple[str, RunSummary], ...]


@dataclass(frozen=True)
class Logged:
    """A line of the library's log."""

    name: str
    level: int
    text: str


@dataclass(frozen=True)
class Broken:
    """The worker cannot go on, and ends."""

    error: Exception


@dataclass(frozen=True)
class Lost:
    """From the pool itself: a worker has ended, and why."""

    reason: str


Report: TypeAlias = (
    "Ready | JobStarted | Taken | ProgressMessage | Recorded | Embedded | Done | EncoderBroken "
    "| JobFinished | Logged | Broken | Lost"
)


def portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return Slide2VecError(f"{type(error).__name__}: {error}")
