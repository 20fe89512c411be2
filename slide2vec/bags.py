"""The tiles of a run as bags, one per slide, for multiple-instance learning in PyTorch."""

from __future__ import annotations

import logging
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from slide2vec.artifacts import TileEmbeddingArtifact, tile_artifacts
from slide2vec.artifacts.mapped import map_embeddings
from slide2vec.artifacts.places import Owner, names_of_all, owners, owners_called
from slide2vec.artifacts.tile_features import check_same_files, coordinates_folder
from slide2vec.errors import ArtifactError, ConfigError, nearest_names
from slide2vec.files import as_path
from slide2vec.labels import TISSUE, class_folder
from slide2vec.tiling import load_coordinates

if TYPE_CHECKING:
    import pandas

__all__ = ["BagDataset"]

logger = logging.getLogger(__name__)

#: Named in messages.
_MOST_NAMES = 10


class BagDataset(Dataset[dict[str, Any]]):
    """A bag for each slide of a run: its tile embeddings, where its tiles are, and its label.

    Embeddings are read when a bag is asked for, and mapped into memory where they are in a pt, safetensors
    or h5 file on local storage: of a bag of which few tiles are used, few are read. It can be pickled
    (workers of a `DataLoader`). `bags[i]` is a dict: `sample_id`; `features` (N, D), a tensor, as stored;
    `coords` (N, 2) int64, x and y of the tiles in level-0 px; `label`, a tensor of one number, where labels
    were given. Bags differ in N: use `DataLoader(bags, batch_size=None)`.

    Args:
        run: output directory of a run.
        labels: sample_id -> label, as a mapping, a pandas DataFrame or a CSV file; None = all slides, without
            labels. Text is numbered (`classes`), whole numbers stay int64, others are float32. A blank label
            is none.
        encoders: the name of one (`slide2vec status`); None = the only one. Of several names `features` and
            `coords` are dicts by encoder.
        label, sample_id: columns of a table of labels.
        annotation: the class whose tiles are wanted, where the run has classes; "tissue" and "merged", which
            have no folder of their own, are meant by None, too.
        missing: what happens if slides with a label have no complete embeddings, or no tiles: "error", or
            "skip" (a warning names them; `missing` has them).

    Attributes:
        sample_ids: of the slides, sorted.
        targets: their labels as numbers, (n,); None without labels.
        classes: labels that were text, by number.
        missing: sample_id -> what is missing of it.
        unlabelled: slides of the run without a label, which are left out.

    Raises:
        ArtifactError: the run has no tile embeddings, or slides are missing.
        ConfigError: labels cannot be understood, or there is no such encoder or class.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        labels: Mapping[str, Any] | pandas.DataFrame | str | os.PathLike[str] | None = None,
        *,
        encoders: str | Sequence[str] | None = None,
        label: str = "label",
        sample_id: str = "sample_id",
        annotation: str | None = None,
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        chosen = _chosen(as_path(run), encoders)
        self._several = encoders is not None and not isinstance(encoders, str)
        self._tilings = {name: owner.tiling / "tiles" for name, owner in chosen.items()}
        found = {name: _of(owner, annotation) for name, owner in chosen.items()}
        if not any(found.values()):
            _check_class(as_path(run), chosen.values(), annotation)
        given = None if labels is None else _labels(labels, label, sample_id)
        there = {name for artifacts in found.values() for name in artifacts}
        wanted = there if given is None else set(given)
        self.missing: dict[str, str] = {
            name: lack for name in sorted(wanted) if (lack := _lack(found, name)) is not None
        }
        self.unlabelled = tuple(sorted(there - wanted))
        self._report(missing, Path(run))
        self.sample_ids = sorted(wanted - self.missing.keys())
        self._artifacts = [{each: found[each][name] for each in found} for name in self.sample_ids]
        self.classes: tuple[str, ...] = ()
        self.targets: torch.Tensor | None = None
        if given is not None:
            self.classes, self.targets = _numbered([given[name] for name in self.sample_ids])

    def _report(self, missing: str, run: Path) -> None:
        if self.missing:
            named = [f"{name} ({lack})" for name, lack in self.missing.items()]
            more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
            text = f"{run}: bags of {len(named)} slides are missing: {', '.join(named[:_MOST_NAMES])}{more}"
            if missing != "skip":
                raise ArtifactError(f'{text}; embed them, or leave them out with missing="skip"')
            logger.warning("%s", text)
        if self.unlabelled:
            logger.warning("%s: %d slides have no label, and are left out", run, len(self.unlabelled))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A bag.

        Raises:
            ArtifactError, TilingError: its files cannot be read, or are not of the same tiles.
        """
        artifacts = self._artifacts[index]
        features = {name: _features(artifact) for name, artifact in artifacts.items()}
        coords = {name: _coords(self._tilings[name], artifact) for name, artifact in artifacts.items()}
        bag: dict[str, Any] = {"sample_id": self.sample_ids[index]}
        for key, values in (("features", features), ("coords", coords)):
            bag[key] = values if self._several else next(iter(values.values()))
        if self.targets is not None:
            bag["label"] = self.targets[index]
        return bag


