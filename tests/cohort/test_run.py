"""The loop of a cohort over a stand-in model: what is kept, what is told, who is blamed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec import EmbeddedSlide, ExecutionOptions, PreprocessingConfig, SlideOutcome
from slide2vec.cohort import embed_cohort
from slide2vec.config import FilterConfig
from slide2vec.errors import OutputError, SlideReadError
from slide2vec.geometry import tile_geometry
from slide2vec.progress import RunStarted, activate_progress_reporter, active_reporter
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlidePlan
from slide2vec.stream.slide_identity import Identities
from slide2vec.tiling import Segmentation, Tiling

GEOMETRY = tile_geometry(
    requested_tile_size_px=8, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1.0]
)
CONFIG = PreprocessingConfig(requested_tile_size_px=8, requested_spacing_um=0.5)


def tiling_of(slide: Slide) -> Tiling:
    return Tiling(
        sample_id=slide.sample_id,
        image_path=slide.image_path,
        mask_path=None,
        spacing_at_level_0=None,
        backend="made up",
        requested_backend="auto",
        dimensions=(100, 100),
        downsamples=(1.0,),
        geometry=GEOMETRY,
        x=np.arange(4) * 8,
        y=np.zeros(4, np.int64),
        tissue_fractions=np.ones(4, np.float32),
        tissue_threshold=0.01,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=0, spacing_um=32
        ),
        filtering=FilterConfig(ref_tile_size=8),
    )


class Embedder:
    """Gives every slide's number as its embedding; counts the results that are alive."""

    name, variant, level, upstream, has_latents = "made up", "default", "tile", None, False

    def __init__(self, fail: Callable[[Slide], Exception | None] = lambda slide: None) -> None:
        self.fail, self.alive, self.most = fail, 0, 0

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]:
        return {"name": "made up", "level": "tile", "input_size_px": 8, "precision": "fp32"}

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]:
        return ("cpu",)

    def confirm_weights(self) -> None:
        pass

    def embed_into(self, sink: Any, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        active_reporter().emit(RunStarted(len(slides), self.name))
        return self.embed_here(sink, slides)

    def embed_here(self, sink: Any, slides: Any) -> Generator[SlideOutcome, None, None]:
        with sink.planner() as planner:
            for outcome in self.outcomes(planner, slides):
                yield from sink.put(outcome)
                del outcome

    def outcomes(self, planner: Planner, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        for slide in slides:
            planned = planner.plan(slide)
            error = self.fail(slide)
            yield SlideOutcome(slide, error=error) if error else self.outcome(slide, planned)

    def outcome(self, slide: Slide, plan: SlidePlan) -> SlideOutcome:
        embeddings = torch.full((4, 3), float(slide.sample_id))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(embeddings, self.died)
        embedded = EmbeddedSlide(
            sample_id=slide.sample_id,
            tile_embeddings=embeddings,
            slide_embedding=None,
            x=plan.tiling.x,
            y=plan.tiling.y,
            tile_size_lv0=8,
            image_path=slide.image_path,
            mask_path=None,
            num_tiles=4,
        )
        return SlideOutcome(slide, embedded=embedded, tiling=plan.tiling, backend="made up")

    def died(self) -> None:
        self.alive -= 1


@pytest.fixture
def slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Slide]:
    """Slides whose files are there and whose plans are made up."""

    def plan(slide: Slide, *rest: Any) -> SlidePlan:
        source: Any = SimpleNamespace(backend="made up", blocks=[], close=lambda: None)
        return SlidePlan(slide, source, tiling_of(slide), identity=Identities(CONFIG).of(slide))

    monkeypatch.setattr("slide2vec.stream.planner.plan_slide", plan)
    made = []
    for number in range(40):
        path = tmp_path / f"{number}.svs"
        path.write_bytes(bytes([number]) * 100)
        made.append(Slide(sample_id=str(number), image_path=path))
    return made


def test_nothing_is_kept_once_it_is_on_disk(slides: list[Slide], tmp_path: Path) -> None:
    embedder = Embedder()
    result = embed_cohort(embedder, slides, CONFIG, ExecutionOptions(output_dir=tmp_path / "out"))
    gc.collect()
    assert len(result.tile_artifacts) == 40
    assert embedder.alive == 0
    assert embedder.most <= 5  # two to be written, one being written, one made, one handed over


def test_failures_keep_no_frames(slides: list[Slide], tmp_path: Path) -> None:
    held: list[weakref.ref[Any]] = []

    class Pixels:
        pass

    def fail(slide: Slide) -> Exception:
        pixels = Pixels()
        held.append(weakref.ref(pixels))
        try:
            try:
                raise ValueError("the library's")
            except ValueError as error:
                raise SlideReadError(f"slide {slide.sample_id}: bad") from error
        except SlideReadError as error:
            return error

    result = embed_cohort(Embedder(fail), slides, CONFIG, ExecutionOptions(output_dir=tmp_path / "out"))
    gc.collect()
    assert len(result.failed) == 40 and all(ref() is None for ref in held)
    text = result.process_list_path.read_text()
    assert text.count("ValueError: the library's") == 40 and text.count("Traceback") >= 40


def test_a_broken_device_ends_the_run_and_keeps_what_is_done(slides: list[Slide], tmp_path: Path) -> None:
    class Broken(Embedder):
        def outcomes(self, *args: Any) -> Generator[SlideOutcome, None, None]:
            for number, outcome in enumerate(super().outcomes(*args)):
                if number == 7:
                    raise RuntimeError("CUDA error")
                yield outcome

    execution = ExecutionOptions(output_dir=tmp_path / "out")
    with pytest.raises(RuntimeError, match="CUDA error"):
        embed_cohort(Broken(), slides, CONFIG, execution)
    assert embed_cohort(Embedder(), slides, CONFIG.updated(resume=True), execution).resumed == 7
    assert any("CUDA error" in path.read_text() for path in (tmp_path / "out/logs").iterdir())


def test_failing_callback_is_told(slides: list[Slide], tmp_path: Path) -> None:
    def callback(artifact: Any) -> None:
        raise RuntimeError(f"cannot upload {artifact.sample_id}")

    execution = ExecutionOptions(output_dir=tmp_path / "out")
    with pytest.raises(RuntimeError, match="cannot upload 0"):
        embed_cohort(Embedder(), slides, CONFIG, execution, on_slide_persisted=callback)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("write", "process-list"))
    ]


