"""Planner: plans the slides of a run, and knows how they are staged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.slides import Slide
from slide2vec.stream.plan import PlanRequest, SlidePlan, plan_slide
from slide2vec.stream.plan_ahead import Stream
from slide2vec.stream.shared_slides import Share
from slide2vec.stream.slide_identity import Identities
from slide2vec.stream.staging import IN_PLACE, InPlace, stager_for
from slide2vec.tiling import Tiling

__all__ = ["Planner"]


class Planner:
    """Plans slides, and knows how they are staged. Used from several threads.

    A context manager: what stages slides begins with it, and copies of slides are gone at its end.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        execution: says where slides are staged, if they are.
        output_dir: where previews and archives go, if the config asks for them.
        tilings: of slides whose tiles are known, by sample_id; may grow meanwhile.
        identities: of the run; None where nobody asks later whether its slides are still the same.
        planned: called with each plan, in the thread that made it; what it raises is the slide's error.
        share: the part in slides that other streams read, too: they are planned for all of them.

    Raises:
        ConfigError: when it is entered: nothing can be written into stage_dir.
    """

    def __init__(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        output_dir: Path | None = None,
        *,
        tilings: Mapping[str, Tiling] | None = None,
        identities: Identities | None = None,
        planned: Callable[[SlidePlan], None] | None = None,
        share: Share | None = None,
    ) -> None:
        self._config, self._execution, self._output_dir = config, execution, output_dir
        self._tilings: Mapping[str, Tiling] = {} if tilings is None else tilings
        self._identities, self._planned, self.share = identities, planned, share
        self._opened = ExitStack()
        self.stager: InPlace = IN_PLACE if share is None else share.stager

    def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]:
        """The slides; the staging of each begins as it is taken."""
        return self.stager.ahead(slides)

    def wait(self, slide: Slide) -> None:
        """Wait until its files are there to be read."""
        self.stager.wait(slide)

    def plan(self, slide: Slide) -> SlidePlan:
        """The slide with its tiles, opened.

        Raises:
            SlideError, ManifestError, OutputError: as `plan_slide`, and as `planned`.
        """
        asked = self.request(slide)
        plan = plan_slide(slide, asked.config, asked.output_dir, asked.given, self.stager, asked.identities)
        try:
            return self.announced(plan)
        except BaseException:
            plan.close()
            raise

    def announced(self, plan: SlidePlan) -> SlidePlan:
        """Tell of a plan that was made for this stream, be it for others, too.

        Raises:
            SlideError, OutputError: as `planned`.
        """
        if self._identities is not None and plan.identity is not None:
            self._identities.take_over(plan.slide.sample_id, plan.identity)
        with plan.announcements.lock:
            if plan.announcements.made and plan.coordinates_dir is None and self._output_dir is not None:
                plan = replace(plan, coordinates_dir=self._output_dir / "tiles")  # since then
            if self._planned is not None:
                self._planned(plan)
            plan.announcements.made = True
        return plan

    def request(self, slide: Slide) -> PlanRequest:
        """What is to be planned of a slide."""
        given = self._tilings.get(slide.sample_id)
        return PlanRequest(self._config, self._output_dir, given, self._identities)

    def takers(self, slide: Slide, streams: Sequence[Stream]) -> Sequence[Stream]:
        """Those of several streams that want the slide."""
        return streams

    @property
    def key(self) -> Hashable:
        """Equal for planners of the same tiles that tell of them in the same place."""
        return PlanRequest(self._config, self._output_dir).key

    def stop(self) -> None:
        """Stage nothing more; whoever waits gets `Stopped`. From any thread."""
        self.stager.stop()

    def __enter__(self) -> Self:
        if self.share is None:
            self.stager = self._opened.enter_context(stager_for(self._execution))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
