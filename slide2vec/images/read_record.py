"""How a picture was read for dense features, as sidecars record it: the keys of slide2vec 7.1.4."""

from __future__ import annotations

from typing import Any

from slide2vec.geometry import LevelChoice
from slide2vec.images.dense_options import DenseLike

__all__ = ["read_record"]


def read_record(
    dense: DenseLike,
    spacing_um: float,
    spacing_source: str,
    *,
    backend: str,
    base_spacing_um: float,
    spacing_at_level_0: float | None,
    level: LevelChoice,
    read_size: tuple[int, int],
    output_size: tuple[int, int],
) -> dict[str, Any]:
    """Of spacings in µm/px and sizes (height, width) in px.

    Args:
        spacing_um: asked for, and `spacing_source` who said so: "explicit", "model_default".
        base_spacing_um: of level 0, and `spacing_at_level_0` where the caller says it.
        read_size: at the level that is read, and `output_size` once that is reduced.
    """
    return {
        "reader_regime": "spacing-readable",
        "spacing_source": spacing_source,
        "declared_spacing_um": float(spacing_um),
        "source_spacing_um": float(base_spacing_um),
        "spacing_at_level_0": spacing_at_level_0,
        "read_spacing_um": float(level.spacing_um),
        "effective_spacing_um": float(level.spacing_um if level.is_within_tolerance else spacing_um),
        "requested_backend": dense.backend,
        "backend": backend,
        "tolerance": float(dense.tolerance),
        "read_level": level.level,
        "is_within_tolerance": level.is_within_tolerance,
        "read_size": list(read_size),
        "output_size": list(output_size),
    }
