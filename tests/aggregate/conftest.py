"""Models whose tile encoder is quick; what is above it is real, with few blocks and random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slide2vec import Model

sys.path.insert(0, str(Path(__file__).parent))

from aggregate_helpers import QuickEncoder
from shallow import few_blocks


def with_quick_tiles(model: Model) -> Model:
    """The model with another encoder at its bottom."""
    tiles = model
    while tiles.upstream is not None:
        tiles = tiles.upstream
    tiles._encoder = tiles._tile_embedder.encoder = QuickEncoder(tiles.feature_dim)
    return model


@pytest.fixture(scope="session")
def tile_model() -> Model:
    return with_quick_tiles(Model.from_preset("scattering", device="cpu"))


@pytest.fixture(scope="session")
def patient_model() -> Model:
    options = {"weights": "random", "seed": 3, "allow_non_recommended_settings": True}
    with few_blocks():
        return with_quick_tiles(Model.from_preset("moozy", device="cpu", **options))


@pytest.fixture(scope="session")
def slide_model(patient_model: Model) -> Model:
    assert patient_model.upstream is not None
    return patient_model.upstream


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    """Three slides of several sizes at 0.25 µm/px, two levels."""
    folder = tmp_path_factory.mktemp("slides")
    sizes = (1024, 1280, 1536)
    return [
        generated_slide(folder / f"s{n}.svs", size_px=size, seed=n, levels=2) for n, size in enumerate(sizes)
    ]


@pytest.fixture(scope="session")
def blank_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide without tissue."""
    import tifffile

    path = tmp_path_factory.mktemp("blank") / "blank.tiff"
    white = np.full((1024, 1024, 3), 244, np.uint8)
    resolution = (1e4 / 0.5, 1e4 / 0.5)
    with tifffile.TiffWriter(path) as file:
        file.write(
            white,
            tile=(256, 256),
            photometric="rgb",
            compression="adobe_deflate",
            resolution=resolution,
            resolutionunit="CENTIMETER",
        )
    return path
