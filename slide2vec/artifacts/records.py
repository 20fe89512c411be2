"""The files of one embedding artifact, their sidecar, and which artifacts of a directory are complete."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slide2vec.choices import OUTPUT_FORMATS, OutputFormat
from slide2vec.errors import ArtifactError
from slide2vec.files import as_os_errors, as_path, names_below
from slide2vec.labels import class_folder, class_name, split_class_name

__all__ = [
    "FORMATS",
    "SCHEMA_VERSION",
    "SIDECAR",
    "HierarchicalEmbeddingArtifact",
    "ImageEmbeddingArtifact",
    "PatientEmbeddingArtifact",
    "SlideEmbeddingArtifact",
    "TileEmbeddingArtifact",
    "find_hierarchical_artifact",
    "find_patient_artifact",
    "find_slide_artifact",
    "find_tile_artifact",
    "read_metadata",
    "recorded_dtype",
    "tile_artifacts",
]

#: Of the sidecar. 2: `file_size_bytes` and `skipped_tiles`; `compatibility` is the caller's.
SCHEMA_VERSION = 2
#: Suffixes of features files.
FORMATS = OUTPUT_FORMATS
SIDECAR = ".meta.json"
#: Sidecars have a few KB, with many skipped tiles a few MB.
MAX_SIDECAR_BYTES = 64 * 2**20


def recorded_dtype(name: str) -> str:
    """A dtype of PyTorch, as sidecars record it: "fp16", "fp32" (older ones of ours: "float16")."""
    return {"float16": "fp16", "float32": "fp32"}.get(name, name)


@dataclass(frozen=True, kw_only=True)
class _Artifact:
    """A features file and its sidecar.

    Attributes:
        path, metadata_path: of the features file and of the sidecar.
        format: of the features file, "pt", "npz", "safetensors" or "h5".
        feature_dim: D.
    """

    path: Path
    metadata_path: Path
    format: OutputFormat
    feature_dim: int

    @property
    def metadata(self) -> dict[str, Any]:
        """The sidecar; read anew each time."""
        return read_metadata(self.metadata_path)


@dataclass(frozen=True, kw_only=True)
class _OfSlide(_Artifact):
    """Of one slide, or of one class of its annotations.

    Attributes:
        annotation: the class, where it has a folder of its own; else None.
    """

    sample_id: str
    annotation: str | None = None

    @property
    def name(self) -> str:
        """The sample_id, with the class before it: "tumor/a"."""
        return class_name(self.annotation, self.sample_id)


@dataclass(frozen=True, kw_only=True)
class TileEmbeddingArtifact(_OfSlide):
    """The tile embeddings of one slide, (num_tiles, feature_dim)."""

    num_tiles: int


@dataclass(frozen=True, kw_only=True)
class SlideEmbeddingArtifact(_OfSlide):
    """The embedding of one slide, (feature_dim,), and its latents where they were asked for."""

    latent_path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddingArtifact(_Artifact):
    """The embedding of one ready image, (feature_dim,)."""

    sample_id: str


@dataclass(frozen=True, kw_only=True)
class PatientEmbeddingArtifact(_Artifact):
    """The embedding of one patient, (feature_dim,), from num_slides slides."""

    patient_id: str
    num_slides: int


@dataclass(frozen=True, kw_only=True)
class HierarchicalEmbeddingArtifact(_OfSlide):
    """The embeddings of one slide by region, (num_regions, tiles_per_region, feature_dim)."""

    num_regions: int
    tiles_per_region: int


def read_metadata(path: str | Path) -> dict[str, Any]:
    """A sidecar (.meta.json) as a dict.

    Raises:
        ArtifactError: it is missing, too large, or no JSON object.
    """
    path = as_path(path)
    try:
        with as_os_errors(path), path.open("rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise ArtifactError(
                f"sidecar {path} has more than {MAX_SIDECAR_BYTES:,} bytes: it is none of ours"
            )
        content = json.loads(data)
    except FileNotFoundError:
        raise ArtifactError(
            f"sidecar {path} does not exist: the slide was not finished; embed it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"sidecar {path} cannot be read: {error}; delete it and embed the slide again"
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"sidecar {path} holds a {type(content).__name__} instead of a JSON object")
    return content


def find_tile_artifact(
    output_dir: str | Path, sample_id: str, annotation: str | None = None
) -> TileEmbeddingArtifact | None:
    """The complete tile embeddings of a slide under an output directory, None without.

    Complete: the sidecar can be read and has our schema, and its features file is there in the size
    that it says. Half-written, damaged and foreign files never count, and raise nothing. Costs one
    small read and one stat.

    Args:
        annotation: of which class; None = of tissue.
    """
    found = _of_slide(output_dir, "tile_embeddings", class_name(annotation, sample_id), ("num_tiles",))
    return None if found is None else TileEmbeddingArtifact(**found)


def find_hierarchical_artifact(
    output_dir: str | Path, sample_id: str, annotation: str | None = None
) -> HierarchicalEmbeddingArtifact | None:
    """The complete embeddings of a slide by region, as `find_tile_artifact`."""
    counts = ("num_regions", "tiles_per_region")
    found = _of_slide(output_dir, "hierarchical_embeddings", class_name(annotation, sample_id), counts)
    return None if found is None else HierarchicalEmbeddingArtifact(**found)


def find_slide_artifact(
    output_dir: str | Path, sample_id: str, annotation: str | None = None
) -> SlideEmbeddingArtifact | None:
    """The complete embedding of a slide, with its latents where they are there, as `find_tile_artifact`."""
    name = class_name(annotation, sample_id)
    found = _of_slide(output_dir, "slide_embeddings", name, ())
    if found is None:
        return None
    latents = as_path(output_dir) / "slide_latents" / f"{name}.{found['format']}"
    return SlideEmbeddingArtifact(**found, latent_path=None if _size_of(latents) is None else latents)


def _of_slide(output_dir: str | Path, kind: str, name: str, counts: tuple[str, ...]) -> dict[str, Any] | None:
    found = _complete(output_dir, kind, name, counts)
    annotation, sample_id = split_class_name(name)
    return None if found is None else {**found, "sample_id": sample_id, "annotation": annotation}


def find_patient_artifact(output_dir: str | Path, patient_id: str) -> PatientEmbeddingArtifact | None:
    """The complete embedding of a patient, as `find_tile_artifact`."""
    found = _complete(output_dir, "patient_embeddings", patient_id, ("num_slides",))
    return None if found is None else PatientEmbeddingArtifact(**found, patient_id=patient_id)


def _complete(output_dir: str | Path, kind: str, name: str, counts: tuple[str, ...]) -> dict[str, Any] | None:
    """What every artifact has, and these counts of its sidecar; None unless it is complete.

    Args:
        kind: its folder, and its artifact_type.
    """
    annotation, own = split_class_name(name)
    if any(part is not None and Path(part).name != part for part in (annotation, own)):
        return None
    folder = as_path(output_dir) / kind
    metadata_path = folder / f"{name}{SIDECAR}"
    try:
        found = read_metadata(metadata_path)
    except ArtifactError:
        return None
    path = folder / f"{name}.{found.get('format')}"
    if not _describes(found, kind, name, counts) or _size_of(path) != found["file_size_bytes"]:
        return None
    known = {key: found[key] for key in ("format", "feature_dim", *counts)}
    return {"path": path, "metadata_path": metadata_path, **known}


def _describes(metadata: dict[str, Any], kind: str, name: str, counts: tuple[str, ...]) -> bool:
    annotation, own = split_class_name(name)
    numbers = [metadata.get(key) for key in ("feature_dim", "file_size_bytes", *counts)]
    return (
        metadata.get("schema_version") == SCHEMA_VERSION
        and metadata.get("artifact_type") == kind
        and metadata.get("patient_id" if kind == "patient_embeddings" else "sample_id") == own
        and class_folder(metadata.get("annotation")) == annotation
        and metadata.get("format") in FORMATS
        and all(type(number) is int and number >= 0 for number in numbers)
    )


def _size_of(path: Path) -> int | None:
    """Bytes of a plain file, else None."""
    try:
        with as_os_errors(path):
            found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def tile_artifacts(output_dir: str | Path) -> Iterator[TileEmbeddingArtifact]:
    """The complete tile embeddings under an output directory, sorted by name."""
    for name in names_below(as_path(output_dir) / "tile_embeddings", SIDECAR):
        artifact = find_tile_artifact(output_dir, name)
        if artifact is not None:
            yield artifact
