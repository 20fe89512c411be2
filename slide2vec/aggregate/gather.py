"""The calls for slides of a model: their results, gathered in the order of the slides."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ConfigError, EmbedSlidesError, ManifestError
from slide2vec.manifests import SlidesLike, by_class, classes_of, given_slides
from slide2vec.slides import Slide, SlideLike, as_slide
from slide2vec.stream import SlideOutcome

__all__ = [
    "SlideModel",
    "check_on_error",
    "collect_outcomes",
    "embed_in_order",
    "embed_slide",
    "embed_slides",
]

logger = logging.getLogger(__name__)


class SlideModel(Protocol):
    """A model, as far as the calls for slides need it."""

    def resolve_preprocessing(self, config: PreprocessingConfig | None = None) -> PreprocessingConfig: ...

    def iter_slides(
        self,
        slides: SlidesLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
    ) -> Iterable[SlideOutcome]: ...


@overload
def embed_slide(
    self: SlideModel,
    slide: SlideLike,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    *,
    annotation: str | None = None,
    sample_id: str | None = None,
    mask_path: str | os.PathLike[str] | None = None,
    spacing_at_level_0: float | None = None,
) -> EmbeddedSlide: ...


@overload
def embed_slide(
    self: SlideModel,
    slide: SlideLike,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    *,
    annotation: list[str],
    sample_id: str | None = None,
    mask_path: str | os.PathLike[str] | None = None,
    spacing_at_level_0: float | None = None,
) -> list[EmbeddedSlide]: ...


def embed_slide(
    self: SlideModel,
    slide: SlideLike,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    *,
    annotation: str | list[str] | None = None,
    sample_id: str | None = None,
    mask_path: str | os.PathLike[str] | None = None,
    spacing_at_level_0: float | None = None,
) -> EmbeddedSlide | list[EmbeddedSlide]:
    """Embed one slide.

    Args:
        slide: a path, a mapping (image_path, and optionally sample_id, mask_path,
            spacing_at_level_0, patient_id), an object with these attributes, or a Slide.
        preprocessing: tiling and reading; None = the preset's spacing and tile size.
        execution: batch size, precision, threads, output directory.
        annotation: which class, where `preprocessing.masks` samples several; of a list, an EmbeddedSlide
            for each, in its order.
        sample_id, mask_path: of a slide that is given as a path.
        spacing_at_level_0: µm/px, where the file's own is missing or wrong.

    Raises:
        SlideError: the slide cannot be embedded, and why.
        ConfigError: the class is not sampled, or several are and none is named.
        ManifestError: a ValueError: sample_id or mask_path for a slide that is no path.
    """
    if sample_id is not None or mask_path is not None:
        slide = _named(slide, sample_id, mask_path)
    masks = self.resolve_preprocessing(preprocessing).masks
    asked = classes_of(as_slide(slide, spacing_at_level_0), masks, annotation)
    found = _embed_or_raise(asked, self.iter_slides(asked, preprocessing, execution))
    return found if isinstance(annotation, list) else found[0]


def _named(
    slide: SlideLike, sample_id: str | None, mask_path: str | os.PathLike[str] | None
) -> Mapping[str, Any]:
    """The slide at a path, with what was given beside it."""
    if isinstance(slide, Mapping) or hasattr(slide, "sample_id"):
        raise ManifestError(
            "sample_id and mask_path are for a slide that is given as a path; this one, "
            f"{type(slide).__name__}, has them itself"
        )
    return {"sample_id": sample_id, "image_path": slide, "mask_path": mask_path}


def embed_slides(
    self: SlideModel,
    slides: SlidesLike,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    *,
    annotations: Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[EmbeddedSlide]:
    """Embed several slides, packed into common batches; results in input order.

    A slide without tissue is there with (0, D) embeddings. A slide that fails never stops the
    others. Where `preprocessing.masks` samples several classes, a slide has one result for each, one
    after the other, in the order of `masks.min_coverage`; `EmbeddedSlide.annotation` says which.

    Args:
        slides: as for `embed_slide`; or a pandas.DataFrame with the columns of a manifest.
        annotations: only these classes, in this order; None = all that are sampled.
        on_error: "raise" an EmbedSlidesError after all slides are complete, which carries the
            results of the good ones; or "skip" the failed ones (they are logged).

    Raises:
        EmbedSlidesError: some slides failed, or the run itself broke off after some were finished.
        ManifestError: a slide is not well given, or two have one sample_id.
    """
    asked = by_class(given_slides(slides), self.resolve_preprocessing(preprocessing).masks, annotations)
    return embed_in_order(asked, self.iter_slides(asked, preprocessing, execution), on_error)


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


def _embed_or_raise(slides: Sequence[Slide], outcomes: Iterable[SlideOutcome]) -> list[EmbeddedSlide]:
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
