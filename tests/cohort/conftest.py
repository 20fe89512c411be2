"""A cohort of small generated slides, and its embeddings in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slide2vec import Model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model() -> Model:
    return Model.from_preset("scattering", device="cpu")


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    """Six slides of 1,536 px at 0.25 µm/px: a dozen tiles each; the last is blank glass."""
    import numpy as np
    import tifffile

    folder = tmp_path_factory.mktemp("cohort")
    made = [generated_slide(folder / f"s{n}.svs", size_px=1536, seed=n, levels=1) for n in range(5)]
    blank = folder / "s5.tiff"
    glass = np.full((1024, 1024, 3), 245, np.uint8)
    resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}  # 0.25 µm/px
    tifffile.imwrite(blank, glass, tile=(256, 256), photometric="rgb", **resolution)
    return [*made, blank]


@pytest.fixture(scope="session")
def manifest(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "slides.csv"
    path.write_text("sample_id,image_path\n" + "".join(f"{p.stem},{p}\n" for p in slides))
    return path
