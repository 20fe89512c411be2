"""CLAM: `pt_files/<slide>.pt`, `h5_files/<slide>.h5`, `patches/<slide>.h5`.

The first two are a `--data_root_dir`/`feat_dir` (dataset_modules/dataset_generic.py), the last the
`--data_h5_dir` of extract_features_fp.py, of create_heatmaps.py and of stitching (wsi_core/wsi_utils.py).
`patch_size` is the side in px of `patch_level`, from which CLAM reads the slide with OpenSlide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.formats import FeatureFile, write_feature_file
from slide2vec.artifacts.places import Kind
from slide2vec.errors import ArtifactError
from slide2vec.files import atomic_path
from slide2vec.layouts.item import Item

__all__ = ["DTYPE", "EMPTY", "KINDS", "TOGETHER", "write"]

KINDS: Sequence[Kind] = ("tile",)
#: Its models are in float32, and take features as they are in the files.
DTYPE: Dtype | None = "fp32"
#: Its models fail on bags without instances.
EMPTY = False
TOGETHER = False


def write(items: Sequence[Item]) -> Path:
    """See `LayoutModule`."""
    (item,) = items
    place, name, attributes = item.below(item.output), item.sample_id, _attributes(item)
    content = FeatureFile(
        name="features", values=item.values, coords=item.coords, coords_attributes=attributes
    )
    tiles = FeatureFile(
        name="coords", values=torch.from_numpy(item.coords), values_attributes={"name": name, **attributes}
    )
    with atomic_path(place / "patches" / f"{name}.h5") as path:
        write_feature_file(path, tiles, "h5")
    with atomic_path(place / "h5_files" / f"{name}.h5") as path:
        write_feature_file(path, content, "h5")
    features = place / "pt_files" / f"{name}.pt"
    with atomic_path(features) as path:
        write_feature_file(path, content, "pt")
    return features


def _attributes(item: Item) -> Mapping[str, int | float]:
    """Size and level of the tiles, as they are read."""
    geometry, downsamples = item.tiles.geometry, item.tiles.downsamples
    level, size = geometry.read_level, geometry.read_tile_size_px
    side = size * downsamples[level] if level < len(downsamples) else float("nan")
    if not abs(side - geometry.tile_size_lv0) <= 1:  # rounding
        raise ArtifactError(
            f"slide {item.name}: its tiles are {geometry.tile_size_lv0} px at level 0, and {size} px at "
            f"level {level}, which CLAM would read, are {side:.1f}: no patch_size is right for CLAM; tile "
            "it anew"
        )
    return {"patch_size": size, "patch_level": level, "downsample": downsamples[level]}
