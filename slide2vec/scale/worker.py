"""A worker: one device, one model, and the slides that it is handed, through one stream at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from slide2vec.errors import ConfigError
from slide2vec.progress import ProgressEvent, RunFinished, RunSummary, SlideFailed, activate_progress_reporter
from slide2vec.scale.messages import (
    Begin,
    Begun,
    Broken,
    Command,
    Done,
    Drain,
    Embedded,
    Event,
    Finish,
    Finished,
    Job,
    Load,
    Logged,
    Ready,
    Report,
    Task,
    portable,
)

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.cohort.embedder import Embedder
    from slide2vec.cohort.sink import Sink
    from slide2vec.stream import SlideOutcome
    from slide2vec.stream.identities import SlideIdentity
    from slide2vec.tiling import Tiling

__all__ = ["serve"]

Tell = Callable[[Report], None]


def serve(receive: Callable[[], Command], tell: Tell, store: Callable[[Tensor], Any]) -> None:
    """Do what the coordinator says, until `receive` raises EOFError.

    Args:
        receive: the next command; called from one thread at a time.
        tell: called from several threads.
        store: tile embeddings -> what the coordinator gets them back from.
    """
    try:
        _serve(receive, tell, store)
    except EOFError:
        return
    except Exception as error:
        tell(Broken(portable(error)))


def _serve(receive: Callable[[], Command], tell: Tell, store: Callable[[Tensor], Any]) -> None:
    model: Embedder | None = None
    while True:
        match receive():
            case Load(loader, device):
                model = loader(device=device)
                tell(Ready())
            case Begin(job):
                assert model is not None
                with _logs_told(tell):
                    _Session(model, job, receive, tell, store).run()


class _Session:
    """The slides of one job."""

    def __init__(
        self,
        model: Embedder,
        job: Job,
        receive: Callable[[], Command],
        tell: Tell,
        store: Callable[[Tensor], Any],
    ) -> None:
        from slide2vec.stream import Arrivals

        self._model, self._job, self._tell, self._store = model, job, tell, store
        self._arrivals, self._tilings = Arrivals(), dict[str, "Tiling"]()
        self._identities = dict[str, "SlideIdentity"]()
        self._reporter = _Told(tell)
        self._receive, self._finishing = receive, False

    def run(self) -> None:
        """Stream after stream: each ends where the coordinator has nothing more at the moment."""
        tile_size = self._job.config.requested_tile_size_px
        _check_identity(self._model.identity(self._job.execution, tile_size), self._job.identity)
        commands = threading.Thread(target=self._obey, name="commands", daemon=True)
        commands.start()
        self._tell(Begun())
        with activate_progress_reporter(self._reporter):
            while not self._finishing:
                self._embed()
        commands.join()
        self._tell(Finished(tuple(self._reporter.summaries)))

    def _obey(self) -> None:
        """Take commands while the stream runs."""
        while not self._finishing:
            match self._receive():
                case Task(slide, tiling, identity):
                    if tiling is not None:
                        self._tilings[slide.sample_id] = tiling
                    if identity is not None:
                        self._identities[slide.sample_id] = identity
                    self._arrivals.put(slide)
                case Drain():
                    self._arrivals.end()
                case Finish():
                    self._finishing = True
                    self._arrivals.end()

    def _embed(self) -> None:
        """One stream: embeddings go back, or files are written and what there is to say of them goes back."""
        with self._sink() as sink, closing(self._model.embed_here(sink, self._arrivals)) as outcomes:
            for outcome in outcomes:
                self._tell_of(outcome)

    @contextmanager
    def _sink(self) -> Iterator[Sink]:
        from slide2vec.cohort.cohort import Cohort
        from slide2vec.cohort.disk_sink import DiskSink
        from slide2vec.cohort.events import PostedEntries
        from slide2vec.cohort.sink import MemorySink

        job, execution = self._job, self._job.execution
        if job.place is None:
            aggregate = partial(self._model.aggregated, latents=execution.save_latents)
            yield MemorySink(job.config, execution, aggregate if job.aggregate else None, self._tilings)
            return
        cohort = Cohort(job.config, execution, self._model, self._tilings, job.place, self._identities)
        cohort.entries = PostedEntries(self._tell_entry)
        with DiskSink(cohort, self._model, self._settle, on_done=lambda name: self._tell(Done(name))) as sink:
            yield sink

    def _tell_of(self, outcome: SlideOutcome) -> None:
        import torch

        embedded, features = outcome.embedded, None
        if embedded is not None:
            try:
                features = self._store(embedded.tile_embeddings)
                outcome = replace(outcome, embedded=replace(embedded, tile_embeddings=torch.empty(0)))
            except Exception as error:
                outcome = replace(outcome, embedded=None, tiling=None, error=error)
        if outcome.error is not None:
            outcome = replace(outcome, error=portable(outcome.error))
        self._tell(Embedded(outcome, features))
        self._tell(Done(outcome.slide.sample_id))

    def _tell_entry(self, entry: Any) -> None:
        if entry.what == "fail":
            failed, traceback = entry.values
            entry = replace(entry, values=(replace(failed, error=portable(failed.error)), traceback))
        self._tell(entry)

    def _settle(self, settled: Any) -> tuple[()]:
        if settled.error is not None:
            settled = replace(settled, error=portable(settled.error))
        self._tell(settled)
        return ()


def _check_identity(own: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ConfigError where this worker would give other embeddings than the others."""
    from slide2vec.cohort.identity import difference, encoder_identity

    what = difference(encoder_identity(asked), encoder_identity(own))
    if what is not None:
        raise ConfigError(
            f"a worker would embed with another {what} than the process that it works for: give all of them "
            "the same weights, packages and engines, or say precision= and engine= (engine='torch' is "
            "everywhere)"
        )


class _Told:
    """A reporter that sends events on, and keeps the summaries of streams that did anything."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.summaries: list[RunSummary] = []

    def emit(self, event: ProgressEvent) -> None:
        """See `ProgressReporter`."""
        if isinstance(event, RunFinished):
            if event.summary.slides or event.summary.failed:
                self.summaries.append(event.summary)
            return
        if isinstance(event, SlideFailed):
            event = replace(event, error=portable(event.error))
        self._tell(Event(event))

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def _logs_told(tell: Tell) -> Iterator[None]:
    """Send warnings of the library to the coordinator, which tells each once."""

    class Sent(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(Logged(record.name, record.levelno, record.getMessage()))

    handler, library = Sent(logging.WARNING), logging.getLogger("slide2vec")
    library.addHandler(handler)
    propagated, library.propagate = library.propagate, False
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.propagate = propagated
