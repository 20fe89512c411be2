"""A planner whose plans are made up."""

from __future__ import annotations

from collections.abc import Callable

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlidePlan


class PlanBy(Planner):
    """Plans by a function of the slide."""

    def __init__(self, plan: Callable[[Slide], SlidePlan]) -> None:
        super().__init__(PreprocessingConfig(), ExecutionOptions())
        self._made_up = plan

    def plan(self, slide: Slide) -> SlidePlan:
        return self._made_up(slide)
