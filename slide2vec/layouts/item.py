"""What a layout is made of: an embedding that was loaded, with all that is known of its tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.export import Dtype
from slide2vec.artifacts.places import Kind
from slide2vec.errors import ArtifactError
from slide2vec.labels import split_class_name
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = ["Item", "LayoutModule", "NoPlace", "name_elsewhere"]


class NoPlace(ArtifactError):
    """A tool has no place for what is to be exported; nothing is wrong with it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """An embedding of a run.

    Attributes:
        encoder: its name in the run.
        kind: what it is of.
        name: of the slide, with its class before it ("tumor/a"), or of the patient.
        values: (N, D) of tiles, (R, m², D) of regions, (D,) of a slide or patient.
        tiling: of the tiles; None of patients, and where the run has no coordinates of a slide any more.
        metadata: the sidecar.
        run, output: output directory of the export; and the folder in it that is this encoder's where a tool
            knows no encoders (the directory itself where there is one only).
    """

    encoder: str
    kind: Kind
    name: str
    values: torch.Tensor
    tiling: Tiling | None
    metadata: Mapping[str, Any]
    run: Path
    output: Path

    @property
    def preset(self) -> str:
        """The encoder's name in our catalogue."""
        return str(self.metadata["encoder_name"])

    @property
    def sample_id(self) -> str:
        """Of the slide (or patient), without a class."""
        return self.name if self.kind == "patient" else split_class_name(self.name)[1]

    def below(self, folder: Path) -> Path:
        """A folder, or that of the class in it: tools know slides by their names, not by classes."""
        annotation = None if self.kind == "patient" else split_class_name(self.name)[0]
        return folder if annotation is None else folder / annotation

    @property
    def tiles(self) -> Tiling:
        """The tiles.

        Raises:
            ArtifactError: the run has no coordinates of them.
        """
        if self.tiling is None:
            raise ArtifactError(
                f"slide {self.name}: the run has no coordinates of its tiles (tiles/{self.name}.coordinates…)"
            )
        return self.tiling

    @property
    def coords(self) -> NDArray[np.int64]:
        """(N, 2), x and y of the tiles, level-0 px."""
        return np.stack([self.tiles.x, self.tiles.y], axis=1)


class LayoutModule(Protocol):
    """What the module of a layout has.

    Attributes:
        KINDS: what the tool has a place for.
        DTYPE: of embeddings, where the tool takes one only; else None, as they are.
        EMPTY: whether it has files of slides without tiles.
        TOGETHER: whether all encoders of a slide are in one file.
    """

    KINDS: Sequence[Kind]
    DTYPE: Dtype | None
    EMPTY: bool
    TOGETHER: bool

    def write(self, items: Sequence[Item]) -> Path:
        """Write what an encoder gives of one slide (or patient); with `TOGETHER` what all of them give.

        Returns:
            The main file.

        Raises:
            ArtifactError: a size that the tool expects cannot be said truly.
            NoPlace: the tool has no place for it.
            ExtraMissingError: it needs a package that is not installed.
            OutputError: a file cannot be written.
        """
        ...


def name_elsewhere(item: Item, names: Mapping[tuple[str, int], str], taken: Sequence[str] = ()) -> str:
    """What a tool calls an encoder, so that it takes the features for its own; else a name that is none of
    the tool's: features of another variant under its name would be taken for what they are not.

    Args:
        names: (preset, dimension) -> the tool's name.
        taken: further names of the tool.
    """
    known = names.get((item.preset, item.values.shape[-1])) if item.encoder == item.preset else None
    if known is not None:
        return known
    reserved = item.encoder in {*names.values(), *taken}
    return f"slide2vec-{item.encoder}" if reserved else item.encoder
