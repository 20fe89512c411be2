"""Models for workers, processes of their own, which import them from here; and what tests of them compare."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import nn

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, RunResult
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.readers import decoders
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan

#: Sides of the slides of a cohort, px.
SIZES = (768, 2048, 1024, 1536, 1280, 1024)


def planning_by(sink: Any, plan: Callable[[Slide, Callable[[Slide], SlidePlan]], SlidePlan]) -> Any:
    """The sink, with a planner of which `plan` has the last word; that is given the planner's own."""
    planner = sink.planner()
    planner.plan = partial(plan, plan=planner.plan)
    sink.planner = lambda: planner
    return sink


class Deadly(Model):
    """Dies of slides called "deadly…", and once of those that have a file `<image_path>.once`."""

    def embed_here(self, sink: Any, slides: Any) -> Generator[Any, None, None]:
        def deadly(slide: Slide, plan: Callable[[Slide], SlidePlan]) -> SlidePlan:
            once = Path(f"{slide.image_path}.once")
            if slide.sample_id.startswith("deadly") or once.exists():
                once.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return plan(slide)

        return super().embed_here(planning_by(sink, deadly), slides)


class Counting(Deadly):
    """Loaded in a worker, it has that write a byte for each compressed tile that it decodes."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        folder = os.environ.get("SLIDE2VEC_TEST_FOLDER")
        if os.environ.get("SLIDE2VEC_CPUS") and folder and not hasattr(decoders, "uncounted"):
            decode = vars(decoders)["uncounted"] = decoders.decode_tile
            count = os.open(Path(folder) / f"{os.getpid()}.decoded", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

            def counted(*args: Any, **options: Any) -> Any:
                os.write(count, b".")
                return decode(*args, **options)

            decoders.decode_tile = counted
        return super().from_preset(*args, **options)


class Breaking(Counting):
    """Breaks off, as an encoder does, when slide s1 is complete while there is a file "broken" beside it."""

    def embed_here(self, sink: Any, slides: Any) -> Generator[Any, None, None]:
        put = sink.put

        def breaking(outcome: Any) -> Any:
            slide = outcome.slide
            if slide.sample_id == "s1" and (slide.image_path.parent / "broken").exists():
                raise RuntimeError("the device is gone")
            return put(outcome)

        sink.put = breaking
        return super().embed_here(sink, slides)


class Different(Model):
    """In every process another."""

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]:
        return {**super().identity(execution, tile_size_px), "precision": f"of process {os.getpid()}"}


class Unloadable(Model):
    """Loads where the tests run, and not in workers."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        if os.environ.get("SLIDE2VEC_CPUS"):
            raise ValueError("no such weights here")
        return super().from_preset(*args, **options)


class Scarce(Deadly):
    """Loads in two workers, and in no more, as if the rest of the memory were taken."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        folder = os.environ.get("SLIDE2VEC_TEST_FOLDER")
        if os.environ.get("SLIDE2VEC_CPUS") and folder:
            (Path(folder) / f"{os.getpid()}.loads").touch()
            if len(list(Path(folder).glob("*.loads"))) > 2:
                raise RuntimeError("out of memory")
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
        with patch("slide2vec.encoders.preset_chain._build", lambda *args: nn.Identity()):
            model: Any = super().from_preset(*args, **options)
        each = model
        while each is not None:
            each._encoder = {"tile": Tiles, "slide": Slides, "patient": Patients}[each.level]()
            each._tile_embedder.encoder, each = each._encoder, each.upstream
        return model


class Waiting(Model):
    """After its first slide it waits for a second process; each leaves a file beside the slides."""

    def embed_here(self, sink: Any, slides: Any) -> Generator[Any, None, None]:
        def waiting(slide: Slide, plan: Callable[[Slide], SlidePlan]) -> SlidePlan:
            folder = slide.image_path.parent
            first = not list(folder.glob("*.here"))
            (folder / f"{os.getpid()}.here").touch()
            deadline = time.monotonic() + 120
            while not first and len(list(folder.glob("*.here"))) < 2:
                if time.monotonic() > deadline:
                    raise TimeoutError("no other process came")
                time.sleep(0.05)
            return plan(slide)

        return super().embed_here(planning_by(sink, waiting), slides)


class OnGpus(Model):
    """Takes the CPU for the GPU that Ray has given it, and leaves a file named after that and its CPUs."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        folder = os.environ.get("SLIDE2VEC_TEST_FOLDER")
        if options.get("device") == "cuda:0" and folder:
            mine = f"gpu {os.environ['CUDA_VISIBLE_DEVICES']}, cpus {os.environ['SLIDE2VEC_CPUS']}"
            (Path(folder) / mine).touch()
            options["device"] = "cpu"
        return super().from_preset(*args, **options)


class Unshared(Model):
    """In workers, the directory that the run has locked looks as if it were another one."""

    @classmethod
    def from_preset(cls, *args: Any, **options: Any) -> Self:
        if os.environ.get("SLIDE2VEC_CPUS"):
            from slide2vec.scale import ray_worker

            ray_worker.LOCK_NAME = "not there"
        return super().from_preset(*args, **options)


def end_workers(model: Model) -> None:
    for pools in model._pools.values():
        while pools:
            pools.pop().close()


def same(found: EmbeddedSlide, expected: EmbeddedSlide) -> None:
    assert (found.sample_id, found.num_tiles) == (expected.sample_id, expected.num_tiles)
    assert torch.equal(found.tile_embeddings, expected.tile_embeddings)
    assert (found.x == expected.x).all() and (found.y == expected.y).all()


def rows(result: RunResult) -> list[dict[str, str]]:
    """Of the process list, without what is the directory's or the stack's."""
    folder = str(result.process_list_path.parent)
    with result.process_list_path.open() as file:
        return [
            {name: value.replace(folder, "OUT") for name, value in row.items() if name != "traceback"}
            for row in csv.DictReader(file)
        ]


def files(result: RunResult) -> set[str]:
    folder = result.process_list_path.parent
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("logs")}


def same_on_disk(found: RunResult, expected: RunResult) -> None:
    assert files(found) == files(expected)
    assert rows(found) == rows(expected)
    assert len(found.tile_artifacts) == len(SIZES)
    for one, other in zip(found.tile_artifacts, expected.tile_artifacts, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
        assert one.metadata["compatibility"] == other.metadata["compatibility"]


class Recorder:
    """Keeps events, and does something at each."""

    def __init__(self, at: Callable[[Any], None] = lambda event: None) -> None:
        self.events: list[Any] = []
        self._at = at

    def emit(self, event: Any) -> None:
        self.events.append(event)
        self._at(event)

    def close(self) -> None:
        pass
