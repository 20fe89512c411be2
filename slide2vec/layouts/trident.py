"""TRIDENT: `<mag>x_<size>px_<overlap>px_overlap/`, with `patches/<slide>_patches.h5`,
`features_<encoder>/<slide>.h5` and `slide_features_<encoder>/<slide>.h5`.

A `--job_dir` (trident/Processor.py), whose later tasks take what is there for done. `patch_size` is the side
in px at the target magnification, which is 10 / µm per px; sizes at level 0 follow from the ratio of
magnifications (trident/wsi_objects/WSIPatcher.py): these are written such that it gives the true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.formats import FeatureFile, coords_attributes, write_feature_file
from slide2vec.artifacts.places import Kind
from slide2vec.errors import ArtifactError
from slide2vec.files import atomic_path
from slide2vec.layouts.item import Item, name_elsewhere

__all__ = ["DTYPE", "EMPTY", "KINDS", "TOGETHER", "write"]

KINDS: Sequence[Kind] = ("tile", "slide")
DTYPE: Dtype | None = None
EMPTY = True
TOGETHER = False

#: trident/patch_encoder_models/load.py; its "ctranspath" has CHIEF's weights.
_ENCODERS: Mapping[tuple[str, int], str] = {
    ("chief-ctranspath", 768): "ctranspath",
    ("conch", 512): "conch_v1",
    ("conchv15", 768): "conch_v15",
    ("genbio-pathfm", 4608): "genbio-pathfm",
    ("gigapath", 1536): "gigapath",
    ("gpfm", 1024): "gpfm",
    ("h-optimus-0", 1536): "hoptimus0",
    ("h-optimus-1", 1536): "hoptimus1",
    ("hibou-l", 1024): "hibou_l",
    ("kaiko-b16", 768): "kaiko-vitb16",
    ("kaiko-b8", 768): "kaiko-vitb8",
    ("kaiko-l14", 1024): "kaiko-vitl14",
    ("kaiko-s16", 384): "kaiko-vits16",
    ("kaiko-s8", 384): "kaiko-vits8",
    ("keep", 768): "keep",
    ("lunit", 384): "lunit-vits8",
    ("midnight", 3072): "midnight12k",
    ("musk", 1024): "musk",
    ("openmidnight", 1536): "openmidnight",
    ("phikon", 768): "phikon",
    ("phikonv2", 1024): "phikon_v2",
    ("uni", 1024): "uni_v1",
    ("uni2", 1536): "uni_v2",
    ("virchow", 2560): "virchow",
    ("virchow2", 2560): "virchow2",
}
#: trident/slide_encoder_models/load.py
_SLIDE_ENCODERS: Mapping[tuple[str, int], str] = {
    ("chief", 768): "chief",
    ("feather", 512): "feather",
    ("feather-uni2", 512): "feather_uni_v2",
    ("gigapath-slide", 768): "gigapath",
    ("madeleine", 512): "madeleine",
    ("prism", 1280): "prism",
    ("titan", 768): "titan",
}


def write(items: Sequence[Item]) -> Path:
    """See `LayoutModule`."""
    (item,) = items
    attributes = _attributes(item)
    job = item.below(item.run) / _folder(attributes)
    tiles = item.kind == "tile"
    known = name_elsewhere(item, _ENCODERS if tiles else _SLIDE_ENCODERS)
    if tiles:
        coords = FeatureFile(
            name="coords", values=torch.from_numpy(item.coords), values_attributes=attributes
        )
        with atomic_path(job / "patches" / f"{item.sample_id}_patches.h5") as path:
            write_feature_file(path, coords, "h5")
    content = FeatureFile(
        name="features",
        values=item.values,
        coords=item.coords,
        values_attributes={"name": item.sample_id, "encoder": known},
        coords_attributes=attributes,
    )
    features = job / f"{'' if tiles else 'slide_'}features_{known}" / f"{item.sample_id}.h5"
    with atomic_path(features) as path:
        write_feature_file(path, content, "h5")
    return features


def _attributes(item: Item) -> Mapping[str, str | int | float]:
    """Those of TRIDENT's files; sizes that its patcher computes from them are the true ones."""
    ours = coords_attributes(item.tiles)
    found = {name: value for name, value in ours.items() if name not in ("patch_level", "downsample")}
    size, true = int(found["patch_size"]), item.tiles.geometry.tile_size_lv0
    ratio = (10 / float(found["target_magnification"])) / (10 / float(found["level0_magnification"]))
    if round(size * ratio) != true:
        raise ArtifactError(
            f"slide {item.name}: its tiles are {true} px at level 0, and TRIDENT would take them for "
            f"{round(size * ratio)} px: no magnification says it truly"
        )
    return found


def _folder(attributes: Mapping[str, str | int | float]) -> str:
    """As `--coords_dir` is by default."""
    magnification, size = float(attributes["target_magnification"]), attributes["patch_size"]
    return f"{magnification:g}x_{size}px_{attributes['overlap']}px_overlap"
