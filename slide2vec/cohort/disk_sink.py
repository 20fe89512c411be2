"""Sink of a run on disk: each finished slide becomes files, written in a thread beside the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from slide2vec.artifacts import SlideEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.artifacts.places import Place
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.output_dir import remove_all_partial
from slide2vec.cohort.record_events import OnSlideCompleted, RecordEvent, SlideCompleted, without_patient
from slide2vec.cohort.results import Artifact
from slide2vec.cohort.slide_writer import OnPersisted, SlideWriter, WriterThread
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlideOutcome

if TYPE_CHECKING:
    from slide2vec.stream.slide_identity import SlideIdentity
    from slide2vec.tiling import Tiling

__all__ = ["DiskSink"]


class DiskSink:
    """See `slide2vec.cohort.sink.Sink`. A context manager, whose end waits for what is not written yet.

    Args:
        cohort: whose `recorder` is set.
        on_slide_completed: called with each slide that is complete or has failed; gives its patient's
            artifacts.
        on_persisted: called with each new artifact, in the thread that writes.
        on_done: called with the sample_id of each slide that was `put`, in that thread, once nothing more
            comes of it.
    """

    def __init__(
        self,
        cohort: Cohort,
        embedder: Embedder,
        on_slide_completed: OnSlideCompleted = without_patient,
        *,
        on_persisted: OnPersisted | None = None,
        on_done: Callable[[str], None] = lambda sample_id: None,
    ) -> None:
        self.config, self.execution = cohort.config, cohort.execution
        self.place: Place | None = cohort.place
        self._cohort, self._on_slide_completed, self._on_done = cohort, on_slide_completed, on_done
        self._confirm = embedder.confirm_weights
        self._slide_writer, self._writer = (
            SlideWriter(cohort, embedder, on_slide_completed),
            WriterThread(on_persisted),
        )

    def planner(self) -> Planner:
        """See `Sink`: coordinates are published as slides are planned."""
        return self._cohort.planner()

    def known(self, slide: Slide) -> tuple[Tiling | None, SlideIdentity | None]:
        """See `Sink`."""
        return self._cohort.tilings.get(slide.sample_id), self._cohort.files.known(slide.sample_id)

    def put(self, outcome: SlideOutcome) -> Iterable[SlideOutcome]:
        """See `Sink`: nothing goes back. Raises what writing an earlier slide has raised."""
        self._write(partial(self._publish, outcome))
        return ()

    def _publish(self, outcome: SlideOutcome) -> Iterator[Artifact]:
        yield from self._slide_writer.outcome(outcome)
        self._on_done(outcome.slide.sample_id)

    def _write(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        self._writer.put(partial(self._confirmed, publish))

    def _confirmed(self, publish: Callable[[], Iterable[Artifact]]) -> Iterator[Artifact]:
        self._confirm()
        yield from publish()

    def put_tiles(self, slide: Slide, artifact: TileEmbeddingArtifact) -> None:
        """Take a slide whose tile embeddings an earlier run has written."""
        self._write(partial(self._slide_writer.stored_tiles, slide, artifact))

    def put_embedding(self, slide: Slide, artifact: SlideEmbeddingArtifact) -> None:
        """Take a slide of a patient whose slide embedding an earlier run has written."""
        self._write(partial(self._slide_writer.stored_embedding, slide, artifact))

    def take_report(self, event: RecordEvent | SlideCompleted) -> None:
        """See `Sink`."""
        if isinstance(event, SlideCompleted):
            self._writer.put(partial(self._on_slide_completed, event))
            return
        event.apply(self._cohort.recorder)
        if event.what == "add":
            self._writer.put(partial(iter, event.values[-1:]))

    def tidy(self) -> None:
        """See `Sink`. Of a shard nothing is removed: others write there, too."""
        if self.execution.shard is None:
            remove_all_partial(self._cohort.place.root)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
