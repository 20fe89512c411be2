"""Embed slides onto disk for the subcommands, with a map of each if asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.artifacts import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    load_embeddings,
)
from slide2vec.cli.console import note
from slide2vec.cohort.process_list import read_process_list
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import Slide2VecError
from slide2vec.files import as_path
from slide2vec.pictures import write_picture
from slide2vec.pipeline import Pipeline
from slide2vec.progress import (
    ProgressReporter,
    RunSummary,
    activate_progress_reporter,
)
from slide2vec.progress.lines import LineReporter
from slide2vec.progress.screen import in_terminal
from slide2vec.readers import open_slide
from slide2vec.slides import IdFrom, Slide
from slide2vec.tiling import load_coordinates
from slide2vec.tiling.slide_pictures import draw_embedding_map
from slide2vec.tiling.types import expand_regions

if TYPE_CHECKING:
    from slide2vec.cohort import RunResult
    from slide2vec.cohort.results import Artifact
    from slide2vec.model import Model
    from slide2vec.models import Models

__all__ = ["EmbeddedFiles", "Report", "embed_and_write", "failures_json", "live_display"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbeddedFiles:
    """The files of one embedded slide, and its tiles; None where there is none."""

    sample_id: str
    image_path: Path
    num_tiles: int
    num_regions: int | None
    backend: str | None
    embeddings_path: Path
    metadata_path: Path
    coordinates_npz_path: Path | None
    coordinates_meta_path: Path | None
    mask_preview_path: Path | None
    tiling_preview_path: Path | None
    map_path: Path | None


@dataclass(frozen=True)
class Report:
    """What a run made, for people and for scripts; of each encoder, where there are several."""

    made: list[EmbeddedFiles]
    result: RunResult
    encoders: Mapping[str, Report] = field(default_factory=dict)

    @property
    def patients(self) -> list[PatientEmbeddingArtifact]:
        return self.result.patient_artifacts

    @property
    def summary(self) -> RunSummary | None:
        return self.result.summary

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: `slides`, `failed`, `summary` and more."""
        summary = None if self.summary is None else _summary_json(self.summary)
        return {
            "slides": [asdict(made) for made in self.made],
            "patients": [asdict(patient) for patient in self.patients],
            "failed": failures_json(self.result),
            "failed_patients": [
                {"patient_id": failed.patient_id, "error": str(failed.error)}
                for failed in self.result.failed_patients
            ],
            "resumed": self.result.resumed,
            "recomputed": dict(self.result.recomputed),
            "without_tissue": list(self.result.without_tissue),
            "remarks": dict(self.result.remarks),
            "skipped_tiles": dict(self.result.skipped_tiles),
            "process_list_path": self.result.process_list_path,
            "summary": summary,
        }


def _summary_json(summary: RunSummary) -> dict[str, Any]:
    stations = [
        {**asdict(station), "utilisation": station.utilisation(summary.seconds)}
        for station in summary.stations
    ]
    return {**asdict(summary), **summary.bill(), "stations": stations}


def failures_json(result: RunResult) -> list[dict[str, Any]]:
    """The failed slides, JSON-ready."""
    return [
        {
            "sample_id": item.sample_id,
            "image_path": item.image_path,
            "stage": item.stage,
            "error_type": type(item.error).__name__,
            "error": str(item.error),
        }
        for item in result.failed
    ]


def live_display() -> ProgressReporter:
    """Live progress in a terminal, lines elsewhere; the summary is left to the report."""
    if not in_terminal():
        return LineReporter(note)
    from slide2vec.progress.live import LiveReporter

    return LiveReporter(summary=False)


def embed_and_write(
    model: Model | Models,
    slides: Sequence[Slide],
    preprocessing: PreprocessingConfig,
    execution: ExecutionOptions,
    *,
    manifest_path: Path | None = None,
    slides_dir: Path | None = None,
    id_from: IdFrom = "name",
    draw_map: bool = False,
) -> Report:
    """Run a pipeline with live progress; `manifest_path` is where the slides were read from, if they were,
    and `slides_dir` and `id_from` how."""
    given_as = {slide.sample_id: slide for slide in slides}

    def draw(artifact: Artifact) -> None:
        if isinstance(artifact, TileEmbeddingArtifact | HierarchicalEmbeddingArtifact):
            _write_map(artifact, given_as[artifact.sample_id])

    with activate_progress_reporter(live_display()):
        pipeline = Pipeline(model, preprocessing, execution)
        given = slides if manifest_path is None else None
        result = pipeline.run(
            given,
            manifest_path,
            slides_dir=slides_dir,
            id_from=id_from,
            on_slide_persisted=draw if draw_map else None,
        )
    rows = {row["feature_path"]: row for row in read_process_list(result.process_list_path)}
    encoders = {name: _report(each, rows) for name, each in result.encoders.items()}
    whole = _report(result, rows)
    return whole if not encoders else replace(whole, encoders=encoders)


def _report(result: RunResult, rows: Mapping[str, Mapping[str, str]]) -> Report:
    main = result.slide_artifacts or result.hierarchical_artifacts or result.tile_artifacts
    return Report([_made(artifact, rows.get(str(artifact.path), {})) for artifact in main], result)


def _made(
    artifact: TileEmbeddingArtifact | HierarchicalEmbeddingArtifact | SlideEmbeddingArtifact,
    row: Mapping[str, str],
) -> EmbeddedFiles:
    """From an artifact, and what the process list says of its pictures."""
    recorded, name = artifact.metadata, artifact.name
    npz, meta = recorded.get("coordinates_npz_path"), recorded.get("coordinates_meta_path")
    pictures = {kind: row.get(f"{kind}_preview_path") for kind in ("mask", "tiling")}
    drawn = {kind: as_path(path) if path else None for kind, path in pictures.items()}
    return EmbeddedFiles(
        sample_id=name,
        image_path=as_path(recorded["image_path"]),
        num_tiles=recorded["num_tiles"],
        num_regions=recorded.get("num_regions"),
        backend=recorded.get("backend"),
        embeddings_path=artifact.path,
        metadata_path=artifact.metadata_path,
        coordinates_npz_path=None if npz is None else as_path(npz),
        coordinates_meta_path=None if meta is None else as_path(meta),
        mask_preview_path=drawn["mask"],
        tiling_preview_path=drawn["tiling"],
        map_path=_if_there(_map_path(artifact.path, name)),
    )


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _map_path(embeddings: Path, name: str) -> Path:
    """Beside the folder of its embeddings."""
    return embeddings.parents[1 + name.count("/")] / "preview" / "map" / f"{name}.png"


def _write_map(artifact: TileEmbeddingArtifact | HierarchicalEmbeddingArtifact, slide: Slide) -> None:
    """Draw the PCA map of a slide; a picture that cannot be drawn costs no embeddings."""
    name = artifact.name
    try:
        folder = as_path(artifact.metadata["coordinates_meta_path"]).parent
        tiling = load_coordinates(folder, artifact.sample_id)
        if isinstance(artifact, HierarchicalEmbeddingArtifact):
            tiling = expand_regions(tiling, math.isqrt(artifact.tiles_per_region))
        with open_slide(slide, tiling.backend) as reader:
            embeddings = load_embeddings(artifact.path).float().flatten(0, -2).numpy()
            picture = draw_embedding_map(reader, tiling, embeddings, artifact.metadata["encoder_name"])
    except Slide2VecError as error:
        logger.warning("slide %s: no map: %s", name, error)
        return
    write_picture(_map_path(artifact.path, name), picture)
