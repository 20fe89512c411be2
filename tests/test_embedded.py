"""What embeddings show of themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from slide2vec.embedded import EmbeddedPatient, EmbeddedSlide, SlideAttention

CORNERS = np.zeros(2000, np.int64)
SLIDE = EmbeddedSlide(
    sample_id="a",
    tile_embeddings=torch.zeros(2000, 8),
    slide_embedding=None,
    x=CORNERS,
    y=CORNERS,
    tile_size_lv0=448,
    image_path=Path("/slides/a.svs"),
    mask_path=None,
    num_tiles=2000,
    annotation="tissue",
)


def test_in_one_line_by_shapes() -> None:
    """Not by their numbers, which fill the screen of whoever evaluates them in a notebook."""
    assert repr(SLIDE) == (
        "EmbeddedSlide(sample_id='a', num_tiles=2,000, tile_embeddings=<(2000, 8) float32>, "
        "slide_embedding=None, tile_size_lv0=448, image_path='/slides/a.svs')"
    )
    of_class = replace(SLIDE, annotation="tumor", slide_embedding=torch.zeros(3, dtype=torch.float16))
    assert "slide_embedding=<(3,) float16>" in repr(of_class) and "annotation='tumor'" in repr(of_class)
    patient = EmbeddedPatient(
        patient_id="p", patient_embedding=torch.zeros(4), slide_embeddings={"a": torch.zeros(3)}
    )
    assert repr(patient) == (
        "EmbeddedPatient(patient_id='p', patient_embedding=<(4,) float32>, slide_embeddings=<1>)"
    )
    attention = SlideAttention(
        sample_id="a", image_path=Path("a"), maps=torch.zeros(2000, 1, 4, 4), channels=((0, "class", None),),
        tile_embeddings=SLIDE.tile_embeddings, x=CORNERS, y=CORNERS, tile_size_lv0=448,
    )  # fmt: skip
    assert repr(attention).startswith(
        "SlideAttention(sample_id='a', maps=<(2000, 1, 4, 4) float32>, channels=<1>"
    )
