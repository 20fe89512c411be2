"""One run for the tests of this folder, which import `layout_helpers`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from layout_helpers import SIDE, tiled, write

from slide2vec.tiling import Tiling


@pytest.fixture(scope="session")
def slide(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated_slide(tmp_path_factory.mktemp("slides") / "a.svs", size_px=1500, seed=3, levels=2)


@pytest.fixture(scope="session")
def tiling(slide: Path) -> Tiling:
    found = tiled(slide, qc={"measure": True})
    assert (found.geometry.tile_size_lv0, found.geometry.read_tile_size_px) == (SIDE, SIDE)
    return found


@pytest.fixture(scope="session")
def run(tiling: Tiling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of uni: slide a, blank slide b, and class "tumor" of a."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, tiling)
    none = {name: getattr(tiling, name)[:0] for name in ("x", "y", "tissue_fractions")}
    write(folder, replace(tiling, sample_id="b", artefacts={}, **none))
    write(folder, replace(tiling, sample_id="tumor/a", annotation="tumor", strategy="independent"))
    return folder
