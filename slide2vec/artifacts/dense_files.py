"""Files of dense features: a grid of tokens (d, rows, columns) each, and a sidecar that is written last.

dense_embeddings/[<class>/]<sample_id>/<x>_<y>.pt of regions of slides, dense_image_embeddings/<sample_id>.pt
of ready images; names and keys are those of slide2vec 7.1.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.artifacts.formats import FeatureFile, write_feature_file
from slide2vec.artifacts.records import SIDECAR, read_metadata
from slide2vec.artifacts.writing import write_json
from slide2vec.errors import ArtifactError
from slide2vec.files import atomic_path, remove
from slide2vec.slides import check_id

if TYPE_CHECKING:
    import torch

__all__ = [
    "DENSE_IMAGES",
    "DENSE_REGIONS",
    "DenseImageArtifact",
    "DenseRegionArtifact",
    "dense_metadata",
    "image_grid_path",
    "region_grid_path",
    "write_grid",
]

DENSE_REGIONS, DENSE_IMAGES = "dense_embeddings", "dense_image_embeddings"
#: Annotations that have no folder of their own.
_FLAT = (None, "tissue", "merged")


@dataclass(frozen=True, kw_only=True)
class _DenseArtifact:
    sample_id: str
    path: Path
    metadata_path: Path
    feature_dim: int
    grid_shape: tuple[int, int]

    @property
    def metadata(self) -> dict[str, Any]:
        """The sidecar; read anew each time."""
        return read_metadata(self.metadata_path)


@dataclass(frozen=True, kw_only=True)
class DenseRegionArtifact(_DenseArtifact):
    """The grid (feature_dim, *grid_shape) of one region of a slide, whose top-left corner is at x, y (level-0
    px)."""

    x: int
    y: int
    annotation: str | None = None


@dataclass(frozen=True, kw_only=True)
class DenseImageArtifact(_DenseArtifact):
    """The grid (feature_dim, *grid_shape) of one ready image."""


def region_grid_path(output_dir: Path, sample_id: str, annotation: str | None, x: int, y: int) -> Path:
    """Where the grid of a region is."""
    check_id(sample_id, "sample_id")
    folder = output_dir / DENSE_REGIONS
    if annotation not in _FLAT:
        folder /= str(annotation)
    return folder / sample_id / f"{x}_{y}.pt"


def image_grid_path(output_dir: Path, sample_id: str) -> Path:
    """Where the grid of an image is."""
    return output_dir / DENSE_IMAGES / f"{sample_id}.pt"


def dense_metadata(path: Path) -> dict[str, Any] | None:
    """The sidecar of a grid that is whole; None where there is none."""
    try:
        found = read_metadata(sidecar_of(path))
    except ArtifactError:
        return None
    shape, dim = found.get("grid_shape"), found.get("feature_dim")
    known = isinstance(shape, list) and len(shape) == 2 and all(type(each) is int for each in (*shape, dim))
    return found if known and path.is_file() else None


def sidecar_of(path: Path) -> Path:
    """Of a grid's file."""
    return path.with_name(f"{path.stem}{SIDECAR}")


def write_grid(path: Path, grid: torch.Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a grid (d, rows, columns) and its sidecar; the old sidecar goes before the new grid is there.

    Raises:
        OutputError: a file cannot be written.
    """
    content = FeatureFile(name="features", values=grid.detach().cpu().contiguous())
    with atomic_path(path) as temporary:
        write_feature_file(temporary, content, "pt")
        remove(sidecar_of(path))
    write_json(sidecar_of(path), metadata)
