"""Files of slides and patients that are through: tiles, slide, and the patient with their last slide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slide2vec.artifacts import (
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    as_embedded,
    load_embeddings,
    load_stored,
    write_hierarchical_embeddings,
    write_patient_embedding,
    write_slide_embedding,
    write_tile_embeddings,
)
from slide2vec.artifacts.writing import about_tiles
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.finished import Artifact
from slide2vec.cohort.patients import Patient, Patients
from slide2vec.cohort.todo import Todo
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import PatientError, Slide2VecError
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome
from slide2vec.tiling import write_coordinates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Publisher"]

_WITHOUT_TISSUE = "no tissue: 0 tiles"
#: Of a sidecar of tiles, what those of slides and patients keep.
_KEPT = (
    *("image_path", "mask_path", "encoder_input_size_px", "backend", "tile_size_lv0", "read_tile_size_px"),
    *("requested_tile_size_px", "requested_spacing_um", "coordinates_npz_path", "coordinates_meta_path"),
    *("tiles_tar_path", "skipped_tiles", "num_tiles"),
)


@dataclass(frozen=True)
class _Tiles:
    """A slide whose tiles are embedded, and what sidecars say of them."""

    slide: Slide
    embedded: EmbeddedSlide
    about: Mapping[str, Any]


class Publisher:
    """Writes what has been embedded and keeps the cohort's books. Used from one thread."""

    def __init__(self, cohort: Cohort, embedder: Embedder, todo: Todo) -> None:
        self._cohort, self._embedder, self._execution = cohort, embedder, cohort.execution
        self._output_dir = cohort.output_dir
        self._patients = Patients(todo.in_progress()) if cohort.kind == "patient" else None
        #: What sidecars of patients say of each slide.
        self._about: dict[str, Mapping[str, Any]] = {}

    def outcome(self, outcome: SlideOutcome) -> Iterator[Artifact]:
        """Write the files of a slide that is through, or record why it failed.

        Raises:
            OutputError: a file cannot be written.
        """
        planned = self._cohort.planned.get(outcome.slide.sample_id)
        if outcome.error is not None:
            self._cohort.fail(outcome.slide, outcome.error, "tiling" if planned is None else "embedding")
            yield from self._settle(outcome.slide, error=outcome.error)
            return
        tiles = self._described(outcome)
        if "tile" in self._cohort.wanted or "hierarchical" in self._cohort.wanted:
            yield self._write_tiles(tiles, outcome)
        yield from self._above(tiles)

    def stored_tiles(self, slide: Slide, artifact: TileEmbeddingArtifact) -> Iterator[Artifact]:
        """As `outcome`, for a slide whose tile embeddings an earlier run has written."""
        try:
            stored = load_stored(artifact)
            embedded = as_embedded(slide, stored)
        except Slide2VecError as error:
            self._cohort.fail(slide, error, "aggregation")
            yield from self._settle(slide, error=error)
            return
        self._cohort.describe(slide.sample_id, stored.about)
        if "tile" in self._cohort.wanted:
            self._cohort.add("tile", slide.sample_id, artifact)
        about = {key: value for key, value in stored.about.items() if key in _KEPT}
        yield from self._above(_Tiles(slide, embedded, about))

    def stored_embedding(self, slide: Slide, artifact: SlideEmbeddingArtifact) -> Iterator[Artifact]:
        """As `outcome`, for a slide of a patient whose slide embedding an earlier run has written."""
        recorded = artifact.metadata
        self._cohort.describe(slide.sample_id, recorded)
        if "slide" in self._cohort.wanted:
            self._cohort.add("slide", slide.sample_id, artifact)
        self._about[slide.sample_id] = {key: recorded[key] for key in _KEPT if key in recorded}
        yield from self._settle(slide, load_embeddings(artifact.path).float())

    # tiles ------------------------------------------------------------------------------------------

    def _described(self, outcome: SlideOutcome) -> _Tiles:
        name, embedded, tiling = outcome.slide.sample_id, outcome.embedded, outcome.tiling
        planned = self._cohort.planned[name]
        assert embedded is not None and tiling is not None
        coordinates: tuple[Path | None, Path] = planned.coordinates
        if len(tiling) < planned.tiles:
            coordinates = npz, meta = write_coordinates(self._output_dir / "tiles", tiling.recorded)
            self._cohort.note(name, coordinates_npz_path=npz, coordinates_meta_path=meta)
        skipped = [asdict(bad) for bad in outcome.skipped]
        identity = self._cohort.identities.get(self._cohort.tiles_kind, {})
        about = about_tiles(embedded, tiling, identity, coordinates, outcome.tiles_tar_path, skipped)
        return _Tiles(outcome.slide, embedded, about)

    def _write_tiles(self, tiles: _Tiles, outcome: SlideOutcome) -> Artifact:
        cohort, name = self._cohort, tiles.slide.sample_id
        assert outcome.tiling is not None
        kind = cohort.tiles_kind
        write = write_hierarchical_embeddings if kind == "hierarchical" else write_tile_embeddings
        artifact = write(
            self._output_dir,
            tiles.embedded,
            outcome.tiling,
            file_format=self._execution.output_format,
            encoder=cohort.identities[kind],
            compatibility=cohort.planned[name].compatibility[kind],
            coordinates=(tiles.about["coordinates_npz_path"], tiles.about["coordinates_meta_path"]),
            tiles_tar_path=outcome.tiles_tar_path,
            skipped_tiles=tiles.about["skipped_tiles"],
        )
        cohort.add(kind, name, artifact)
        return artifact

    # slides -----------------------------------------------------------------------------------------

    def _above(self, tiles: _Tiles) -> Iterator[Artifact]:
        """What comes after the tiles of a slide."""
        cohort, slide = self._cohort, tiles.slide
        cohort.tiles_done(slide.sample_id, tiles.about)
        if cohort.kind in ("tile", "hierarchical"):
            return
        try:
            embedded = self._embedder.aggregated(tiles.embedded, latents=self._execution.save_latents)
        except Slide2VecError as error:
            cohort.fail(slide, error, "aggregation")
            yield from self._settle(slide, error=error)
            return
        self._about[slide.sample_id] = tiles.about
        if embedded.slide_embedding is None:
            cohort.note(slide.sample_id, aggregation_status="skipped", error=_WITHOUT_TISSUE)
        elif "slide" in cohort.wanted:
            yield self._write_slide(slide, embedded, tiles.about)
        yield from self._settle(slide, embedded.slide_embedding)

    def _write_slide(self, slide: Slide, embedded: EmbeddedSlide, about: Mapping[str, Any]) -> Artifact:
        cohort, name = self._cohort, slide.sample_id
        assert embedded.slide_embedding is not None
        dtype = getattr(torch, self._execution.vector_dtype)
        artifact = write_slide_embedding(
            self._output_dir,
            name,
            embedded.slide_embedding.to(dtype),
            file_format=self._execution.output_format,
            encoder=cohort.identities["slide"],
            metadata=about,
            compatibility=cohort.finished.compatibilities(slide)["slide"],
            latents=None if embedded.latents is None else embedded.latents.to(dtype),
        )
        cohort.add("slide", name, artifact)
        if cohort.kind == "slide":
            cohort.note(name, aggregation_status="success", feature_path=artifact.path)
        return artifact

    # patients ---------------------------------------------------------------------------------------

    def _settle(
        self, slide: Slide, embedding: Tensor | None = None, error: Exception | None = None
    ) -> Iterator[Artifact]:
        if self._patients is None:
            return
        patient = self._patients.settle(slide.sample_id, embedding, error)
        if patient is None:
            return
        try:
            made = self._patient_embedding(patient)
        except Slide2VecError as failure:
            self._cohort.fail_patient(patient, failure)
            return
        if made is None:
            self._cohort.note_patient(patient, aggregation_status="skipped")
        else:
            yield self._write_patient(patient, made)

    def _patient_embedding(self, patient: Patient) -> Tensor | None:
        """None for a patient without tissue."""
        if patient.failed and (self._execution.on_bad_slide == "fail" or not patient.embeddings):
            raise PatientError(
                f"patient {patient.patient_id}: {len(patient.failed)} of {len(patient.slides)} slides failed "
                f'({", ".join(patient.failed)}); on_bad_slide="skip" embeds patients from their other slides'
            ) from next(iter(patient.failed.values()))
        if not patient.embeddings:
            return None
        return self._embedder.patient_embedding(patient.in_order())

    def _write_patient(self, patient: Patient, embedding: Tensor) -> Artifact:
        cohort, names = self._cohort, [slide.sample_id for slide in patient.slides]
        artifact = write_patient_embedding(
            self._output_dir,
            patient.patient_id,
            embedding.to(getattr(torch, self._execution.vector_dtype)),
            num_slides=len(patient.embeddings),
            file_format=self._execution.output_format,
            encoder=cohort.identities["patient"],
            metadata={
                "slides": {name: self._about[name] for name in names if name in self._about},
                "slides_without_embedding": [name for name in names if name not in patient.embeddings],
                "skipped_slides": {name: str(error) for name, error in patient.failed.items()},
            },
            compatibility=cohort.finished.patient_compatibility(patient.slides),
        )
        for name in names:
            self._about.pop(name, None)
        cohort.add("patient", patient.patient_id, artifact)
        cohort.note_patient(patient, aggregation_status="success", feature_path=artifact.path)
        return artifact
