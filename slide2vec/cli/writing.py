"""Embed slides and write each one's files the moment it is complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.artifacts import write_tile_embeddings
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import Slide2VecError
from slide2vec.pictures import pca_map, write_picture
from slide2vec.progress import (
    NullReporter,
    ProgressEvent,
    ProgressReporter,
    RunFinished,
    RunSummary,
    activate_progress_reporter,
    in_terminal,
)
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import write_coordinates
from slide2vec.tiling.previews import thumbnail

if TYPE_CHECKING:
    from slide2vec.model import Model
    from slide2vec.stream import SlideOutcome

__all__ = ["Made", "Report", "embed_and_write"]

logger = logging.getLogger(__name__)

#: Longer side of a PCA map.
MAP_PX = 2048


@dataclass(frozen=True, kw_only=True)
class Made:
    """The files of one embedded slide; None where there is none."""

    sample_id: str
    image_path: Path
    num_tiles: int
    backend: str | None
    embeddings_path: Path
    metadata_path: Path
    coordinates_npz_path: Path | None
    coordinates_meta_path: Path
    mask_preview_path: Path | None
    tiling_preview_path: Path | None
    map_path: Path | None


@dataclass(frozen=True)
class Report:
    """What a run made: files, failures by slide (both in the order of the slides), and its summary."""

    made: list[Made]
    failed: list[tuple[Slide, Exception]]
    summary: RunSummary | None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: `slides`, `failed`, `summary`."""
        failed = [
            {
                "sample_id": slide.sample_id,
                "image_path": slide.image_path,
                "error_type": type(error).__name__,
                "error": str(error),
            }
            for slide, error in self.failed
        ]
        summary = None if self.summary is None else _summary_json(self.summary)
        return {"slides": [asdict(made) for made in self.made], "failed": failed, "summary": summary}


def _summary_json(summary: RunSummary) -> dict[str, Any]:
    stations = [
        {**asdict(station), "utilisation": station.utilisation(summary.seconds)}
        for station in summary.stations
    ]
    return {**asdict(summary), "tiles_per_second": summary.tiles_per_second, "stations": stations}


class _Recorder:
    """Keeps the summary of a run and passes every event on."""

    def __init__(self, inner: ProgressReporter) -> None:
        self._inner = inner
        self.summary: RunSummary | None = None

    def emit(self, event: ProgressEvent) -> None:
        if isinstance(event, RunFinished):
            self.summary = event.summary
        self._inner.emit(event)

    def close(self) -> None:
        self._inner.close()


def _live_display() -> ProgressReporter:
    """Live progress in a terminal; the summary is left to the report."""
    if not in_terminal():
        return NullReporter()
    from slide2vec.progress.live import LiveReporter

    return LiveReporter(summary=False)


def embed_and_write(
    model: Model,
    slides: Sequence[Slide],
    preprocessing: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    draw_map: bool = False,
) -> Report:
    """Embed slides; write embeddings, coordinates and pictures under `execution.output_dir`.

    A slide that fails is recorded and the others go on.

    Raises:
        OSError: a file cannot be written; the run stops.
    """
    assert execution.output_dir is not None
    made: list[Made] = []
    failed: list[tuple[Slide, Exception]] = []
    recorder = _Recorder(_live_display())
    with (
        activate_progress_reporter(recorder),
        # closed at once when a file cannot be written: its threads would keep the process alive
        closing(model.iter_slides(slides, preprocessing, execution)) as outcomes,
    ):
        for outcome in outcomes:
            if outcome.error is not None:
                failed.append((outcome.slide, outcome.error))
            else:
                made.append(_write(model, outcome, execution, draw_map))
    place = {slide.sample_id: index for index, slide in enumerate(slides)}
    made.sort(key=lambda item: place[item.sample_id])
    failed.sort(key=lambda item: place[item[0].sample_id])
    return Report(made, failed, recorder.summary)


def _write(model: Model, outcome: SlideOutcome, execution: ExecutionOptions, draw_map: bool) -> Made:
    output_dir, embedded, tiling = execution.output_dir, outcome.embedded, outcome.tiling
    assert output_dir is not None and embedded is not None and tiling is not None
    coordinates = write_coordinates(output_dir / "tiles", tiling)
    encoder = model.identity(execution.precision)
    artifact = write_tile_embeddings(
        output_dir,
        embedded,
        tiling,
        file_format=execution.output_format,
        encoder=encoder,
        compatibility={"image_path": embedded.image_path, "encoder": encoder},
        coordinates=coordinates,
    )
    return Made(
        sample_id=embedded.sample_id,
        image_path=embedded.image_path,
        num_tiles=embedded.num_tiles,
        backend=outcome.backend,
        embeddings_path=artifact.path,
        metadata_path=artifact.metadata_path,
        coordinates_npz_path=coordinates[0],
        coordinates_meta_path=coordinates[1],
        mask_preview_path=embedded.mask_preview_path,
        tiling_preview_path=embedded.tiling_preview_path,
        map_path=_write_map(outcome, output_dir) if draw_map else None,
    )


def _write_map(outcome: SlideOutcome, output_dir: Path) -> Path | None:
    """Draw the PCA map of a slide; a picture that cannot be drawn costs no embeddings."""
    embedded, tiling = outcome.embedded, outcome.tiling
    assert embedded is not None and tiling is not None
    path = output_dir / "preview" / "map" / f"{embedded.sample_id}.png"
    try:
        with open_slide(outcome.slide, tiling.backend) as reader:
            background = thumbnail(reader, max(reader.dimensions) / MAP_PX)
    except Slide2VecError as error:
        logger.warning("slide %s: no map: %s", embedded.sample_id, error)
        return None
    picture = pca_map(
        embedded.tile_embeddings.float().numpy(),
        embedded.x,
        embedded.y,
        embedded.tile_size_lv0,
        tiling.dimensions,
        background,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_picture(path, picture)
