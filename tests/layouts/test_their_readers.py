"""Layouts of other tools, read by those tools themselves: LazySlide's wsidata, torchmil and kaiko-eva.

They are in no ordinary environment (lightning, numba, GDAL: 450 MB). The slow test puts them aside, in the
versions of uv.lock, and runs the others with them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from layout_helpers import SIDE, SIZE, SPACING, features, tiled, write
from packaging.requirements import Requirement
from uv import find_uv_bin

from slide2vec.artifacts import load_embeddings
from slide2vec.layouts import export_layout
from slide2vec.tiling import Tiling

ROOT = Path(__file__).parents[2]


def test_lazyslide(run: Path, tiling: Tiling, slide: Path, tmp_path: Path) -> None:
    wsidata = pytest.importorskip("wsidata")
    copied = tmp_path / "run"
    write(copied, tiling)
    write(copied / "encoders/conch", tiling, "conch", 512, tiles=copied)
    done, left = export_layout(copied, tmp_path / "out", "lazyslide")
    assert len(done) == 2 and not left
    wsi = wsidata.open_wsi(slide, store=str(tmp_path / "out"))
    spec = wsi.tile_spec("tiles")
    assert (spec.base_width, spec.ops_width, spec.base_stride_width) == (SIDE, SIDE, SIDE)
    for name in ("uni", "conch"):
        table = wsi.fetch.features_anndata(name, "tiles")
        place = copied if name == "uni" else copied / "encoders/conch"
        assert np.array_equal(table.X, load_embeddings(place / "tile_embeddings/a.pt"))
        assert np.array_equal(table.obsm["spatial"], np.stack([tiling.x, tiling.y], axis=1))
    tile = next(wsi.iter.tile_images("tiles"))
    x, y = int(tiling.x[0]), int(tiling.y[0])
    whole = openslide.open_slide(slide).read_region((x, y), 0, (SIDE, SIDE)).convert("RGB")
    encoded = cv2.resize(np.asarray(whole), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    assert np.array_equal(tile.image, encoded)
    _, refused = export_layout(copied, tmp_path / "out", "lazyslide")
    assert "is there already" in str(refused[0].error)


def test_lazyslide_refuses_steps_that_it_cannot_say(slide: Path, tmp_path: Path) -> None:
    pytest.importorskip("spatialdata")
    write(tmp_path / "run", tiled(slide, overlap=0.31))
    _, (refused,) = export_layout(tmp_path / "run", tmp_path / "out", "lazyslide")
    assert "none is right" in str(refused.error)


def test_torchmil(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    """Its graph joins tiles that touch; its coordinates are in tiles."""
    datasets = pytest.importorskip("torchmil.datasets")
    labels = tmp_path / "labels.csv"
    labels.write_text("name,label\na.svs,1\n")
    export_layout(run, tmp_path, "trident")
    (bag,) = datasets.TridentWSIDataset(
        f"{tmp_path}/{10 / SPACING:g}x_{SIZE}px_0px_overlap/",
        str(labels),
        "uni_v1",
        wsi_names=["a"],
        bag_keys=["X", "Y", "adj", "coords"],
        patch_size=SIDE,
        wsi_name_col="name",
        wsi_label_col="label",
    )
    assert np.array_equal(bag["X"], features(run)) and bag["Y"].tolist() == [1]
    grid = np.stack([tiling.x, tiling.y], axis=1) // SIDE
    assert np.array_equal(bag["coords"], grid)
    touch = (np.abs(grid[:, None] - grid[None]).max(axis=2) <= 1) & ~np.eye(len(grid), dtype=bool)
    assert np.array_equal(bag["adj"].to_dense().numpy() > 0, touch) and touch.sum() > 3 * len(grid)


def test_torchmil_of_clam(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchmil.datasets")
    export_layout(run, tmp_path, "clam")
    folder = str(tmp_path / "h5_files")
    (bag,) = datasets.ProcessedMILDataset(
        folder, coords_path=folder, bag_names=["a"], bag_keys=["X", "coords"], file_ext=".h5"
    )
    assert np.array_equal(bag["X"], features(run))
    assert np.array_equal(bag["coords"], np.stack([tiling.x, tiling.y], axis=1))


@pytest.mark.parametrize("folder", ["pt_files", "tile_embeddings"])
def test_eva(folder: str, run: Path, tmp_path: Path) -> None:
    """Of the layout of CLAM, and of a run as it is."""
    classification = pytest.importorskip("eva.core.data.datasets.classification")
    export_layout(run, tmp_path, "clam")
    root = tmp_path if folder == "pt_files" else run
    (tmp_path / "manifest.csv").write_text(f"wsi_id,embeddings,target,split\na,{folder}/a.pt,1,train\n")
    found = classification.MultiEmbeddingsClassificationDataset(
        root=str(root), manifest_file=str(tmp_path / "manifest.csv"), split="train"
    )
    found.setup()
    bag, target = found[0]
    assert len(found) == 1 and int(target) == 1 and np.array_equal(bag, features(run))


@pytest.mark.slow
def test_with_the_tools_themselves(tmp_path: Path) -> None:
    """What these tests need of the group other-tools, beside the packages that there are."""
    listed = subprocess.run(
        [find_uv_bin(), "export", "--frozen", "--only-group", "other-tools", "--no-hashes", "--no-header"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = [Requirement(line) for line in listed.splitlines() if re.match(r"\w", line)]
    # of the environment alone: setuptools, once imported, has packages of its own on the path
    installed = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    there = {re.sub(r"[-_.]+", "-", found.name).lower() for found in installed}
    lacking = [
        f"{each.name}{each.specifier}"
        for each in wanted
        if each.name not in there and (each.marker is None or each.marker.evaluate())
    ]
    aside = [find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "aside")]
    done = subprocess.run(
        [*aside, "--python", sys.executable, *lacking], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"packages of other tools cannot be had here: {done.stderr.strip()[-500:]}")
    ordinary = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    said = subprocess.run(
        [*ordinary, "tests/layouts/test_their_readers.py", "tests/test_frames.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "aside")},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert re.search(r"^\d+ passed(, 1 deselected)?(, \d+ warnings?)? in ", said, re.MULTILINE), said
