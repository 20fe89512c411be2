"""Sound files of the other kinds."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NAME", "SHAPES", "Other", "make_others"]

#: Of the slide that they are of.
NAME = "sound"
#: Of the weights.
SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (16, 8), "a.bias": (16,), "b": (3, 3, 3)}


@dataclass(frozen=True)
class Other:
    """A kind of file.

    Attributes:
        files: that are damaged, in the folder of the kind.
        read: from a folder with the files to anything that `_plain` can compare.
        missed: whether a damaged one may just count as absent (None).
    """

    kind: str
    format: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    missed: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind} {self.format}".replace(" ", "-")


def make_others(folder: Path, others: Iterable[Other]) -> None:
    """Write the sound files of every kind into a folder each."""
    for other in others:
        (folder / other.name).mkdir(parents=True)
    for other in others:
        place = folder / other.name
        if other.kind in ("coordinates", "tile archive", "features"):
            _make_run(place, other.format if other.format != "json" else "npz")
        elif other.kind == "weights":
            _make_weights(place)
        elif other.kind == "engine":
            _make_engine(place / "engine")
    (folder / "manifest-csv" / "manifest.csv").write_text(_MANIFEST)
    (folder / "configuration-yaml" / "config.yaml").write_text(_CONFIG)
    _make_process_list(folder / "process-list-csv" / "process_list.csv")


_MANIFEST = """sample_id,image_path,mask_path,spacing_at_level_0,patient_id,stain
0007,/slides/0007.svs,,0.25,P1,H&E
b-2,/slides/b 2.svs,/masks/b-2.png,0.4990,P1,"H&E, old"
Ωmega,/slides/Ω.ndpi,,,P2,
c3,/slides/c3.dcm,,1,P3,IHC
"""

_CONFIG = """csv: /runs/slides.csv
output_dir: /runs/out
resume: true
seed: 3
model:
  name: virchow2
  batch_size: 64
tiling:
  backend: openslide
  params:
    requested_spacing_um: 0.5
    requested_tile_size_px: 224
    overlap: 0.25
    tissue_threshold: 0.1
  seg_params:
    method: otsu
    close: 4
  filter_params:
    a_t: 4
    filter_white: true
speed:
  precision: fp32
  num_workers: 4
"""


def _make_run(folder: Path, features: str) -> None:
    import torch

    from slide2vec.artifacts import write_tile_embeddings
    from slide2vec.config import FilterConfig
    from slide2vec.embedded import EmbeddedSlide
    from slide2vec.geometry import tile_geometry
    from slide2vec.tiling import Segmentation, Tiling
    from slide2vec.tiling.archives import write_archive
    from slide2vec.tiling.coordinates import write_coordinates
    from tools.fuzz.slides import picture

    side, count, downsamples = 64, 24, (1.0, 4.0)
    geometry = tile_geometry(
        requested_tile_size_px=side, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=downsamples
    )
    number = np.arange(count, dtype=np.int64)
    tiling = Tiling(
        sample_id=NAME,
        image_path=Path("/slides/sound.svs"),
        mask_path=None,
        spacing_at_level_0=None,
        backend="openslide",
        requested_backend="auto",
        dimensions=(700, 500),
        downsamples=downsamples,
        geometry=geometry,
        x=number // 4 * side,
        y=number % 4 * side,
        tissue_fractions=np.ones(count, np.float32),
        tissue_threshold=0.01,
        filtering=FilterConfig(ref_tile_size=side),
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=4, level=1, spacing_um=2.0
        ),
    )
    write_coordinates(folder, tiling)
    tiles = np.stack([picture()[y : y + side, x : x + side] for x, y in zip(tiling.x, tiling.y, strict=True)])
    write_archive(folder, tiling, [(number, tiles)])
    if features in ("pt", "npz", "safetensors", "h5"):
        values = torch.randn((count, 48), generator=torch.Generator().manual_seed(1))
        embedded = EmbeddedSlide(
            sample_id=NAME,
            tile_embeddings=values,
            slide_embedding=None,
            x=tiling.x,
            y=tiling.y,
            tile_size_lv0=side,
            image_path=tiling.image_path,
            mask_path=None,
            num_tiles=count,
        )
        encoder = {"name": "an-encoder", "level": "tile", "input_size_px": side}
        write_tile_embeddings(
            folder,
            embedded,
            tiling,
            file_format=features,  # type: ignore[arg-type]
            encoder=encoder,
            coordinates=write_coordinates(folder / "tiles", tiling),
        )


def _make_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(2)
    state = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    save_file(state, folder / "model.safetensors")
    torch.save({"state_dict": state}, folder / "model.pt")
    names = list(state)
    for part, keys in (("part-1.safetensors", names[:1]), ("part-2.safetensors", names[1:])):
        save_file({key: state[key] for key in keys}, folder / part)
    where = {key: "part-1.safetensors" if key in names[:1] else "part-2.safetensors" for key in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


_PARITY = {
    "min_cosine": 0.9999,
    "mean_cosine": 0.99995,
    "finite": True,
    "least": 0.999,
    "tiles": 64,
    "batch_sizes": [1, 16, 64],
}


def _make_engine(folder: Path) -> None:
    from slide2vec.runtime.base import BatchProfile
    from slide2vec.runtime.record import EngineRecord, key_of

    folder.mkdir()
    identity = {
        "encoder": "x",
        "weights": "0123",
        "device": {"type": "cuda", "name": "a GPU"},
        "libraries": {"torch": "2"},
    }
    (folder / "engine.bin").write_bytes(bytes(range(256)))
    record = EngineRecord(
        key=key_of(identity),
        identity=identity,
        preset="p",
        variant="v",
        runtime="tensorrt",
        precision="fp16",
        asked_precision="fp8",
        layout="uint8_nhwc",
        input_size_px=224,
        feature_dim=384,
        profile=BatchProfile(1, 16, 64),
        file="engine.bin",
        opset=18,
        parity=_PARITY,
        licence="Apache-2.0",
        versions={"tensorrt": "10"},
        built_at="2026-11-28T00:00:00Z",
        build_seconds=3.5,
        speed={"engine": 100.0, "torch": 90.0},
        steps_down=[{"precision": "fp8", "reason": "far"}],
        checksums={"engine.bin": hashlib.sha256(bytes(range(256))).hexdigest()},
    )
    (folder / "engine.json").write_text(record.as_json())


def _make_process_list(path: Path) -> None:
    from slide2vec.cohort.process_list import COLUMNS

    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        for number in range(6):
            done = number % 3
            table.writerow(
                {
                    "sample_id": f"slide-{number}",
                    "image_path": f"/slides/{number}.svs",
                    "num_tiles": 17 * number,
                    "tiling_status": "success" if done else "failed",
                    "feature_status": "success" if done else "error",
                    "error": "" if done else 'tile "3", damaged',
                    "traceback": "" if done else "line 1\nline 2",
                }
            )
