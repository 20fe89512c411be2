"""What a planner is told of, and what becomes of a plan that comes to nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slide2vec.cohort.context import Cohort
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import OutputError
from slide2vec.slides import Slide
from slide2vec.stream import Planner
from slide2vec.stream.plan import Announcements

CONFIG = PreprocessingConfig(requested_tile_size_px=8, requested_spacing_um=0.5)
SLIDE = Slide(sample_id="s", image_path=Path("s.svs"))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans that were made, each with the tiles that were given for it."""
    made: list[Any] = []

    def plan(slide: Slide, config: Any, output_dir: Any, given: Any, *rest: Any) -> Any:
        made.append(SimpleNamespace(given=given, closed=False, announcements=Announcements()))
        made[-1].close = lambda: setattr(made[-1], "closed", True)
        return made[-1]

    monkeypatch.setattr("slide2vec.stream.planner.plan_slide", plan)
    return made


def test_tiles_that_become_known_later_are_used(plans: list[Any], tmp_path: Path) -> None:
    """Those of a worker come with its tasks, when its planner is there already."""
    given: dict[str, Any] = {}
    planner = Planner(CONFIG, ExecutionOptions(), tilings=given)
    cohort = Cohort(CONFIG, ExecutionOptions(output_dir=tmp_path), tilings=given)
    given["s"] = "its tiles"
    planner.plan(SLIDE)
    assert plans[0].given == "its tiles" and cohort.tilings["s"] == "its tiles"  # type: ignore[comparison-overlap]


def test_a_plan_that_cannot_be_published_is_closed(plans: list[Any]) -> None:
    def full(plan: Any) -> None:
        raise OutputError("No space left on device")

    with pytest.raises(OutputError), Planner(CONFIG, ExecutionOptions(), planned=full) as planner:
        planner.plan(SLIDE)
    assert plans[0].closed
