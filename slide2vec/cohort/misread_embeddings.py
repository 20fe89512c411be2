"""Embeddings that earlier versions should not have written, of pixels that they read wrongly or with NaN in
them: resume does not keep them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from slide2vec.artifacts import SlideEmbeddingArtifact, load_embeddings
from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.cohort.results import Artifact
from slide2vec.errors import ArtifactError, SlideError
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide
from slide2vec.tiling.known_misreads import READING, misread_by_earlier_versions

__all__ = ["misread_reason", "not_finite_reason", "with_current_reading"]

logger = logging.getLogger(__name__)

#: Features files that are in memory at once, of the many that resume looks at.
_loading = threading.BoundedSemaphore(2)


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


def not_finite_reason(made: Any, artifact: Artifact, name: str) -> str | None:
    """Why an embedding is not to be kept that holds NaN or infinities; None where it is.

    Only those without `reading` are read: versions that record it have looked before they wrote.

    Args:
        made: the recorded identity.
        name: of the slide or patient.
    """
    if not isinstance(made, Mapping) or "reading" in made or _all_with_reading(made.get("slides")):
        return None
    latents = artifact.latent_path if isinstance(artifact, SlideEmbeddingArtifact) else None
    try:
        with _loading:
            wrong = any(
                len(rows_not_finite(load_embeddings(path)))
                for path in (artifact.path, latents)
                if path is not None
            )
    except ArtifactError as error:
        logger.warning("%s is embedded anew: %s", name, error)
        return "embedding: the file of an earlier version cannot be read"
    if wrong:
        logger.warning("%s is embedded anew: %s holds NaN or infinities", name, artifact.path)
        return "embedding: an earlier version wrote NaN or infinities"
    return None


def _all_with_reading(slides: Any) -> bool:
    return isinstance(slides, Mapping) and all(
        isinstance(one, Mapping) and "reading" in one for one in slides.values()
    )


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
