"""Where the finished slides of a run on disk go: files, each slide's in order, written beside the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from slide2vec.artifacts import SlideEmbeddingArtifact, TileEmbeddingArtifact
from slide2vec.artifacts.places import Place
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.events import Entry, Settle, Settled, settled_alone
from slide2vec.cohort.opened import remove_all_partial
from slide2vec.cohort.publish import Publisher
from slide2vec.cohort.results import Artifact
from slide2vec.cohort.writer import OnPersisted, Writer
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlideOutcome

if TYPE_CHECKING:
    from slide2vec.stream.identities import SlideIdentity
    from slide2vec.tiling import Tiling

__all__ = ["DiskSink"]


class DiskSink:
    """See `slide2vec.cohort.sink.Sink`. A context manager, whose end waits for what is not written yet.

    Args:
        cohort: whose `entries` are set.
        settle: called with each slide that is through, for what comes after it.
        on_persisted: called with each new artifact, in the thread that writes.
        on_done: called with the sample_id of each slide that was `put`, in that thread, once nothing more
            comes of it.
    """

    def __init__(
        self,
        cohort: Cohort,
        embedder: Embedder,
        settle: Settle = settled_alone,
        *,
        on_persisted: OnPersisted | None = None,
        on_done: Callable[[str], None] = lambda sample_id: None,
    ) -> None:
        self.config, self.execution = cohort.config, cohort.execution
        self.place: Place | None = cohort.place
        self._cohort, self._settle, self._on_done = cohort, settle, on_done
        self._publisher, self._writer = Publisher(cohort, embedder, settle), Writer(on_persisted)

    def planner(self) -> Planner:
        """See `Sink`: coordinates are published as slides are planned."""
        return self._cohort.planner()

    def known(self, slide: Slide) -> tuple[Tiling | None, SlideIdentity | None]:
        """See `Sink`."""
        return self._cohort.tilings.get(slide.sample_id), self._cohort.files.known(slide.sample_id)

    def put(self, outcome: SlideOutcome) -> Iterable[SlideOutcome]:
        """See `Sink`: nothing goes back. Raises what writing an earlier slide has raised."""
        self._writer.put(partial(self._publish, outcome))
        return ()

    def _publish(self, outcome: SlideOutcome) -> Iterator[Artifact]:
        yield from self._publisher.outcome(outcome)
        self._on_done(outcome.slide.sample_id)

    def put_tiles(self, slide: Slide, artifact: TileEmbeddingArtifact) -> None:
        """Take a slide whose tile embeddings an earlier run has written."""
        self._writer.put(partial(self._publisher.stored_tiles, slide, artifact))

    def put_embedding(self, slide: Slide, artifact: SlideEmbeddingArtifact) -> None:
        """Take a slide of a patient whose slide embedding an earlier run has written."""
        self._writer.put(partial(self._publisher.stored_embedding, slide, artifact))

    def told(self, event: Entry | Settled) -> None:
        """See `Sink`."""
        if isinstance(event, Settled):
            self._writer.put(partial(self._settle, event))
            return
        event.enter(self._cohort.entries)
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
