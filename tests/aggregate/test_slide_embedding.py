"""Slide and patient encoders keep to the CPU budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slide2vec.aggregate.patient_embedding import patient_embedding
from slide2vec.aggregate.slide_embedding import with_slide_embedding
from slide2vec.embedded import EmbeddedSlide
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.errors import SlideError

CPU = torch.device("cpu")


class OfSlide(nn.Module):
    """The mean; notes PyTorch's threads."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.fails = fails

    def forward(self, bag: TileBag) -> SlideFeatures:
        self.threads.append(torch.get_num_threads())
        if self.fails:
            raise RuntimeError("out of memory")
        return SlideFeatures(bag.features.mean(0))


class OfPatient(OfSlide):
    def forward(self, slides: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.threads.append(torch.get_num_threads())
        return slides.mean(0)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch set to more than the two of the budget."""
    monkeypatch.setenv("SLIDE2VEC_CPUS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def slide() -> EmbeddedSlide:
    return EmbeddedSlide(
        sample_id="a",
        tile_embeddings=torch.ones(4, 3),
        slide_embedding=None,
        x=np.arange(4),
        y=np.arange(4),
        tile_size_lv0=224,
        image_path=Path("a.svs"),
        mask_path=None,
        num_tiles=4,
        mask_preview_path=None,
        tiling_preview_path=None,
    )


@pytest.mark.usefixtures("three_threads")
def test_slide_and_patient_encoders_have_the_threads_of_the_budget() -> None:
    of_slide, of_patient = OfSlide(), OfPatient()
    found = with_slide_embedding(slide(), of_slide, CPU, preset="p")
    assert torch.equal(found.slide_embedding, torch.ones(3))  # type: ignore[arg-type]
    patient_embedding({"a": torch.ones(3)}, of_patient, CPU, preset="p")
    assert of_slide.threads == of_patient.threads == [2]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_are_put_back_after_a_slide_that_fails() -> None:
    encoder = OfSlide(fails=True)
    with pytest.raises(SlideError):
        with_slide_embedding(slide(), encoder, CPU, preset="p")
    assert encoder.threads == [2] and torch.get_num_threads() == 3
