"""Writes the files of each slide as it is complete, in a thread beside the encoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from slide2vec.artifacts import (
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    as_embedded,
    load_embeddings,
    load_stored,
    write_hierarchical_embeddings,
    write_slide_embedding,
    write_tile_embeddings,
)
from slide2vec.artifacts.writing import tiles_metadata
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.identity import encoder_identity
from slide2vec.cohort.record_events import OnSlideCompleted, SlideCompleted, without_patient
from slide2vec.cohort.results import Artifact, Stage
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import Slide2VecError, SlideError
from slide2vec.files import remove
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome

__all__ = ["OnPersisted", "SlideWriter", "WriterThread"]

#: Of a sidecar of tiles, what those of slides and patients keep.
_KEPT = (
    *("image_path", "mask_path", "encoder_input_size_px", "backend", "tile_size_lv0", "read_tile_size_px"),
    *("requested_tile_size_px", "requested_spacing_um", "coordinates_npz_path", "coordinates_meta_path"),
    *("tiles_tar_path", "skipped_tiles", "num_tiles", "remarks"),
)


@dataclass(frozen=True)
class _Tiles:
    """A slide whose tiles are embedded, and what sidecars say of them; `identity` is that of its embedding,
    where the model makes one."""

    slide: Slide
    embedded: EmbeddedSlide
    metadata: Mapping[str, Any]
    identity: Mapping[str, Any] | None


class SlideWriter:
    """Writes what has been embedded, and records it. Used from one thread.

    Args:
        on_slide_completed: called with each slide that is complete or has failed.
    """

    def __init__(
        self, cohort: Cohort, embedder: Embedder, on_slide_completed: OnSlideCompleted = without_patient
    ) -> None:
        self._cohort, self._embedder, self._execution = cohort, embedder, cohort.execution
        self._folder, self._on_slide_completed = cohort.place.features, on_slide_completed

    def outcome(self, outcome: SlideOutcome) -> Iterator[Artifact]:
        """Write the files of a slide that is complete, or record why it failed.

        Raises:
            OutputError: a file cannot be written.
        """
        slide = outcome.slide
        planned = self._cohort.planned.get(slide.sample_id)
        if outcome.error is not None:
            yield from self._fail(slide, outcome.error, "tiling" if planned is None else "embedding")
            return
        assert planned is not None
        try:
            planned.files.check(slide)
        except SlideError as error:
            yield from self._fail(slide, error, "embedding")
            return
        made = None
        try:
            tiles = self._described(outcome)
            if "tile" in self._cohort.wanted or "hierarchical" in self._cohort.wanted:
                made = self._write_tiles(tiles, outcome)
        except Slide2VecError as error:
            yield from self._fail(slide, error, "embedding")
            return
        if made is not None:
            yield made
        yield from self._above(tiles)

    def stored_tiles(self, slide: Slide, artifact: TileEmbeddingArtifact) -> Iterator[Artifact]:
        """As `outcome`, for a slide whose tile embeddings an earlier run has written."""
        try:
            stored = load_stored(artifact)
            embedded = as_embedded(slide, stored)
        except Slide2VecError as error:
            yield from self._fail(slide, error, "aggregation")
            return
        self._cohort.describe(slide.sample_id, stored.metadata)
        if "tile" in self._cohort.wanted:
            self._cohort.recorder.add("tile", slide.sample_id, artifact)
        metadata = {key: value for key, value in stored.metadata.items() if key in _KEPT}
        yield from self._above(_Tiles(slide, embedded, metadata, self._of_slide(stored.metadata)))

    def stored_embedding(self, slide: Slide, artifact: SlideEmbeddingArtifact) -> Iterator[Artifact]:
        """As `outcome`, for a slide of a patient whose slide embedding an earlier run has written."""
        try:
            recorded = artifact.metadata
            embedding = load_embeddings(artifact.path).float()
        except Slide2VecError as error:
            yield from self._fail(slide, error, "aggregation")
            return
        self._cohort.describe(slide.sample_id, recorded)
        if "slide" in self._cohort.wanted:
            self._cohort.recorder.add("slide", slide.sample_id, artifact)
        metadata = {key: recorded[key] for key in _KEPT if key in recorded}
        yield from self._on_slide_completed(
            SlideCompleted(slide, embedding, metadata=metadata, identity=recorded.get("compatibility"))
        )

    def _fail(
        self, slide: Slide, error: Exception, stage: Stage, identity: Mapping[str, Any] | None = None
    ) -> Iterator[Artifact]:
        """Record a slide's failure, for its patient, too."""
        identity = identity or self._cohort.identity_of_failed(slide)
        self._cohort.fail(slide, error, stage)
        yield from self._on_slide_completed(SlideCompleted(slide, error=error, identity=identity))

    def _of_slide(self, metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The identity of a slide's embedding that is made from recorded tiles: theirs, with its encoder."""
        encoder = self._cohort.identities.get("slide")
        recorded = metadata.get("compatibility")
        if encoder is None or not isinstance(recorded, Mapping):
            return None
        return {**recorded, "encoder": encoder_identity(encoder)}

    # tiles ------------------------------------------------------------------------------------------

    def _described(self, outcome: SlideOutcome) -> _Tiles:
        name, embedded, tiling = outcome.slide.sample_id, outcome.embedded, outcome.tiling
        planned = self._cohort.planned[name]
        assert embedded is not None and tiling is not None
        coordinates: tuple[Path | None, Path] = planned.coordinates
        if len(tiling) < planned.tiles:
            coordinates = npz, meta = self._cohort.write_coordinates(tiling, planned.files)
            self._cohort.recorder.note(name, coordinates_npz_path=npz, coordinates_meta_path=meta)
        skipped = [asdict(bad) for bad in outcome.skipped]
        identity = self._cohort.identities.get(self._cohort.tiles_kind, {})
        metadata = tiles_metadata(embedded, tiling, identity, coordinates, outcome.tiles_tar_path, skipped)
        return _Tiles(outcome.slide, embedded, metadata, planned.compatibility.get("slide"))

    def _write_tiles(self, tiles: _Tiles, outcome: SlideOutcome) -> Artifact:
        cohort, name = self._cohort, tiles.slide.sample_id
        assert outcome.tiling is not None
        kind = cohort.tiles_kind
        remove(self._folder / "preview" / "map" / f"{name}.png")  # of other embeddings
        write = write_hierarchical_embeddings if kind == "hierarchical" else write_tile_embeddings
        artifact = write(
            self._folder,
            tiles.embedded,
            outcome.tiling,
            file_format=self._execution.output_format,
            encoder=cohort.identities[kind],
            compatibility=cohort.planned[name].compatibility[kind],
            coordinates=(tiles.metadata["coordinates_npz_path"], tiles.metadata["coordinates_meta_path"]),
            tiles_tar_path=outcome.tiles_tar_path,
            skipped_tiles=tiles.metadata["skipped_tiles"],
        )
        cohort.recorder.add(kind, name, artifact)
        return artifact

    # slides -----------------------------------------------------------------------------------------

    def _above(self, tiles: _Tiles) -> Iterator[Artifact]:
        """What comes after the tiles of a slide."""
        cohort, slide = self._cohort, tiles.slide
        cohort.tiles_done(slide.sample_id, tiles.metadata)
        if cohort.kind in ("tile", "hierarchical"):
            return
        made = None
        try:
            embedded = self._embedder.aggregated(tiles.embedded, latents=self._execution.save_latents)
            if embedded.slide_embedding is not None and "slide" in cohort.wanted:
                made = self._write_slide(tiles, embedded)
        except Slide2VecError as error:
            yield from self._fail(slide, error, "aggregation", tiles.identity)
            return
        if embedded.slide_embedding is None:
            cohort.recorder.note(slide.sample_id, aggregation_status="skipped")
        elif made is not None:
            yield made
        yield from self._on_slide_completed(
            SlideCompleted(slide, embedded.slide_embedding, metadata=tiles.metadata, identity=tiles.identity)
        )

    def _write_slide(self, tiles: _Tiles, embedded: EmbeddedSlide) -> Artifact:
        cohort, name = self._cohort, tiles.slide.sample_id
        assert embedded.slide_embedding is not None and tiles.identity is not None
        dtype = getattr(torch, self._execution.vector_dtype)
        artifact = write_slide_embedding(
            self._folder,
            name,
            embedded.slide_embedding.to(dtype),
            file_format=self._execution.output_format,
            encoder=cohort.identities["slide"],
            metadata=tiles.metadata,
            compatibility=tiles.identity,
            latents=None if embedded.latents is None else embedded.latents.to(dtype),
        )
        cohort.recorder.add("slide", name, artifact)
        if cohort.kind == "slide":
            cohort.recorder.note(name, aggregation_status="success", feature_path=artifact.path)
        return artifact


#: Slides that may wait to be written while the next ones are encoded.
_UNWRITTEN = 2

OnPersisted = Callable[[Artifact], None]


class WriterThread:
    """Publishes in a thread of its own, so that the encoder waits neither for the disk nor for what comes
    after its tiles."""

    def __init__(self, on_persisted: OnPersisted | None) -> None:
        self._on_persisted = on_persisted
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._unwritten: deque[Future[None]] = deque()

    def put(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        """Hand over what writes files; waits while `_UNWRITTEN` others are not complete yet.

        Raises what an earlier one has raised.
        """
        while len(self._unwritten) >= _UNWRITTEN:
            self._unwritten.popleft().result()
        self._unwritten.append(self._pool.submit(self._run, publish))

    def _run(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        for artifact in publish():
            if self._on_persisted is not None:
                self._on_persisted(artifact)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._unwritten:
                future.result()
