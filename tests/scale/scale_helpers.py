"""Models for workers: processes of their own, which import them from here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from slide2vec import ExecutionOptions, Model
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan


class Deadly(Model):
    """Dies of slides called "deadly…", and once of those that have a file `<image_path>.once`."""

    def outcomes(
        self, slides: Any, config: Any, execution: Any, plan: Callable[[Slide], SlidePlan]
    ) -> Generator[Any, None, None]:
        def deadly(slide: Slide) -> SlidePlan:
            once = Path(f"{slide.image_path}.once")
            if slide.sample_id.startswith("deadly") or once.exists():
                once.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return plan(slide)

        return super().outcomes(slides, config, execution, deadly)


class Different(Model):
    """In every process another."""

    def identity(self, execution: ExecutionOptions | None = None) -> dict[str, Any]:
        return {**super().identity(execution), "precision": f"of process {os.getpid()}"}


class Unloadable(Model):
    """Loads where the tests run, and not in workers."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        if os.environ.get("SLIDE2VEC_CPUS"):
            raise ValueError("no such weights here")
        return super().from_preset(*args, **options)


class Tiles(nn.Module):
    """The mean colour of a tile, as the 384 numbers of its preset."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)).repeat(1, 128)


class Slides(nn.Module):
    """The mean tile."""

    def forward(self, bag: TileBag) -> SlideFeatures:
        return SlideFeatures(embedding=bag.features.mean(0).repeat(2), latents=bag.features[:2].clone())


class Patients(nn.Module):
    """The sum of slides."""

    def forward(self, slides: torch.Tensor) -> torch.Tensor:
        return slides.sum(0)


class Small(Model):
    """Of patients, with encoders that are quick."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        model = super().from_preset(*args, **options)
        model._encoder = {"tile": Tiles, "slide": Slides, "patient": Patients}[model.level]()
        return model
