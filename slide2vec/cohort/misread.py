"""Embeddings that an earlier version made of pixels which it read wrongly: they are not kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from slide2vec.errors import SlideError
from slide2vec.readers.misread import READING, misread_by_earlier_versions
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide

__all__ = ["as_if_read_now", "misread"]

logger = logging.getLogger(__name__)


def as_if_read_now(made: Any) -> Any:
    """A recorded identity with the mark of the code that reads pixels, for those that have none."""
    if not isinstance(made, Mapping):
        return made
    if isinstance(slides := made.get("slides"), Mapping):
        return {**made, "slides": {name: as_if_read_now(one) for name, one in slides.items()}}
    return {"reading": READING, **made}


def misread(made: Any, recorded: Mapping[str, Any], slides: Sequence[Slide]) -> str | None:
    """Why the embedding of a slide, or of a patient with these slides, is not to be kept; None where it is.

    Only slides without the mark are looked at, at their tags. Those that cannot be (remote ones) are kept.

    Args:
        made: the recorded identity.
        recorded: the sidecar, which knows what read each slide.
    """
    for slide in slides:
        own, about = made, recorded
        if isinstance(made, Mapping) and "slides" in made:
            own, about = _of(made["slides"], slide), _of(recorded.get("slides"), slide)
        if not isinstance(own, Mapping) or "reading" in own or own.get("tiles_from") == "archive":
            continue
        reason = _reason(slide, about)
        if reason is not None:
            logger.warning("slide %s is embedded anew: earlier versions %s", slide.sample_id, reason)
            return f"reading: earlier versions {reason}"
    return None


def _of(slides: Any, slide: Slide) -> Any:
    return slides.get(slide.sample_id) if isinstance(slides, Mapping) else None


def _reason(slide: Slide, about: Any) -> str | None:
    backend = about.get("backend") if isinstance(about, Mapping) else None
    if not isinstance(backend, str):
        return None
    try:
        return misread_by_earlier_versions(backend, probe(slide))
    except SlideError:
        return None
