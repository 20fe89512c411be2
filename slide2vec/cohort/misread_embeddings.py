"""Embeddings of pixels that an earlier version is known to have read wrongly: resume does not keep them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from slide2vec.errors import SlideError
from slide2vec.readers.known_misreads import READING, misread_by_earlier_versions
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide

__all__ = ["misread_reason", "with_current_reading"]

logger = logging.getLogger(__name__)


def with_current_reading(made: Any) -> Any:
    """A recorded identity with `reading`, the version of the code that reads pixels, where it has none."""
    if not isinstance(made, Mapping):
        return made
    if isinstance(slides := made.get("slides"), Mapping):
        return {**made, "slides": {name: with_current_reading(one) for name, one in slides.items()}}
    return {"reading": READING, **made}


def misread_reason(made: Any, recorded: Mapping[str, Any], slides: Sequence[Slide]) -> str | None:
    """Why the embedding of a slide, or of a patient with these slides, is not to be kept; None where it is.

    Only slides without `reading` are looked at, by their tags. Those that cannot be (remote ones) are kept.

    Args:
        made: the recorded identity.
        recorded: the sidecar, which knows what read each slide.
    """
    for slide in slides:
        own, metadata = made, recorded
        if isinstance(made, Mapping) and "slides" in made:
            own, metadata = _of(made["slides"], slide), _of(recorded.get("slides"), slide)
        if not isinstance(own, Mapping) or "reading" in own or own.get("tiles_from") == "archive":
            continue
        reason = _reason(slide, metadata)
        if reason is not None:
            logger.warning("slide %s is embedded anew: earlier versions %s", slide.sample_id, reason)
            return f"reading: earlier versions {reason}"
    return None


def _of(slides: Any, slide: Slide) -> Any:
    return slides.get(slide.sample_id) if isinstance(slides, Mapping) else None


def _reason(slide: Slide, metadata: Any) -> str | None:
    backend = metadata.get("backend") if isinstance(metadata, Mapping) else None
    if not isinstance(backend, str):
        return None
    try:
        return misread_by_earlier_versions(backend, probe(slide))
    except SlideError:
        return None
