"""Embeddings as torch.save writes them: one tensor."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from slide2vec.artifacts.formats import FeatureFile
from slide2vec.errors import ArtifactError
from slide2vec.files.arrays import check_bytes, check_most, check_sums

if TYPE_CHECKING:
    import torch

__all__ = ["read", "write"]

#: Of a file that PyTorch before 1.6 wrote: magic number, version, system, the tensor, names of storages.
_LEGACY_PICKLES = 5


def write(file: BinaryIO, content: FeatureFile) -> None:
    import torch

    values = content.values
    if values.untyped_storage().nbytes() != values.nbytes:
        values = values.clone()  # a view would store the whole tensor behind it
    torch.save(values, file)


def read(path: Path, names: tuple[str, ...], most: int | None) -> torch.Tensor:
    import torch

    size = path.stat().st_size
    if zipped := _starts_with(path, b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            if any(info.file_size != info.compress_size for info in archive.infolist()):
                raise ArtifactError("is compressed, which torch.save never does")
            for info in archive.infolist():
                if info.filename.endswith("data.pkl"):
                    _check_pickle(io.BytesIO(archive.read(info)))
        check_sums(path)
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
    # Mapped: what a damaged file says of the length of its data is held against the file's own.
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(found, torch.Tensor):
        raise ArtifactError(f"holds a {type(found).__name__}, not one tensor")
    if found.layout is not torch.strided or found.device.type != "cpu":
        raise ArtifactError(f"holds a {found.layout} tensor on {found.device}, not a plain one")
    check_bytes(tuple(found.shape), found.itemsize, size, compressed=False)
    check_most(tuple(found.shape), most)
    return found.detach().clone(memory_format=torch.contiguous_format)


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse what makes something else than tensors: `bytearray(2**31)` is a few bytes of pickle, and one of
    the things that PyTorch calls even with weights_only.

    Raises:
        ArtifactError, ValueError: naming it, or it is no pickle of ours.
    """
    texts = ["", ""]
    for code, argument, _ in pickletools.genops(file):
        if "UNICODE" in code.name:
            texts = [texts[1], str(argument)]
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            module, name = texts if argument is None else str(argument).split(" ", 1)
            if module.partition(".")[0] != "torch" and (module, name) != ("collections", "OrderedDict"):
                raise ArtifactError(f"asks for {module}.{name}, which a tensor does not need")


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