def _chosen(run: Path, encoders: str | Sequence[str] | None) -> dict[str, Owner]:
    """By the names that were asked for."""
    there = [owner for owner in owners(run) if "tile" in owner.sidecars]
    if not there:
        raise ArtifactError(
            f"{run} has no tile embeddings; models of slides write them with save_tile_embeddings "
            "(--save-tile-embeddings)"
        )
    if encoders is None:
        if len(there) > 1:
            names = ", ".join(owner.name for owner in there)
            raise ConfigError(f"{run} has tile embeddings of {names}: say which (encoders=…)")
        return {there[0].name: there[0]}
    chosen = {}
    for name in [encoders] if isinstance(encoders, str) else encoders:
        if not (found := owners_called(name, there)):
            near = nearest_names(name, names_of_all(there))
            raise ConfigError(f"{run} has no tile embeddings of {name!r}. {near}")
        chosen[name] = found[0]
    if not chosen:
        raise ConfigError("encoders is empty: name at least one")
    return chosen


def _of(owner: Owner, annotation: str | None) -> dict[str, TileEmbeddingArtifact]:
    """By sample_id."""
    folder = class_folder(annotation)
    found = {each.sample_id: each for each in tile_artifacts(owner.folder) if each.annotation == folder}
    if annotation is None or not found:
        return found
    first = next(iter(found.values()))
    return found if _class_of(first) == annotation else {}


def _class_of(artifact: TileEmbeddingArtifact) -> str:
    """Also of those in no folder of a class."""
    compatibility = artifact.metadata.get("compatibility")
    geometry = compatibility.get("geometry") if isinstance(compatibility, Mapping) else None
    masks = geometry.get("masks") if isinstance(geometry, Mapping) else None
    recorded = masks.get("annotation") if isinstance(masks, Mapping) else None
    return str(recorded or artifact.annotation or TISSUE)


def _check_class(run: Path, chosen: Iterable[Owner], annotation: str | None) -> None:
    """Raise ConfigError where a run has tile embeddings of other classes only."""
    every = (artifact for owner in chosen for artifact in tile_artifacts(owner.folder))
    one_each = {artifact.annotation: artifact for artifact in every}
    if not one_each:
        return
    names = sorted(map(_class_of, one_each.values()))
    if annotation is None:
        raise ConfigError(f"{run} has tile embeddings of {', '.join(names)}: say which (annotation=…)")
    raise ConfigError(
        f"{run} has no tile embeddings of class {annotation!r}. {nearest_names(annotation, names)}"
    )


def _lack(found: Mapping[str, Mapping[str, TileEmbeddingArtifact]], name: str) -> str | None:
    """What is missing of a slide."""
    for encoder, artifacts in found.items():
        if name not in artifacts:
            return f"no complete embeddings of {encoder}"
        if not artifacts[name].num_tiles:
            return "no tiles"
    return None


def _features(artifact: TileEmbeddingArtifact) -> torch.Tensor:
    return map_embeddings(artifact.path, (artifact.num_tiles, artifact.feature_dim))


def _coords(tiles: Path, artifact: TileEmbeddingArtifact) -> torch.Tensor:
    metadata = artifact.metadata
    folder = coordinates_folder(metadata, tiles, artifact.name)
    check_same_files(metadata, folder, artifact.name)
    tiling = load_coordinates(folder, artifact.name)
    if len(tiling) != artifact.num_tiles:
        raise ArtifactError(
            f"slide {artifact.name}: it has {artifact.num_tiles} embeddings and coordinates of {len(tiling)} "
            "tiles: it was tiled anew since; embed it again"
        )
    return torch.from_numpy(np.stack([tiling.x, tiling.y], axis=1))


def _labels(
    given: Mapping[str, Any] | pandas.DataFrame | str | os.PathLike[str], label: str, sample_id: str
) -> dict[str, Any]:
    """sample_id -> label, of those that are not blank."""
    if isinstance(given, Mapping):
        pairs: Iterable[tuple[Any, Any]] = given.items()
    else:
        import pandas

        table = (
            given if isinstance(given, pandas.DataFrame) else pandas.read_csv(given, dtype={sample_id: str})
        )
        for column in (sample_id, label):
            if column not in table:
                raise ConfigError(
                    f"labels have no column {column!r}, but {', '.join(map(str, table.columns))}: name it "
                    "with sample_id=… and label=…"
                )
        pairs = zip(table[sample_id], table[label], strict=True)
    found: dict[str, Any] = {}
    for name, value in pairs:
        if value is None or value != value or value == "":
            continue
        if found.setdefault(str(name), value) != value:
            raise ConfigError(f"slide {name} has two labels, {found[str(name)]!r} and {value!r}: give it one")
    return found


def _numbered(labels: Sequence[Any]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The classes, where labels are text, and the labels as numbers."""
    if all(isinstance(each, str) for each in labels):
        classes = tuple(sorted(set(labels)))
        return classes, torch.tensor([classes.index(each) for each in labels], dtype=torch.int64)
    if all(isinstance(each, numbers.Integral) for each in labels):
        return (), torch.tensor([int(each) for each in labels], dtype=torch.int64)
    if all(isinstance(each, numbers.Real) for each in labels):
        return (), torch.tensor([float(each) for each in labels], dtype=torch.float32)
    kinds = ", ".join(sorted({type(each).__name__ for each in labels}))
    raise ConfigError(f"labels are {kinds}: give text, or numbers")
