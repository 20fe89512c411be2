"""The slides of a call, gathered in their order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ConfigError, EmbedSlidesError
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome

__all__ = ["check_on_error", "collect_outcomes", "embed_in_order", "embed_or_raise"]

logger = logging.getLogger(__name__)


def embed_in_order(
    slides: Sequence[Slide], outcomes: Iterable[SlideOutcome], on_error: Literal["raise", "skip"]
) -> list[EmbeddedSlide]:
    """The embedded slides in the order in which they were given.

    Args:
        on_error: "skip" leaves out those that failed.

    Raises:
        ConfigError: on_error is neither.
        EmbedSlidesError: "raise", and a slide failed; or the run itself broke off after some slides were
            through. It carries the others.
    """
    check_on_error(on_error)
    found, broken = collect_outcomes(slides, outcomes)
    results = [found[slide.sample_id].embedded for slide in slides]
    errors = ((slide.sample_id, found[slide.sample_id].error) for slide in slides)
    failed = {name: error for name, error in errors if error is not None}
    if failed and (broken or on_error == "raise"):
        raise EmbedSlidesError.of(failed, results)
    for name, error in failed.items():
        logger.error("slide %s skipped: %s", name, error)
    return [result for result in results if result is not None]


def embed_or_raise(slides: Sequence[Slide], outcomes: Iterable[SlideOutcome]) -> list[EmbeddedSlide]:
    """As `embed_in_order`; raises the error of the first that fails, as it is."""
    found = {outcome.slide.sample_id: outcome for outcome in outcomes}
    for slide in slides:
        if (error := found[slide.sample_id].error) is not None:
            raise error
    results = [found[slide.sample_id].embedded for slide in slides]
    return [result for result in results if result is not None]


def check_on_error(on_error: str) -> None:
    """Raises ConfigError for anything but "raise" and "skip"."""
    if on_error not in ("raise", "skip"):
        raise ConfigError(f'on_error={on_error!r} is not "raise" or "skip"')


def collect_outcomes(
    slides: Sequence[Slide], outcomes: Iterable[SlideOutcome]
) -> tuple[dict[str, SlideOutcome], bool]:
    """The outcome of every slide by sample_id, and whether the run broke off: its error (of the device,
    say) is then that of the slides that were not complete."""
    found: dict[str, SlideOutcome] = {}
    try:
        for outcome in outcomes:
            found[outcome.slide.sample_id] = outcome
    except Exception as error:  # of the run, not of a slide: what is finished is kept
        if not found:
            raise
        for slide in slides:
            found.setdefault(slide.sample_id, SlideOutcome(slide, error=error))
        return found, True
    return found, False
