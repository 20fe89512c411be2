"""Pictures of several kinds and sizes, and a small encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from images_helpers import picture
from shallow import few_blocks

from slide2vec import Model


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images of other sizes and formats; the second is narrow, the third smaller than the input."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {
        "a.png": (300, 411),
        "b.jpg": (640, 260),
        "c.tif": (96, 120),
        "d.png": (224, 224),
        "e.jpeg": (251, 333),
    }
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        Image.fromarray(picture(height, width, seed)).save(folder / name)
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def model() -> Model:
    """A ViT of one block whose images are resized to 256 px and cropped to 224 px; not published so."""
    with few_blocks():
        return Model.from_preset("dinov2-vitb14", weights="random", device="cpu")
