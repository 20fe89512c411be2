"""An output format: one .npy file, the embeddings and after them the coordinates.

slide2vec calls `write` with a file that it makes visible once it is whole, and `read` with the path of one.
The sidecar, with everything about the slide and the encoder, is slide2vec's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.formats import FeatureFile, as_array
from slide2vec.errors import ArtifactError

__all__ = ["read", "write"]


def write(file: BinaryIO, content: FeatureFile) -> None:
    """The same bytes for the same content."""
    np.lib.format.write_array(file, as_array(content), allow_pickle=False)
    if content.coords is not None:
        np.lib.format.write_array(file, content.coords, allow_pickle=False)


def read(path: Path, names: tuple[str, ...], most: int | None) -> NDArray[Any] | None:
    """The array of one of these names, None where it is not in the file: "features" and "latents" are the
    first, "coords" the second.

    Args:
        most: numbers that it may have.
    """
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
        if "coords" in names:
            try:
                found = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError:  # the file ends
                return None
    if most is not None and found.size > most:
        raise ArtifactError(f"{path} holds {found.size} numbers, more than {most}")
    return found
