"""A worker: one device, one model, and the slides that it is given, one stream at a time."""

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
    Broken,
    Command,
    Done,
    Embedded,
    EndOfJob,
    Flush,
    Job,
    JobFinished,
    JobStarted,
    Load,
    Logged,
    ProgressMessage,
    Ready,
    Report,
    StartJob,
    Taken,
    Task,
    portable,
)

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.cohort.embedder import Embedder
    from slide2vec.cohort.sink import Sink
    from slide2vec.stream import SlideOutcome
    from slide2vec.stream.slide_identity import SlideIdentity
    from slide2vec.tiling import Tiling

__all__ = ["serve"]

SendReport = Callable[[Report], None]


def serve(receive: Callable[[], Command], send_report: SendReport, store: Callable[[Tensor], Any]) -> None:
    """Execute the coordinator's commands, until `receive` raises EOFError.

    Args:
        receive: the next command; called from one thread at a time.
        send_report: called from several threads.
        store: tile embeddings -> what the coordinator gets them back from.
    """
    try:
        _serve(receive, send_report, store)
    except EOFError:
        return
    except Exception as error:
        send_report(Broken(portable(error)))


def _serve(receive: Callable[[], Command], send_report: SendReport, store: Callable[[Tensor], Any]) -> None:
    model: Embedder | None = None
    place = ""
    while True:
        match receive():
            case Load(loader, device):
                model, place = loader(device=device), str(device)
                send_report(Ready())
            case StartJob(job):
                assert model is not None
                job = replace(job, config=job.config.on_device(place))
                with _forward_logs(send_report):
                    _Session(model, job, receive, send_report, store).run()


class _Session:
    """The slides of one job."""

    def __init__(
        self,
        model: Embedder,
        job: Job,
        receive: Callable[[], Command],
        send_report: SendReport,
        store: Callable[[Tensor], Any],
    ) -> None:
        from slide2vec.stream import SlideQueue

        self._model, self._job, self._send_report, self._store = model, job, send_report, store
        self._arrivals, self._tilings = SlideQueue(), dict[str, "Tiling"]()
        self._identities = dict[str, "SlideIdentity"]()
        self._reporter = EventForwarder(send_report)
        self._receive, self._finishing = receive, False

    def run(self) -> None:
        """Stream after stream: each ends where the coordinator has nothing more at the moment."""
        tile_size = self._job.config.requested_tile_size_px
        _check_identity(self._model.identity(self._job.execution, tile_size), self._job.identity)
        commands = threading.Thread(target=self._obey, name="commands", daemon=True)
        commands.start()
        self._send_report(JobStarted())
        with activate_progress_reporter(self._reporter):
            while not self._finishing:
                self._embed()
        commands.join()
        self._send_report(JobFinished(tuple(self._reporter.summaries)))

    def _obey(self) -> None:
        """Take commands while the stream runs."""
        while not self._finishing:
            match self._receive():
                case Task(slide, tiling, identity):
                    self._send_report(Taken(slide.sample_id))
                    if tiling is not None:
                        self._tilings[slide.sample_id] = tiling
                    if identity is not None:
                        self._identities[slide.sample_id] = identity
                    self._arrivals.put(slide)
                case Flush():
                    self._arrivals.end()
                case EndOfJob():
                    self._finishing = True
                    self._arrivals.end()

    def _embed(self) -> None:
        """One stream: embeddings go back, or files are written and what there is to say of them goes back."""
        with self._sink() as sink, closing(self._model.embed_here(sink, self._arrivals)) as outcomes:
            for outcome in outcomes:
                self._report_outcome(outcome)

    @contextmanager
    def _sink(self) -> Iterator[Sink]:
        from slide2vec.cohort.context import Cohort
        from slide2vec.cohort.disk_sink import DiskSink
        from slide2vec.cohort.record_events import ForwardingRecorder
        from slide2vec.cohort.sink import MemorySink

        job, execution = self._job, self._job.execution
        if job.place is None:
            aggregate = partial(self._model.aggregated, latents=execution.save_latents)
            yield MemorySink(job.config, execution, aggregate if job.aggregate else None, self._tilings)
            return
        cohort = Cohort(job.config, execution, self._model, self._tilings, job.place, self._identities)
        cohort.recorder = ForwardingRecorder(self._report_record)
        with DiskSink(
            cohort, self._model, self._on_slide_completed, on_done=lambda name: self._send_report(Done(name))
        ) as sink:
            yield sink

    def _report_outcome(self, outcome: SlideOutcome) -> None:
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
        self._send_report(Embedded(outcome, features))
        self._send_report(Done(outcome.slide.sample_id))

    def _report_record(self, entry: Any) -> None:
        if entry.what == "fail":
            failed, traceback = entry.values
            entry = replace(entry, values=(replace(failed, error=portable(failed.error)), traceback))
        self._send_report(entry)

    def _on_slide_completed(self, completed_slide: Any) -> tuple[()]:
        if completed_slide.error is not None:
            completed_slide = replace(completed_slide, error=portable(completed_slide.error))
        self._send_report(completed_slide)
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


class EventForwarder:
    """A reporter that sends events on, and keeps the summaries of streams that did anything."""

    def __init__(self, send_report: SendReport) -> None:
        self._send_report = send_report
        self.summaries: list[RunSummary] = []

    def emit(self, event: ProgressEvent) -> None:
        """See `ProgressReporter`."""
        if isinstance(event, RunFinished):
            if event.summary.slides or event.summary.failed:
                self.summaries.append(event.summary)
            return
        if isinstance(event, SlideFailed):
            event = replace(event, error=portable(event.error))
        self._send_report(ProgressMessage(event))

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def _forward_logs(send_report: SendReport) -> Iterator[None]:
    """Send warnings of the library to the coordinator, which logs each once."""

    class Sent(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send_report(Logged(record.name, record.levelno, record.getMessage()))

    handler, library = Sent(logging.WARNING), logging.getLogger("slide2vec")
    library.addHandler(handler)
    propagated, library.propagate = library.propagate, False
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.propagate = propagated