def test_full_disk_while_coordinates_are_written_is_the_runs_error(
    slides: list[Slide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OutputError("tiles/7.coordinates.npz cannot be written: No space left on device")

    class Streamed(Embedder):
        """As the stream does it: what planning raises is the slide's outcome."""

        def outcomes(self, planner: Planner, slides: Any) -> Any:
            for slide in slides:
                try:
                    planned = planner.plan(slide)
                except Exception as error:
                    yield SlideOutcome(slide, error=error)
                else:
                    yield self.outcome(slide, planned)

    monkeypatch.setattr("slide2vec.cohort.context.write_coordinates", full)
    with pytest.raises(OutputError, match=r"No space left on device\. 0 of 40 slides are complete in"):
        embed_cohort(Streamed(), slides, CONFIG, ExecutionOptions(output_dir=tmp_path / "out"))


def test_events_reach_an_installed_reporter(slides: list[Slide], tmp_path: Path) -> None:
    events: list[Any] = []
    reporter: Any = SimpleNamespace(emit=events.append, close=lambda: events.append("closed"))

    class Emitting(Embedder):
        def outcomes(self, *args: Any) -> Generator[SlideOutcome, None, None]:
            from slide2vec.progress import TilesEncoded

            active_reporter().emit(TilesEncoded(4))
            yield from super().outcomes(*args)

    with activate_progress_reporter(reporter):
        embed_cohort(Emitting(), slides, CONFIG, ExecutionOptions(output_dir=tmp_path / "out"))
        assert [type(event).__name__ for event in events] == ["RunStarted", "TilesEncoded"]
    assert events[-1] == "closed"
