"""STAMP: `<encoder>/<slide>.h5`, `<encoder>-slide/<slide>.h5`, `<encoder>-pat/<patient>.h5`.

Each folder is a `feature_dir` (src/stamp/modeling/data.py, version 2.5): `feats`, and of tiles `coords` in
µm, `unit`, `tile_size_um`, `tile_size_px` (of a tile as it was encoded), `feat_type`. `stamp_version` is not
written: these are none of STAMP's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.formats import FeatureFile, write_feature_file
from slide2vec.artifacts.places import Kind
from slide2vec.files import atomic_path
from slide2vec.layouts.item import Item, name_elsewhere

__all__ = ["DTYPE", "EMPTY", "KINDS", "TOGETHER", "write"]

KINDS: Sequence[Kind] = ("tile", "slide", "patient")
DTYPE: Dtype | None = None
#: It writes none itself, and its training cannot take them.
EMPTY = False
TOGETHER = False

#: ExtractorName in src/stamp/preprocessing/config.py, by what each extractor gives: its slide encoders take
#: features by these names. Its virchow2 and virchow are class tokens only.
_EXTRACTORS: Mapping[tuple[str, int], str] = {
    ("chief-ctranspath", 768): "chief-ctranspath",
    ("conch", 512): "conch",
    ("conchv15", 768): "conch1_5",
    ("ctranspath", 768): "ctranspath",
    ("gigapath", 1536): "gigapath",
    ("h-optimus-0", 1536): "h-optimus-0",
    ("h-optimus-1", 1536): "h-optimus-1",
    ("keep", 768): "keep",
    ("mstar", 1024): "mstar",
    ("plip", 512): "plip",
    ("uni", 1024): "uni",
    ("uni2", 1536): "uni2",
    ("virchow", 1280): "virchow",
    ("virchow", 2560): "virchow-full",
    ("virchow2", 1280): "virchow2",
}
_OTHERS = ("dino-bloom", "musk", "red-dino", "ticon")
_ENDINGS = {"tile": "", "slide": "-slide", "patient": "-pat"}


def write(items: Sequence[Item]) -> Path:
    """See `LayoutModule`."""
    (item,) = items
    known = name_elsewhere(item, _EXTRACTORS, _OTHERS) if item.kind == "tile" else item.encoder
    content = _of_tiles(item, known) if item.kind == "tile" else _of_one(item, known)
    features = item.below(item.run) / f"{known}{_ENDINGS[item.kind]}" / f"{item.sample_id}.h5"
    with atomic_path(features) as path:
        write_feature_file(path, content, "h5")
    return features


def _of_tiles(item: Item, known: str) -> FeatureFile:
    """Coordinates and size are multiples of one µm/px of level 0, so that what divides them by the slide's
    µm/px gets the level-0 px of the run."""
    geometry = item.tiles.geometry
    return FeatureFile(
        name="feats",
        values=item.values,
        coords=(item.coords * geometry.base_spacing_um).astype(np.float32),
        file_attributes={
            "extractor": known,
            "unit": "um",
            "tile_size_um": geometry.tile_size_lv0 * geometry.base_spacing_um,
            "tile_size_px": geometry.requested_tile_size_px,
            "feat_type": "tile",
        },
    )


def _of_one(item: Item, known: str) -> FeatureFile:
    return FeatureFile(
        name="feats",
        values=item.values,
        file_attributes={"encoder": known, "feat_type": item.kind},
    )
