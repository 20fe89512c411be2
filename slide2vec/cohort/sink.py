"""Sinks: where finished slides go. Here back to the caller, in memory; `slide2vec.cohort.disk_sink`: onto
disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from slide2vec.cohort.record_events import RecordEvent, SlideCompleted
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import Slide2VecError
from slide2vec.labels import TISSUE, split_class_name
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlideOutcome
from slide2vec.stream.slide_identity import Identities, SlideIdentity

if TYPE_CHECKING:
    from slide2vec.artifacts.places import Place
    from slide2vec.recipes import Recipe
    from slide2vec.stream.shared_slides import Share
    from slide2vec.tiling import Tiling

__all__ = ["MemorySink", "Sink", "aggregated_outcome"]


class Sink(Protocol):
    """The one place where the finished slides of a call go, wherever they were embedded.

    Attributes:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        place: where workers write the files of slides themselves; None: embeddings come back from them.
    """

    config: PreprocessingConfig
    execution: ExecutionOptions
    place: Place | None

    def planner(self) -> Planner:
        """What plans the slides that go there."""
        ...

    def known(self, slide: Slide) -> tuple[Tiling | None, SlideIdentity | None]:
        """What is known of a slide before it is planned: its tiles, and what its files are."""
        ...

    def put(self, outcome: SlideOutcome) -> Iterable[SlideOutcome]:
        """Take a slide that is complete or has failed; yields what goes back to the caller. Used from one
        thread."""
        ...

    def take_report(self, event: RecordEvent | SlideCompleted) -> None:
        """Take a worker's report of a slide whose files it writes itself."""
        ...

    def tidy(self) -> None:
        """Remove half-written files of workers that have died."""
        ...


class MemorySink:
    """See `Sink`: every slide goes back, with its slide embedding, if its files are still what was read.

    Args:
        aggregate: gives a slide its slide_embedding, or raises a Slide2VecError; None = slides go back as
            they come.
        tilings: of slides whose tiles are known, by sample_id; may grow meanwhile.
        share: the part in slides that other encoders read, too.
        inputs: gives the recipe for tiles of a size, which says what the encoder is handed.
    """

    place: Place | None = None

    def __init__(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        aggregate: Callable[[EmbeddedSlide], EmbeddedSlide] | None = None,
        tilings: Mapping[str, Tiling] | None = None,
        share: Share | None = None,
        inputs: Callable[[int | None], Recipe] | None = None,
    ) -> None:
        self.config, self.execution, self._inputs = config, execution, inputs
        self._aggregate, self._tilings, self._share = aggregate, tilings, share
        self._files = Identities(config)

    def planner(self) -> Planner:
        """See `Sink`."""
        return Planner(
            self.config,
            self.execution,
            self.execution.output_dir,
            tilings=self._tilings,
            identities=self._files,
            share=self._share,
        )

    def known(self, slide: Slide) -> tuple[Tiling | None, SlideIdentity | None]:
        """See `Sink`."""
        return None, None

    def put(self, outcome: SlideOutcome) -> Iterator[SlideOutcome]:
        """See `Sink`. A worker may have aggregated it already, and has checked its files."""
        slide, embedded = outcome.slide, outcome.embedded
        files = self._files.known(slide.sample_id)
        self._files.forget(slide.sample_id)
        try:
            if files is not None and embedded is not None:
                files.check(slide)
        except Slide2VecError as error:
            outcome = SlideOutcome(slide, error=error)
        made = outcome if self._aggregate is None else aggregated_outcome(outcome, self._aggregate)
        recipe = self._inputs(self.config.requested_tile_size_px) if self._inputs and made.embedded else None
        yield _as_given(made, recipe)

    def take_report(self, event: RecordEvent | SlideCompleted) -> None:
        """See `Sink`: no worker writes files."""

    def tidy(self) -> None:
        """See `Sink`: nothing is written."""


def _as_given(outcome: SlideOutcome, recipe: Recipe | None) -> SlideOutcome:
    """With the sample_id that the user gave, the class, the tiling and the encoder's input beside it."""
    if outcome.embedded is None:
        return outcome
    _, sample_id = split_class_name(outcome.slide.sample_id)
    annotation = outcome.slide.annotation or TISSUE
    given = replace(outcome.embedded, sample_id=sample_id, annotation=annotation, tiling=outcome.tiling)
    if recipe is not None:
        transform = recipe.transform.model_dump(mode="json")
        given = replace(given, encoder_input_size_px=recipe.transform.crop, transform=transform)
    return replace(outcome, embedded=given)


def aggregated_outcome(
    outcome: SlideOutcome, aggregate: Callable[[EmbeddedSlide], EmbeddedSlide]
) -> SlideOutcome:
    """The outcome with its slide embedding, unless a worker has made it; or with why there is none."""
    if outcome.embedded is None or outcome.embedded.slide_embedding is not None:
        return outcome
    try:
        return replace(outcome, embedded=aggregate(outcome.embedded))
    except Slide2VecError as error:
        return SlideOutcome(outcome.slide, error=error)
