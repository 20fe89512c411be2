"""What an earlier call has done: embeddings and grids that are kept, images that are to be encoded, and
fields of identities that differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slide2vec.artifacts import ImageEmbeddingArtifact, read_metadata
from slide2vec.artifacts.dense_files import dense_metadata
from slide2vec.artifacts.image_files import IMAGE_EMBEDDINGS, image_artifact
from slide2vec.artifacts.records import FORMATS
from slide2vec.config import ExecutionOptions
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import entries
from slide2vec.images.specs import ImageSpec

__all__ = [
    "MISSING_FIELD",
    "Reused",
    "differing_fields",
    "find_done",
    "grid_made_alike",
    "refuse_other_identity",
]

logger = logging.getLogger(__name__)


class _MissingField:
    def __repr__(self) -> str:
        return "MISSING_FIELD"

    def __reduce__(self) -> str:
        return "MISSING_FIELD"


#: Stands for the recorded value of a field that a sidecar does not record; None is a value that it may have.
MISSING_FIELD = _MissingField()


@dataclass(frozen=True)
class Reused:
    """What is left to do of a call.

    Attributes:
        done: embeddings that stay, by sample_id.
        left: images to encode, in input order.
    """

    done: dict[str, ImageEmbeddingArtifact] = field(default_factory=dict)
    left: list[ImageSpec] = field(default_factory=list)


def find_done(
    images: Sequence[ImageSpec], output_dir: Path, identity: Mapping[str, Any], execution: ExecutionOptions
) -> Reused:
    """Which images have embeddings of this identity; nothing is removed.

    One whose sidecar lacks a field of the identity, or is not there, is encoded anew.

    Raises:
        ConfigError: a ValueError: an embedding of the same name is of another identity; or of another image,
            and execution.on_image_mismatch is "raise".
    """
    there = {path.name for path in entries(output_dir / IMAGE_EMBEDDINGS)}
    found = Reused()
    for image in images:
        artifact = image_artifact(output_dir, image.sample_id, execution.output_format, 0)
        dim = None
        if artifact.metadata_path.name in there:
            dim = _recorded_dim(image, artifact, identity, execution, there)
        if dim is None:
            found.left.append(image)
        else:
            found.done[image.sample_id] = image_artifact(
                output_dir, image.sample_id, execution.output_format, dim
            )
    return found


def _recorded_dim(
    image: ImageSpec,
    artifact: ImageEmbeddingArtifact,
    identity: Mapping[str, Any],
    execution: ExecutionOptions,
    there: set[str],
) -> int | None:
    """D of an embedding that stays; None where the image is to be encoded."""
    try:
        recorded = read_metadata(artifact.metadata_path)
    except ArtifactError:
        return None
    source = recorded.get("image_path")
    if not isinstance(source, str) or not source:
        return None
    if source != image.source:
        if execution.on_image_mismatch == "raise":
            raise ConfigError(
                f"image {image.sample_id}: its embedding in {artifact.path.parent} is of {source}, not of "
                f'{image.source}: give on_image_mismatch="reencode" (--on-image-mismatch reencode) to '
                "replace it, or another sample_id or output directory"
            )
        return None
    known = next((name for name in FORMATS if name == recorded.get("format")), None)
    compatibility = recorded.get("compatibility")
    if known is None or not isinstance(compatibility, Mapping):
        return None
    whole = refuse_other_identity(
        image.sample_id, artifact.path.with_suffix(f".{known}"), compatibility, identity
    )
    dim = recorded.get("feature_dim")
    here = known == execution.output_format and artifact.path.name in there
    return dim if whole and here and type(dim) is int else None


def refuse_other_identity(
    sample_id: str, path: Path, recorded: Mapping[str, Any], asked: Mapping[str, Any]
) -> bool:
    """Whether a record has every field of an identity.

    Raises:
        ConfigError: it has another value of one.
    """
    found = differing_fields(recorded, asked)
    other = {name: pair for name, pair in found.items() if pair[0] is not MISSING_FIELD}
    if other:
        inner = (each for name, pair in other.items() for each in _leaves(name, *pair))
        details = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in inner)
        raise ConfigError(
            f"image {sample_id}: its features in {path} were made differently: {details}. Choose another "
            "output directory, remove them, or ask for what was recorded"
        )
    return not found


def grid_made_alike(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sidecar of a grid that an earlier call has made with this identity; None where none has."""
    found = dense_metadata(path)
    recorded = None if found is None else found.get("compatibility")
    if not isinstance(recorded, Mapping):
        return None
    if other := differing_fields(recorded, identity):
        logger.info("%s is made anew: %s differ", path, ", ".join(sorted(other)))
        return None
    return found


def differing_fields(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (recorded, current)} of every field of `current` that the record lacks (MISSING_FIELD) or has
    with another value."""
    return {
        name: (recorded.get(name, MISSING_FIELD), value)
        for name, value in current.items()
        if name not in recorded or recorded[name] != value
    }


def _leaves(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, down to the innermost keys."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        yield name, old, new
        return
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield from _leaves(f"{name}.{key}", old.get(key), new.get(key))
