"""What decides a slide's embeddings: compared by resume, kept in the sidecar's `compatibility`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slide2vec.config import PreprocessingConfig
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling
from slide2vec.tiling.archives import find_archive

__all__ = ["compatibility", "difference", "encoder_identity", "fingerprint"]

#: Read of each end of a file: slides are too large to be read whole, and a changed one differs there
#: (header, index, length).
_END_BYTES = 65_536
#: Of which the difference is told in full.
_EXPLAINED = ("encoder", "below", "geometry")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and digest of the ends of a file: the same file elsewhere has the same one.

    Of a slide in several files (MRXS, a DICOM series) it is that of the file that is named.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.blake2b(file.read(_END_BYTES), digest_size=16)
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return {"size_bytes": size, "digest": digest.hexdigest()}


def compatibility(
    slide: Slide, config: PreprocessingConfig, encoder: Mapping[str, Any], given: Tiling | None = None
) -> dict[str, Any]:
    """The identity of a slide's embeddings, JSON-ready.

    Batch size, workers and devices are not part of it; neither is the back end, as all give the same
    pixels, nor where files are.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: `Model.identity()`.
        given: the slide's tiles, where they are not found by segmentation.

    Raises:
        OSError: a file of the slide cannot be read.
        TilingError: it has no tile archive where there should be one.
        ManifestError: its own tiling options are wrong.
    """
    config = config.for_slide(slide.sample_id, slide.tiling)
    from_archive = config.read_tiles_from is not None
    made = {
        "image": fingerprint(_image(slide, config)),
        "mask": None if slide.mask_path is None or given is not None else fingerprint(slide.mask_path),
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


def _image(slide: Slide, config: PreprocessingConfig) -> Path:
    if config.read_tiles_from is not None:
        return find_archive(config.read_tiles_from, slide.sample_id)
    return slide.image_path


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
        if old != new:
            inner = difference(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else None
            return f"{name} {inner}" if inner and name in _EXPLAINED else name
    return None
