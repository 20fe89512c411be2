"""Embeddings of slides and patients from tile embeddings on disk, without a slide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from slide2vec.aggregate.pooling import Aggregator, aggregate
from slide2vec.artifacts import (
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    StoredTiles,
    TileFeaturesLike,
    as_embedded,
    load_stored,
    write_patient_embedding,
    write_slide_embedding,
)
from slide2vec.artifacts.places import Kind, features_place, owners, with_output_dir
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError, ManifestError, ModelLevelError
from slide2vec.files import as_path
from slide2vec.labels import split_class_name
from slide2vec.recipes import Level
from slide2vec.slides import Slide

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["aggregate_tiles"]


class Aggregating(Protocol):
    """A model, as far as tiles on disk need it."""

    @property
    def upstream(self) -> Aggregating | None: ...

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def feature_dim(self) -> int: ...

    def identity(self, execution: ExecutionOptions | None = None) -> dict[str, Any]: ...

    def aggregated(self, embedded: EmbeddedSlide, *, latents: bool = False) -> EmbeddedSlide: ...

    def patient_embedding(self, slides: Mapping[str, Tensor]) -> Tensor: ...


def aggregate_tiles(
    self: Aggregating,
    tile_artifacts: Iterable[TileFeaturesLike],
    *,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    aggregator: Aggregator | None = None,
    patient_id_map: Mapping[str, str] | None = None,
) -> list[SlideEmbeddingArtifact] | list[PatientEmbeddingArtifact]:
    """Slide (or patient) embeddings from tile embeddings that are on disk, without reading a slide.

    Args:
        tile_artifacts: of `embed_tiles` or `Pipeline.run`; or what other tools wrote: paths, or
            `TileFeatures` that say where coordinates are and how large tiles are.
        preprocessing: not needed; accepted for symmetry.
        execution: its output_dir is where `slide_embeddings/` or `patient_embeddings/` goes.
        aggregator: instead of a slide encoder, for embeddings of any tile preset: "mean" or "max" over
            the tiles, or "top_tissue", the mean of the tiles with the most tissue.
        patient_id_map: sample_id -> patient_id, for patient-level models; else `TileFeatures` say it,
            else every slide is a patient of its own.

    Returns:
        An artifact per slide, in input order; of patient-level models one per patient, in order of
        first appearance.

    Raises:
        ModelLevelError: a tile-level model and no aggregator.
        ArtifactError: tile embeddings cannot be read or are not of the preset's tile encoder, or there
            are none (a slide without tissue).
        SlideError, PatientError: an encoder failed.
    """
    execution, _ = with_output_dir(execution, "aggregate_tiles")
    if aggregator is not None:
        return _pool_slides(tile_artifacts, aggregator, execution)
    if self.level == "slide":
        return _aggregate_slides(self, tile_artifacts, execution)
    if self.level == "patient":
        return _aggregate_patients(self, tile_artifacts, execution, patient_id_map)
    raise ModelLevelError(
        f"preset {self.name} is tile-level and has no slide encoder; "
        'aggregate_tiles(…, aggregator="mean"), "max" or "top_tissue" need none'
    )


def _pool_slides(
    given: Iterable[TileFeaturesLike], aggregator: Aggregator, execution: ExecutionOptions
) -> list[SlideEmbeddingArtifact]:
    """Slide embeddings by a statistic of the tiles, of whatever encoder these are.

    Raises:
        ConfigError: no such aggregator.
        ArtifactError: tile embeddings cannot be read, or there are none.
    """
    made = []
    folders = _Folders(execution)
    for stored in _loaded(given):
        identity = {"aggregator": aggregator}
        encoder = {"name": stored.metadata.get("encoder_name"), **identity}
        made.append(
            write_slide_embedding(
                folders.of("slide", encoder, stored),
                stored.sample_id,
                aggregate(stored.features, aggregator, stored.tissue_fractions),
                file_format=execution.output_format,
                encoder={"name": stored.metadata.get("encoder_name"), "level": "slide"},
                metadata={**_metadata(stored), **identity},
                compatibility=_compatibility(stored, identity),
            )
        )
    return made


def _aggregate_slides(
    model: Aggregating, given: Iterable[TileFeaturesLike], execution: ExecutionOptions
) -> list[SlideEmbeddingArtifact]:
    """Slide embeddings by the slide encoder of a model.

    Raises:
        ArtifactError: tile embeddings cannot be read, are not of the model's tile encoder, or there are none.
        SlideError: the slide encoder failed.
    """
    folders = _Folders(execution)
    return [
        _write_slide(model, stored, embedded, execution, folders)
        for stored, embedded in _aggregated(model, given, execution)
    ]


def _aggregate_patients(
    model: Aggregating,
    given: Iterable[TileFeaturesLike],
    execution: ExecutionOptions,
    patient_id_map: Mapping[str, str] | None,
) -> list[PatientEmbeddingArtifact]:
    """Patient embeddings by the slide and patient encoders of a model, in order of first appearance.

    Raises:
        ArtifactError, SlideError: as `_aggregate_slides`.
        PatientError: the patient encoder failed.
    """
    assert model.upstream is not None
    folders = _Folders(execution)
    patients: dict[str, dict[str, Tensor]] = {}
    identities: dict[str, dict[str, Any]] = {}
    for stored, embedded in _aggregated(model, given, execution):
        name = stored.sample_id
        assert embedded.slide_embedding is not None
        if execution.save_slide_embeddings:
            _write_slide(model.upstream, stored, embedded, execution, folders)
        whose = (patient_id_map or {}).get(name) or stored.patient_id or name
        patients.setdefault(whose, {})[name] = embedded.slide_embedding
        identities[name] = _compatibility(stored, _own_identity(model.upstream))
    folder = folders.of("patient", _own_identity(model), None)
    return [
        write_patient_embedding(
            folder,
            patient_id,
            model.patient_embedding(slides).to(getattr(torch, execution.vector_dtype)),
            num_slides=len(slides),
            file_format=execution.output_format,
            encoder=model.identity(),
            metadata={"slides": {name: {} for name in slides}},
            compatibility={
                "encoder": _own_identity(model),
                "slides": {name: identities[name] for name in slides},
            },
        )
        for patient_id, slides in patients.items()
    ]


def _aggregated(
    model: Aggregating, given: Iterable[TileFeaturesLike], execution: ExecutionOptions
) -> Iterator[tuple[StoredTiles, EmbeddedSlide]]:
    """Slides with their embedding, one after the other."""
    tiles = model
    while tiles.upstream is not None:
        tiles = tiles.upstream
    for stored in _loaded(given):
        _check_encoder(stored, tiles)
        image = stored.metadata.get("image_path")
        slide = Slide(
            sample_id=stored.sample_id,
            image_path=as_path(image) if image else stored.path,
            annotation=split_class_name(stored.sample_id)[0],
        )
        yield stored, model.aggregated(as_embedded(slide, stored), latents=execution.save_latents)


def _loaded(given: Iterable[TileFeaturesLike]) -> Iterator[StoredTiles]:
    """Raises ManifestError when two have one sample_id, ArtifactError for one without tiles."""
    seen: set[str] = set()
    for item in given:
        stored = load_stored(item)
        if stored.sample_id in seen:
            raise ManifestError(
                f"sample_id {stored.sample_id!r} appears twice: give TileFeatures(sample_id=…)"
            )
        seen.add(stored.sample_id)
        if not len(stored.features):
            raise ArtifactError(
                f"slide {stored.sample_id} has no tissue, so no tiles to aggregate: leave it out"
            )
        yield stored


def _check_encoder(stored: StoredTiles, tiles: Aggregating) -> None:
    recorded, dim = stored.metadata.get("encoder_name"), stored.features.shape[1]
    if recorded not in (None, tiles.name) or dim != tiles.feature_dim:
        what = recorded or f"an encoder of {dim} dimensions"
        raise ArtifactError(
            f"slide {stored.sample_id}: {stored.path} has tile embeddings of {what}; those of "
            f"{tiles.name}, of {tiles.feature_dim} dimensions, are needed"
        )
    made, needed = (
        _statistics(stored.metadata.get("compatibility")),
        _statistics({"encoder": tiles.identity()}),
    )
    if made and needed and made != needed:
        raise ArtifactError(
            f"slide {stored.sample_id}: the tiles of {stored.path} were normalised with mean and std {made}, "
            f"and this model is fed with {needed}: embed the slides with its own preset, which does that"
        )


def _statistics(compatibility: object) -> list[Any]:
    """Mean and standard deviation that a recorded identity names; empty where it names none."""
    encoder = compatibility.get("encoder") if isinstance(compatibility, Mapping) else None
    transform = encoder.get("transform") if isinstance(encoder, Mapping) else None
    return [transform.get("mean"), transform.get("std")] if isinstance(transform, Mapping) else []


def _write_slide(
    model: Aggregating,
    stored: StoredTiles,
    embedded: EmbeddedSlide,
    execution: ExecutionOptions,
    folders: _Folders,
) -> SlideEmbeddingArtifact:
    assert embedded.slide_embedding is not None
    dtype = getattr(torch, execution.vector_dtype)
    return write_slide_embedding(
        folders.of("slide", _own_identity(model), stored),
        stored.sample_id,
        embedded.slide_embedding.to(dtype),
        file_format=execution.output_format,
        encoder=model.identity(),
        metadata=_metadata(stored),
        compatibility=_compatibility(stored, _own_identity(model)),
        latents=None if embedded.latents is None else embedded.latents.to(dtype),
    )


class _Folders:
    """Where embeddings of encoders go, beside those of others that are there; looked up once for each."""

    def __init__(self, execution: ExecutionOptions) -> None:
        assert execution.output_dir is not None
        self._root = execution.output_dir
        self._known: dict[tuple[Kind, str], Path] = {}

    def of(self, kind: Kind, encoder: Mapping[str, Any], stored: StoredTiles | None) -> Path:
        """The folder of `<kind>_embeddings/`, of embeddings made from stored tiles."""
        name = kind, str(encoder.get("name"))
        if name not in self._known:
            identities = {kind: encoder}
            recorded = stored.metadata.get("compatibility") if stored is not None else None
            if isinstance(recorded, dict) and isinstance(recorded.get("encoder"), dict):
                identities["tile"] = recorded["encoder"]
            self._known[name] = features_place(self._root, owners(self._root), kind, identities, None)[0]
        return self._known[name]


def _own_identity(model: Aggregating) -> dict[str, Any]:
    return {
        name: value for name, value in model.identity().items() if name not in ("weights_source", "below")
    }


def _compatibility(stored: StoredTiles, above: Mapping[str, Any]) -> dict[str, Any]:
    """What a run from slides would record, where the tile embeddings are of one; else what they are."""
    recorded = stored.metadata.get("compatibility")
    if isinstance(recorded, dict) and "encoder" in recorded:
        return {**recorded, "encoder": {**above, "below": recorded["encoder"]}}
    digest = hashlib.blake2b(stored.features.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16)
    return {"tiles": digest.hexdigest(), "encoder": dict(above)}


def _metadata(stored: StoredTiles) -> dict[str, Any]:
    taken_over = ("image_path", "mask_path", "requested_tile_size_px")
    recorded = {name: stored.metadata[name] for name in taken_over if name in stored.metadata}
    return {**recorded, "num_tiles": len(stored.features), "tile_size_lv0": stored.tile_size_lv0}
