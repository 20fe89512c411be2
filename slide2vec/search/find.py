"""Search a run for the tiles nearest to a vector, or to one of its own tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slide2vec.artifacts.places import encoder_of, names_of_all, owners, owners_called
from slide2vec.errors import ArtifactError, ConfigError, nearest_names
from slide2vec.files import as_path, is_remote
from slide2vec.search.index import FoundTile, TileIndex

__all__ = ["Run", "searched_run"]


@dataclass(frozen=True, eq=False)
class Run:
    """The tile embeddings of one encoder in an output directory, ready to be searched.

    Attributes:
        features: the folder of `tile_embeddings/`.
        encoder: what they are of: "name", "output_variant" and more, as sidecars record it.
        projection: (k, D) float32, see `TileIndex.of`; None: they are searched as they are.
    """

    features: Path
    encoder: Mapping[str, Any]
    projection: torch.Tensor | None = None

    @cached_property
    def index(self) -> TileIndex:
        """Gathered now where it is not yet; errors as of `TileIndex.of`."""
        return TileIndex.of(self.features, self.projection)

    def nearest(
        self, query: torch.Tensor, count: int = 20, *, without: FoundTile | None = None
    ) -> list[FoundTile]:
        """The tiles whose embeddings have the largest cosine to a query, the nearest first.

        Every tile is compared with (no approximation); on 1,000,000 tiles of 512 dimensions that takes a
        second or less.

        Args:
            query: (D,).
            without: a tile that is left out: the one that is searched with.

        Raises:
            ConfigError: the query has another dimension.
            ArtifactError: embeddings or coordinates cannot be read.
            OutputError: the index, `search/` beside the embeddings, cannot be written.
        """
        if tuple(query.shape) != (self.index.dim,):
            raise ConfigError(
                f"the query has shape {tuple(query.shape)}, and the tile embeddings of {self.index.features} "
                f"{self.index.dim} dimensions: they are not of one encoder and output"
            )
        found = self.index.nearest(query, count + (without is not None))
        if without is not None:
            same = (without.sample_id, without.row)
            found = [tile for tile in found if (tile.sample_id, tile.row) != same]
        return found[:count]

    def projected(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, D) of the run's encoder as they are searched: (N, k) float32."""
        if self.projection is None:
            return embeddings.float()
        return embeddings[:, : len(self.projection)].float() @ self.projection


def searched_run(output_dir: str | Path, encoder: str | None = None) -> Run:
    """The tile embeddings of a run, which are gathered for searching at the first search.

    Args:
        output_dir: of `Pipeline.run`, `slide2vec run`, `slide2vec embed`; on local storage.
        encoder: whose, by its name in the run (`slide2vec status`), where it has several.

    Raises:
        ConfigError: the run has several encoders and none was named, or no such one; or it is behind a URL.
        ArtifactError: there are no tile embeddings.
    """
    root = as_path(output_dir)
    if is_remote(root):
        raise ConfigError(f"{root} is behind a URL: copy the run to local storage to search it")
    there = [owner for owner in owners(root) if "tile" in owner.sidecars]
    chosen = there if encoder is None else owners_called(encoder, there)
    if encoder is not None and not chosen:
        near = nearest_names(encoder, names_of_all(there))
        raise ConfigError(f"{root} has no tile embeddings of {encoder!r}. {near}")
    if not there:
        raise ArtifactError(
            f"{root} has no tile embeddings to search; models of slides write them with "
            "save_tile_embeddings (--save-tile-embeddings)"
        )
    if encoder is None and len(there) > 1:
        names = ", ".join(owner.name for owner in there)
        raise ConfigError(f"{root} has tile embeddings of {names}: say which (--encoder)")
    owner = chosen[0]
    sidecar = owner.sidecars["tile"]
    return Run(owner.folder, encoder_of(sidecar))
