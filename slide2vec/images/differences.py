"""Where what a sidecar records differs from what would be made now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from slide2vec.cohort.identity import compatibility
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError
from slide2vec.images.dense_encoder import GridEncoder
from slide2vec.images.dense_images import dense_spacing
from slide2vec.images.dense_options import DenseImageOptions, DenseOptions
from slide2vec.images.pooled import ImageModel, image_identity
from slide2vec.images.reuse import differing_fields
from slide2vec.slides import Slide

__all__ = ["dense_identity_differences", "pooled_identity_differences"]

#: Of the tiles: known also where they were given by coordinates, not found.
_OF_GIVEN_TILES = ("requested_spacing_um", "requested_tile_size_px", "region_tile_multiple")


class TiledModel(ImageModel, Protocol):
    """A model that embeds slides, too."""

    def resolve_preprocessing(self, config: PreprocessingConfig | None = None) -> PreprocessingConfig: ...


def pooled_identity_differences(
    self: TiledModel,
    recorded: Mapping[str, Any],
    *,
    preprocessing: PreprocessingConfig | None,
    execution: ExecutionOptions | None = None,
    encoded_pixels: bool = True,
) -> dict[str, tuple[Any, Any]]:
    """Where the `compatibility` of a sidecar of tiles, slides or (preprocessing=None) ready images
    differs from what would be made now: {field: (recorded, current)}, `MISSING_FIELD` for one that is
    not recorded.
    What is of a single slide (its file, its spacing) is left out; the transform, too, where nothing was
    encoded (encoded_pixels=False)."""
    execution = execution or ExecutionOptions()
    if preprocessing is None:
        current = image_identity(self, execution)
        if not encoded_pixels:
            del current["transform"]
        return differing_fields(recorded, current)
    config = self.resolve_preprocessing(preprocessing)
    any_slide = Slide(sample_id="any", image_path=Path("any"))
    made = compatibility(any_slide, config, self.identity(execution, config.requested_tile_size_px), {})
    geometry = recorded.get("geometry")
    if isinstance(geometry, Mapping) and "coordinates" in geometry:
        made["geometry"] = {k: v for k, v in made["geometry"].items() if k in _OF_GIVEN_TILES}
    made["geometry"].pop("spacing_at_level_0", None)
    fields = dict(_leaves(made))
    if not encoded_pixels:
        fields = {name: value for name, value in fields.items() if "transform" not in name.split(".")}
    return differing_fields(dict(_leaves(recorded)), fields)


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Innermost values by their keys, "encoder.precision"."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def dense_identity_differences(
    self: ImageModel,
    recorded: Mapping[str, Any],
    *,
    dense: DenseOptions | DenseImageOptions,
    execution: ExecutionOptions | None = None,
) -> dict[str, tuple[Any, Any]]:
    """As `pooled_identity_differences`, of sidecars of dense features. Raises what making them would."""
    if not isinstance(dense, DenseOptions | DenseImageOptions):
        raise ConfigError(f"dense must be DenseOptions or DenseImageOptions, got {type(dense).__name__}")
    execution = execution or ExecutionOptions()
    if isinstance(dense, DenseImageOptions):
        dense_spacing(self, dense)
    encoder = GridEncoder(self, dense, execution, "dense_identity_differences")
    return differing_fields(recorded, encoder.identity)
