"""Files of ours and of other tools are read; files that nobody should trust are refused, harmlessly."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from artifact_helpers import FORMATS, a_tiling, embedded, write
from safetensors.torch import save_file

from slide2vec.artifacts import load_coords, load_embeddings, write_tile_embeddings
from slide2vec.errors import ArtifactError

TILING = a_tiling()
VALUES = embedded(TILING).tile_embeddings
COORDS = np.stack([TILING.x, TILING.y], axis=1)
#: What refusing a file may allocate, whatever it announces.
MOST_BYTES = 8 * 2**20
#: Mutated files per format.
MUTANTS = 200


@contextmanager
def refused(match: str | None = None) -> Iterator[None]:
    """An ArtifactError that names the file and the remedy, without large arrays."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=match) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert "embeddings file" in str(caught.value) and "embed its slide again" in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_written_is_read(file_format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    slide = embedded(TILING, dtype=dtype)
    encoder = {"name": "e", "level": "tile", "input_size_px": 224}
    path = write_tile_embeddings(tmp_path, slide, TILING, encoder=encoder, file_format=file_format).path  # type: ignore[arg-type]
    found, coords = load_embeddings(path), load_coords(str(path))
    assert found.dtype == dtype and torch.equal(found, slide.tile_embeddings) and found.is_contiguous()
    if file_format in ("pt", "npz"):
        assert coords is None
    else:
        assert coords is not None and coords.dtype == np.int64 and np.array_equal(coords, COORDS)


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_was_read_outlives_its_file(file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path, file_format=file_format).path
    found = load_embeddings(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    found += 1  # not a map of the file, and not read-only
    assert torch.equal(found, VALUES + 1)


def h5(path: Path, **arrays: Any) -> Path:
    """An h5 file of resizable arrays, in chunks of one row, as TRIDENT and CLAM write."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            chunks = (1, *array.shape[1:])
            file.create_dataset(name, data=array, maxshape=(None, *array.shape[1:]), chunks=chunks)
    return path


def test_h5_files_of_trident_and_clam(tmp_path: Path) -> None:
    path = h5(tmp_path / "a.h5", features=VALUES.numpy(), coords=COORDS.astype(np.int32))
    assert torch.equal(load_embeddings(path), VALUES)
    found = load_coords(path)
    assert found is not None and found.dtype == np.int64 and np.array_equal(found, COORDS)
    # A slide embedding of TRIDENT has the tiles' coordinates beside it.
    path = h5(tmp_path / "b.h5", features=VALUES[0].numpy(), coords=COORDS)
    assert torch.equal(load_embeddings(path), VALUES[0])


def test_a_stray_first_axis_of_h5_files_is_dropped_and_that_of_regions_is_not(tmp_path: Path) -> None:
    stray = h5(tmp_path / "a.h5", features=VALUES.numpy()[None], coords=COORDS)
    assert torch.equal(load_embeddings(stray), VALUES)
    region = h5(tmp_path / "b.h5", features=VALUES.numpy()[None], coords=COORDS[:1])
    assert load_embeddings(region).shape == (1, 12, 5)
    assert load_embeddings(h5(tmp_path / "c.h5", features=VALUES.numpy()[None])).shape == (1, 12, 5)


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_and_foreign_byte_orders(compression: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        swapped = VALUES.numpy().astype(">f4")
        file.create_dataset("features", data=swapped, compression=compression, shuffle=True, chunks=(4, 5))
    assert torch.equal(load_embeddings(tmp_path / "a.h5"), VALUES)
    np.savez_compressed(tmp_path / "a.npz", features=np.asfortranarray(swapped))
    assert torch.equal(load_embeddings(tmp_path / "a.npz"), VALUES)


def test_files_of_the_original_slide2vec(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", features=VALUES.numpy(), tile_index=np.arange(12))
    torch.save(VALUES, tmp_path / "a.pt")
    torch.save(VALUES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(VALUES.reshape(3, 4, 5), tmp_path / "regions.pt")
    np.savez_compressed(tmp_path / "latents.npz", latents=VALUES.numpy())
    for name in ("a.npz", "a.pt", "old.pt", "latents.npz"):
        assert torch.equal(load_embeddings(tmp_path / name), VALUES)
    assert load_embeddings(tmp_path / "regions.pt").shape == (3, 4, 5)


def test_highly_compressible_embeddings_of_one_slide_are_no_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros((2000, 1000), np.float32))
    assert (tmp_path / "a.npz").stat().st_size * 500 < 8_000_000
    assert load_embeddings(tmp_path / "a.npz").shape == (2000, 1000)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "a.h5").mkdir()
    expected = {
        "gone.pt": "does not exist",
        "a.csv": "'.csv' is none of pt,",
        "a": "'no suffix' is none of",
        "a.h5": "does not exist",
    }
    for name, match in expected.items():
        for load in (load_embeddings, load_coords):
            with pytest.raises(ArtifactError, match=match):
                load(tmp_path / name)


def test_a_small_pt_does_not_become_gigabytes(tmp_path: Path) -> None:
    """The allocation of PyTorch itself: what is left once sizes of tensors are bounded."""
    grows = pickle.dumps(bytearray, 2)[:-1] + pickle.dumps((2**31 - 1,), 2)[2:-1] + b"R."
    torch.save(torch.zeros(3), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "a.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, grows if name.endswith("data.pkl") else good.read(name))
    (tmp_path / "b.pt").write_bytes(grows)
    torch.save(torch.zeros(1).expand(2**30), tmp_path / "c.pt")
    for name, told in (("a", "asks for .*bytearray"), ("b", "asks for .*bytearray"), ("c", "announces")):
        with refused(told):
            load_embeddings(tmp_path / f"{name}.pt")
    assert len(load_embeddings(tmp_path / "good.pt")) == 3


@pytest.mark.parametrize("file_format", ["pt", "npz", "safetensors", "h5"])
def test_no_more_is_read_than_the_sidecar_says(file_format: Any, tmp_path: Path) -> None:
    from slide2vec.artifacts.formats import FeatureFile, write_feature_file

    path = tmp_path / f"a.{file_format}"
    write_feature_file(path, FeatureFile(name="features", values=torch.zeros(10, 4)), file_format)
    assert load_embeddings(path, most=40).shape == (10, 4)
    with pytest.raises(ArtifactError, match="more than the 39 numbers of its"):
        load_embeddings(path, most=39)


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**62])
def test_coordinates_that_no_slide_has(wrong: int, tmp_path: Path) -> None:
    coords = np.zeros((5, 2), np.int64)
    coords[3] = 7, wrong
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = coords
    with pytest.raises(ArtifactError, match=r"1 of 5 tiles are on no slide: those of tile 3 are \[7, "):
        load_coords(tmp_path / "a.h5")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_not_run(zipped: bool, tmp_path: Path) -> None:
    torch.save(Hostile(tmp_path / "made"), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "made")))
    objects = np.array([Hostile(tmp_path / "made")], object)
    np.savez(tmp_path / "a.npz", features=objects, allow_pickle=True)
    for name in ("a.pt", "b.pt", "a.npz"):
        with refused():
            load_embeddings(tmp_path / name)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "it is hostile"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "content",
    [
        {"features": torch.ones(3)},
        [torch.ones(3)],
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(()),
        torch.ones(1, 2, 3, 4),
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.zeros(1).expand(10**5, 1000),
        "text",
    ],
    ids=lambda content: (
        f"{type(content).__name__}-{getattr(content, 'layout', '')}-{getattr(content, 'dtype', '')}"
    ),
)
def test_pt_files_that_hold_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with refused():
        load_embeddings(tmp_path / "a.pt")


def test_a_pt_file_that_announces_more_than_it_has(tmp_path: Path) -> None:
    """And one that is compressed: PyTorch would allocate what it says before unpacking it."""
    torch.save(torch.ones(100), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    assert members[name].count(b"Kd") == 2  # BININT1 100: the length of the storage and of the tensor
    members[name] = members[name].replace(b"Kd", b"J" + struct.pack("<i", 50_000_000))
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with refused():
        load_embeddings(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with refused("is compressed"):
        load_embeddings(tmp_path / "c.pt")


def test_a_pt_file_whose_checksums_differ(tmp_path: Path) -> None:
    torch.save(torch.ones(100), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(bytes(torch.ones(2).numpy().tobytes()))] ^= 1  # PyTorch itself reads 0.99999994 or so
    (tmp_path / "a.pt").write_bytes(data)
    assert not torch.load(tmp_path / "a.pt").equal(torch.ones(100))
    with refused("is damaged: the checksum of a/data/0 differs"):
        load_embeddings(tmp_path / "a.pt")


def test_npz_bombs(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros(20_000_000, np.float32))
    with refused("announces 80,000,000 bytes"):
        load_embeddings(tmp_path / "a.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10)}
    )
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "b.npz", "w", compression) as archive:
            archive.writestr("features.npy", header.getvalue() + bytes(100))
        with refused("announces"):
            load_embeddings(tmp_path / "b.npz")


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "b"]),
        np.zeros(3, [("x", "f4")]),
        np.zeros(3, bool),
        np.zeros(3, "M8[s]"),
        np.float32(1),
    ],
    ids=str,
)
def test_npz_files_that_hold_something_else(array: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=array)
    with refused():
        load_embeddings(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", other=np.ones(3))
    with refused("no array called features or latents"):
        load_embeddings(tmp_path / "b.npz")


def soft_link(file: h5py.File, victim: Path) -> None:
    file["group"] = h5py.ExternalLink(str(victim), "/")
    file["features"] = h5py.SoftLink("/group/features")


def external_data(file: h5py.File, victim: Path) -> None:
    file.create_dataset("features", (12, 5), "f4", external=[(str(victim), 0, 240)])


def virtual(file: h5py.File, victim: Path) -> None:
    layout = h5py.VirtualLayout((12, 5), "f4")
    layout[:] = h5py.VirtualSource(str(victim), "features", (12, 5))
    file.create_virtual_dataset("features", layout)


def external_link(file: h5py.File, victim: Path) -> None:
    file["features"] = h5py.ExternalLink(str(victim), "features")


@pytest.mark.parametrize("lead", [soft_link, external_data, virtual, external_link])
def test_h5_files_that_lead_to_other_files(lead: Callable[[h5py.File, Path], None], tmp_path: Path) -> None:
    victim = h5(tmp_path / "victim.h5", features=VALUES.numpy())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        lead(file, victim)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].shape == (12, 5), "it leads there"
    with refused("other files"):
        load_embeddings(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.move("features", "coords")
    victim.unlink()  # it is not looked for
    with refused("other files"):
        load_coords(tmp_path / "a.h5")


def test_h5_bombs(tmp_path: Path) -> None:
    def refuse(match: str, shape: tuple[int, ...], *, data: Any = None, **options: Any) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("features", shape, "f4", data=data, **options)
        with refused(match):
            load_embeddings(tmp_path / "a.h5")

    refuse("announces 4,000,000,000,000 bytes", (10**9, 1000), chunks=(1, 1000))
    refuse("announces 4,000,000 bytes", (1000, 1000))
    refuse("announces 4,000,000,000,000 bytes", (10**9, 1000), chunks=(1, 1000), compression="gzip")
    zeros = np.zeros((20_000, 1000), np.float32)
    refuse("announces 80,000,000 bytes", zeros.shape, data=zeros, chunks=(2000, 1000), compression="gzip")
    refuse("announces 400,000,000 bytes", (10, 10), chunks=(10_000, 10_000), maxshape=(None, None))
    refuse("filters", (10, 10), chunks=(10, 10), scaleoffset=3)


def test_an_h5_file_of_which_rows_were_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = file.create_dataset("features", (40, 5), "f4", chunks=(1, 5))
        rows[:39] = 1.0
    with refused("not all was written"):
        load_embeddings(tmp_path / "a.h5")


def test_h5_files_that_hold_something_else(tmp_path: Path) -> None:
    contents: list[Any] = [
        np.ones((3, 2), np.int32),
        np.array([b"text"]),
        np.zeros(3, [("x", "f4")]),
        np.float32(1.0),
        h5py.Empty("f4"),
        "text",
    ]
    for content in contents:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["features"] = content
        with refused():
            load_embeddings(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_group("features")
        file["coords"] = np.ones((3, 3), np.int64)
    with refused("a group"):
        load_embeddings(tmp_path / "b.h5")
    with refused(r"\(3, 3\), not \(N, 2\) integers"):
        load_coords(tmp_path / "b.h5")
    h5(tmp_path / "c.h5", coords=COORDS.astype(float))
    with refused("float64"):
        load_coords(tmp_path / "c.h5")
    with refused("no array called"):
        load_embeddings(tmp_path / "c.h5")


def test_safetensors_files_that_hold_something_else(tmp_path: Path) -> None:
    for tensor in (torch.ones(3, dtype=torch.int32), torch.ones(()), torch.ones(3).to(torch.float8_e4m3fn)):
        save_file({"features": tensor}, tmp_path / "a.safetensors")
        with refused():
            load_embeddings(tmp_path / "a.safetensors")
    header = b'{"features":{"dtype":"F32","shape":[1000000,1000],"data_offsets":[0,4000000000]}}'
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with refused():
        load_embeddings(tmp_path / "b.safetensors")


def originals(file_format: str, folder: Path) -> list[bytes]:
    """Small valid files: ours, and other layouts of the format."""
    found = [write(folder, file_format=file_format).path.read_bytes()]
    path = folder / f"b.{file_format}"
    if file_format == "pt":
        torch.save(VALUES, path, _use_new_zipfile_serialization=False)
    elif file_format == "npz":
        np.savez_compressed(path, features=VALUES.numpy())
    elif file_format == "h5":
        with h5py.File(path, "w", libver="latest") as file:
            file.create_dataset("features", data=VALUES.numpy(), chunks=(4, 5), compression="gzip")
            file.create_dataset("coords", data=COORDS, chunks=(1, 2), maxshape=(None, 2))
    if path.exists():
        found.append(path.read_bytes())
        path.unlink()
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, numbers replaced, parts cut, doubled or inserted."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(made))
        match chance.randrange(6):
            case 0:
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                made[at] = chance.choice((0, 127, 128, 255))
            case 2:
                number = chance.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(made)))
                made[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                made[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                source = chance.randrange(len(made))
                made[at : at + 16] = made[source : source + 16]
            case 5:
                del made[max(at, 1) :]
    return bytes(made)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file_format", FORMATS)
def test_mutated_files_are_read_or_refused(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(20)
    valid = originals(file_format, tmp_path / "valid")
    inside, beside = tmp_path / "in", tmp_path / "cwd"
    inside.mkdir()
    beside.mkdir()
    monkeypatch.chdir(beside)
    path, refusals = inside / f"a.{file_format}", 0
    for _ in range(MUTANTS):
        path.write_bytes(mutated(chance.choice(valid), chance))
        try:
            found = load_embeddings(path)
            assert found.is_floating_point() and 1 <= found.ndim <= 3
            assert found.sum().dtype == found.dtype  # all of it can be touched
            load_coords(path)
        except ArtifactError:
            refusals += 1
    assert MUTANTS // 10 < refusals < MUTANTS, "some are refused, harmless ones are read"
    assert [found.name for found in inside.iterdir()] == [path.name] and not list(beside.iterdir())
