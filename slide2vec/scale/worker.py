"""A worker: one device, one model or several side by side, and the slides that it is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from slide2vec.errors import ConfigError
from slide2vec.progress import ProgressEvent, RunFinished, RunSummary, SlideFailed, activate_progress_reporter
from slide2vec.progress.together import Cancelled
from slide2vec.scale.messages import (
    ALONE,
    Broken,
    Command,
    Done,
    Embedded,
    EncoderBroken,
    EndOfJob,
    Flush,
    Job,
    JobFinished,
    JobStarted,
    Load,
    Logged,
    ProgressMessage,
    Ready,
    Recorded,
    Report,
    StartJob,
    Taken,
    Task,
    portable,
)

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.cohort.embedder import Embedder
    from slide2vec.cohort.kept_tiles import TileScratch
    from slide2vec.cohort.sink import Sink
    from slide2vec.slides import Slide
    from slide2vec.stream import SlideOutcome
    from slide2vec.stream.shared_slides import Share
    from slide2vec.stream.slide_identity import SlideIdentity
    from slide2vec.stream.staging import InPlace
    from slide2vec.tiling import Tiling

__all__ = ["load_several", "serve"]

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


def load_several(
    loaders: Mapping[str, Callable[..., Embedder]], *, device: str | None
) -> dict[str, Embedder]:
    """Several models, by name, on one device."""
    return {name: loader(device=device) for name, loader in loaders.items()}


def _serve(receive: Callable[[], Command], send_report: SendReport, store: Callable[[Tensor], Any]) -> None:
    models: Mapping[str, Embedder] = {}
    place: str | None = None
    while True:
        match receive():
            case Load(loader, device):
                loaded, place = loader(device=device), device
                models = loaded if isinstance(loaded, Mapping) else {ALONE: loaded}
                send_report(Ready())
            case StartJob(job):
                job = _on_device(job, place)
                for name in models.keys() - job.parts.keys():  # another group's turn
                    models[name].release()
                with _forward_logs(send_report):
                    _Session(
                        {name: models[name] for name in job.parts}, job, receive, send_report, store
                    ).run()


def _on_device(job: Job, device: str | None) -> Job:
    """With networks that find tissue on the device of the encoders."""
    if device is None:
        return job
    parts = {name: replace(p, config=p.config.on_device(device)) for name, p in job.parts.items()}
    return replace(job, parts=parts)


class _Round:
    """Slides for one stream of each encoder, side by side where there are several: up to a flush.

    Attributes:
        broken: what has broken off encoders.
    """

    def __init__(
        self, encoders: Collection[str], stager: InPlace, readers: int | None, scratch: TileScratch | None
    ) -> None:
        from slide2vec.stream import SlideQueue
        from slide2vec.stream.shared_slides import SharedSlides

        self.queues = {name: SlideQueue() for name in encoders}
        self.left: dict[str, set[str]] = {name: set() for name in encoders}
        self.broken: dict[str, Exception] = {}
        over = {} if scratch is None else {"over": scratch.over}
        self._shared = SharedSlides(encoders, stager, readers=readers, **over)
        self.shares = {name: self._shared.share(name) for name in encoders}
        self._is_cancelled = False

    def put(self, slide: Slide, encoders: Collection[str]) -> None:
        """One more slide, for these encoders."""
        self._shared.expect(slide, encoders)
        for name in encoders:
            self.left[name].add(slide.sample_id)
            self.queues[name].put(slide)

    def end(self) -> None:
        """No more slides come."""
        self._shared.end()
        for each in self.queues.values():
            each.end()

    def cancel(self) -> None:
        """Every stream ends when it next reports something, or waits for a slide."""
        self._is_cancelled = True
        self.end()

    def check(self) -> None:
        """Raises Cancelled."""
        if self._is_cancelled:
            raise Cancelled


class _Session:
    """The slides of one job."""

    def __init__(
        self,
        models: Mapping[str, Embedder],
        job: Job,
        receive: Callable[[], Command],
        send_report: SendReport,
        store: Callable[[Tensor], Any],
    ) -> None:
        self._models, self._job, self._send_report, self._store = models, job, send_report, store
        self._tilings: dict[str, dict[str, Tiling]] = {name: {} for name in models}
        self._identities: dict[str, dict[str, SlideIdentity]] = {name: {} for name in models}
        self._summaries: list[tuple[str, RunSummary]] = []
        self._receive = receive
        #: It shares nothing, and stages for itself.
        self._is_alone = len(models) == 1 and job.scratch is None
        self._rounds: SimpleQueue[_Round | None] = SimpleQueue()

    def run(self) -> None:
        """Round after round: each ends where the coordinator has nothing more at the moment."""
        from slide2vec.stream.staging import IN_PLACE, stager_for

        for name, part in self._job.parts.items():
            tile_size = part.config.requested_tile_size_px
            _check_identity(self._models[name].identity(part.execution, tile_size), part.identity)
        execution = next(iter(self._job.parts.values())).execution
        with nullcontext(IN_PLACE) if self._is_alone else stager_for(execution) as stager:
            begin = partial(_Round, self._models, stager, execution.num_workers, self._job.scratch)
            commands = threading.Thread(target=self._obey, args=(begin,), name="commands", daemon=True)
            commands.start()
            self._send_report(JobStarted())
            while (now := self._rounds.get()) is not None:
                self._embed_round(now)
            commands.join()
        self._send_report(JobFinished(tuple(self._summaries)))

    def _obey(self, begin: Callable[[], _Round]) -> None:
        """Take commands while streams run."""
        now: _Round | None = begin()
        while now is not None:
            self._rounds.put(now)
            now = self._fill(now, begin)
        self._rounds.put(None)

    def _fill(self, now: _Round, begin: Callable[[], _Round]) -> _Round | None:
        """Put slides into a round until it ends; gives the next one, if there is to be one."""
        while True:
            match self._receive():
                case Task(slide, known):
                    self._send_report(Taken(slide.sample_id))
                    for name, each in known.items():
                        if each.tiling is not None:
                            self._tilings[name][slide.sample_id] = each.tiling
                        if each.identity is not None:
                            self._identities[name][slide.sample_id] = each.identity
                    now.put(slide, known)
                case Flush():
                    now.end()
                    return begin()
                case EndOfJob():
                    now.end()
                    return None

    def _embed_round(self, now: _Round) -> None:
        """A stream of each encoder. One of several that breaks off leaves the others alone."""
        from slide2vec.cohort.side_by_side import run_in_threads

        if self._is_alone:
            (name,) = self._models
            with activate_progress_reporter(EventForwarder(name, now, self._send_report, self._summaries)):
                self._embed(name, now)
            return
        tasks = {name: partial(self._embed, name, now) for name in self._models}
        reporters = {
            name: EventForwarder(name, now, self._send_report, self._summaries) for name in self._models
        }
        found = run_in_threads(tasks, now.shares, reporters, now.cancel)
        broken = {name: error for name, error in found.items() if isinstance(error, Exception)}
        if len(broken) == len(self._models):  # as if there were one
            raise next(iter(broken.values()))
        for name, error in broken.items():
            self._send_report(EncoderBroken(name, portable(error)))
            for sample_id in now.left[name]:
                self._send_report(Done(sample_id, name))

    def _embed(self, name: str, now: _Round, share: Share | None = None) -> None:
        """One stream: embeddings go back, or files are written and what there is to say of them goes back."""
        with (
            self._sink(name, now, share) as sink,
            closing(self._models[name].embed_here(sink, now.queues[name])) as outcomes,
        ):
            for outcome in outcomes:
                self._report_outcome(name, now, outcome)

    @contextmanager
    def _sink(self, name: str, now: _Round, share: Share | None) -> Iterator[Sink]:
        from slide2vec.cohort.context import Cohort
        from slide2vec.cohort.disk_sink import DiskSink
        from slide2vec.cohort.record_events import ForwardingRecorder
        from slide2vec.cohort.sink import MemorySink

        part, model, tilings = self._job.parts[name], self._models[name], self._tilings[name]
        execution = part.execution
        if part.place is None:
            aggregate = partial(model.aggregated, latents=execution.save_latents) if part.aggregate else None
            yield MemorySink(part.config, execution, aggregate, tilings, share)
            return
        cohort = Cohort(part.config, execution, model, tilings, part.place, self._identities[name])
        cohort.share = share
        cohort.recorder = ForwardingRecorder(partial(self._report_record, name))
        completed, done = partial(self._on_slide_completed, name), partial(self._done, name, now)
        with DiskSink(cohort, model, completed, on_done=done) as sink:
            yield sink

    def _done(self, name: str, now: _Round, sample_id: str) -> None:
        now.left[name].discard(sample_id)
        self._send_report(Done(sample_id, name))

    def _report_outcome(self, name: str, now: _Round, outcome: SlideOutcome) -> None:
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
        self._send_report(Embedded(outcome, features, name))
        self._done(name, now, outcome.slide.sample_id)

    def _report_record(self, name: str, entry: Any) -> None:
        if entry.what == "fail":
            failed, traceback = entry.values
            entry = replace(entry, values=(replace(failed, error=portable(failed.error)), traceback))
        self._send_report(Recorded(entry, name))

    def _on_slide_completed(self, name: str, completed_slide: Any) -> tuple[()]:
        if completed_slide.error is not None:
            completed_slide = replace(completed_slide, error=portable(completed_slide.error))
        self._send_report(Recorded(completed_slide, name))
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
    """A reporter that sends events of an encoder on, and keeps the summaries of streams that did anything."""

    def __init__(
        self, encoder: str, now: _Round, send_report: SendReport, summaries: list[tuple[str, RunSummary]]
    ) -> None:
        self._encoder, self._now, self._send_report, self._summaries = encoder, now, send_report, summaries

    def emit(self, event: ProgressEvent) -> None:
        """See `ProgressReporter`."""
        self._now.check()
        if isinstance(event, RunFinished):
            if event.summary.slides or event.summary.failed:
                self._summaries.append((self._encoder, event.summary))
            return
        if isinstance(event, SlideFailed):
            event = replace(event, error=portable(event.error))
        self._send_report(ProgressMessage(event, self._encoder))

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
