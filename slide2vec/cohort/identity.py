"""What decides a slide's embeddings: compared by resume, kept in the sidecar's `compatibility`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from slide2vec.config import PreprocessingConfig
from slide2vec.readers.fingerprint import same_content
from slide2vec.readers.misread import READING
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling

__all__ = ["compatibility", "difference", "encoder_identity"]

#: Of which the difference is told in full.
_EXPLAINED = ("encoder", "below", "geometry")


def compatibility(
    slide: Slide,
    config: PreprocessingConfig,
    encoder: Mapping[str, Any],
    files: Mapping[str, Any],
    given: Tiling | None = None,
) -> dict[str, Any]:
    """The identity of a slide's embeddings, JSON-ready.

    Batch size, workers and devices are not part of it; neither is the back end, as all give the same
    pixels, nor where files are.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: `Model.identity()`.
        files: `SlideIdentity.content`: what the image (or tile archive) and the mask were.
        given: the slide's tiles, where they are not found by segmentation.

    Raises:
        ManifestError: its own tiling options are wrong.
    """
    config = config.for_slide(slide.sample_id, slide.tiling)
    from_archive = config.read_tiles_from is not None
    made = {
        **files,
        "reading": READING,
        "tiles_from": "archive" if from_archive else "slide" if config.on_the_fly else "jpeg",
        "encoder": encoder_identity(encoder),
        "geometry": _geometry(slide, config, given),
    }
    return dict(json.loads(json.dumps(made)))


def encoder_identity(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """`Model.identity()` without where the weights came from, also of the models that it builds on."""
    made = {
        name: encoder_identity(value) if name == "below" else value
        for name, value in encoder.items()
        if name != "weights_source"
    }
    return dict(json.loads(json.dumps(made)))


def _geometry(slide: Slide, config: PreprocessingConfig, given: Tiling | None) -> dict[str, Any]:
    asked = {
        "requested_spacing_um": config.requested_spacing_um,
        "requested_tile_size_px": config.requested_tile_size_px,
        "spacing_at_level_0": slide.spacing_at_level_0,
    }
    if config.region_tile_multiple is not None:
        asked["region_tile_multiple"] = config.region_tile_multiple
    if given is not None:
        return {**asked, "coordinates": _digest(given)}
    return {
        **asked,
        "tolerance": config.tolerance,
        "overlap": config.overlap,
        "tissue_threshold": config.tissue_threshold,
        "segmentation": config.segmentation.model_dump(mode="json"),
        "filtering": config.filtering.model_dump(mode="json"),
    }


def _digest(tiling: Tiling) -> str:
    geometry = tiling.geometry
    sizes = f"{geometry.read_level} {geometry.read_tile_size_px} {geometry.tile_size_lv0}"
    digest = hashlib.blake2b(sizes.encode(), digest_size=16)
    digest.update(tiling.x.tobytes())
    digest.update(tiling.y.tobytes())
    return digest.hexdigest()


def difference(recorded: Any, asked: Mapping[str, Any]) -> str | None:
    """What differs between two identities, in words such as "encoder precision"; None if nothing does."""
    if not isinstance(recorded, Mapping):
        return "settings"
    for name in sorted(asked.keys() | recorded.keys()):
        old, new = recorded.get(name), asked.get(name)
        if not same_content(old, new):
            inner = difference(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else None
            return f"{name} {inner}" if inner and (name in _EXPLAINED or inner == "companions") else name
    return None
