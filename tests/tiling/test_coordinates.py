"""Coordinate files: what is written can be read, here and by hs2p; old layouts; what is refused."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.errors import TilingError
from slide2vec.tiling import Tiling, load_coordinates, read_coordinates, tile_slide, write_coordinates
from slide2vec.tiling.coordinates import check_tiling, coordinate_paths, find_coordinates

Meta = dict[str, dict[str, Any]]

CONFIG = settings(requested_tile_size_px=100, overlap=0.25)


def reader(width: int = 1000) -> ArrayReader:
    return ArrayReader([blank(width, 800, (100, 50, 500, 400)), blank(width // 4, 200, (25, 12, 125, 100))])


@pytest.fixture
def tiling() -> Tiling:
    return tile_slide(reader(), a_slide(spacing_at_level_0=0.5), 0.5, CONFIG)[0]


def edit(folder: Path, change: Callable[[Meta], object]) -> None:
    path = coordinate_paths(folder, "s")[1]
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def same(first: Tiling, second: Tiling) -> bool:
    arrays = ("x", "y", "tissue_fractions")
    for name in arrays:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype
    blanks = {name: np.empty(0) for name in arrays}
    one, two = asdict(replace(first, **blanks)), asdict(replace(second, **blanks))
    return all(one[name] == two[name] for name in one if name not in arrays)


def test_a_written_tiling_is_read_back(tiling: Tiling, tmp_path: Path) -> None:
    arrays, metadata = write_coordinates(tmp_path, tiling)
    assert (arrays, metadata) == coordinate_paths(tmp_path, "s")
    assert len(tiling) > 20 and same(load_coordinates(tmp_path, "s"), tiling)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "s.coordinates.meta.json",
        "s.coordinates.npz",
    ]


def test_the_files_hold_what_hs2p_asks_for(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    arrays, metadata = coordinate_paths(tmp_path, "s")
    with np.load(arrays) as data:
        assert {name: data[name].dtype.name for name in data.files} == {
            "tile_index": "int32",
            "x": "int64",
            "y": "int64",
            "tissue_fractions": "float32",
        }
    text = metadata.read_text()
    meta = json.loads(text)
    assert text == json.dumps(meta, indent=2, sort_keys=True) + "\n"
    assert {section: len(keys) for section, keys in meta.items()} == {
        **{"provenance": 8, "slide": 3, "tiling": 12, "segmentation": 16, "filtering": 13, "artifact": 5}
    }


def test_hs2p_itself_loads_the_files(tiling: Tiling, tmp_path: Path) -> None:
    artifacts = pytest.importorskip("hs2p.artifacts", reason="hs2p is not installed")
    paths = write_coordinates(tmp_path, tiling)
    loaded = artifacts.load_tiling_result(*paths)
    np.testing.assert_array_equal(loaded.x, tiling.x)
    assert loaded.read_tile_size_px == tiling.geometry.read_tile_size_px


def test_back_ends_have_the_names_that_hs2p_opens_their_slides_with(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, replace(tiling, backend="dicom", requested_backend="dicom"))
    meta = json.loads(coordinate_paths(tmp_path, "s")[1].read_text())
    assert {meta["provenance"][name] for name in ("backend", "requested_backend")} == {"openslide"}


def test_no_tiles_no_arrays(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    nothing = {"x": np.empty(0, np.int64), "y": np.empty(0, np.int64)}
    empty = replace(tiling, tissue_fractions=np.empty(0, np.float32), **nothing)
    arrays, metadata = write_coordinates(tmp_path, empty)
    assert arrays is None and [path.name for path in tmp_path.iterdir()] == [metadata.name]
    assert same(load_coordinates(tmp_path, "s"), empty)


def as_of_3_2(meta: Meta) -> None:
    for name in ("spacing_at_level_0", "mask_backend", "requested_mask_backend"):
        del meta["provenance"][name]
    for name in ("requested_seg_downsample", "sam2_checkpoint_path", "sam2_config_path"):
        del meta["segmentation"][name]
    meta["segmentation"].update(use_otsu=False, use_hsv=True)


def as_of_3_0(meta: Meta) -> None:
    as_of_3_2(meta)
    for name in ("tile_size_px", "spacing_um"):
        meta["tiling"][f"effective_{name}"] = meta["tiling"].pop(f"read_{name}")


@pytest.mark.parametrize("change", [as_of_3_2, as_of_3_0])
def test_older_layouts_are_read(change: Callable[[Meta], None], tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    edit(tmp_path, change)
    if change is as_of_3_0:
        arrays = {"tile_index": np.arange(len(tiling)), "coordinates": np.stack([tiling.x, tiling.y], 1)}
        np.savez(coordinate_paths(tmp_path, "s")[0], tissue_fractions=tiling.tissue_fractions, **arrays)
    loaded = load_coordinates(tmp_path, "s")
    # 3.x recorded the downsample that was found only.
    found = replace(tiling.segmentation, requested_downsample=tiling.segmentation.downsample)
    assert same(loaded, replace(tiling, spacing_at_level_0=None, segmentation=found))


def test_the_folder_tiles_is_looked_into(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path / "tiles", tiling)
    for folder in (tmp_path, tmp_path / "tiles"):
        assert find_coordinates(folder, "s") == tmp_path / "tiles"
        assert len(read_coordinates(folder, "s")) == len(tiling)
    assert find_coordinates(tmp_path / "tiles", "t") is None


@pytest.mark.parametrize(
    ("slide", "width", "config", "what"),
    [
        ({"spacing_at_level_0": 0.25}, 1000, {}, "spacing_at_level_0"),
        ({}, 1004, {}, "dimensions"),
        ({}, 1000, {"requested_tile_size_px": 224}, "tile size"),
        ({}, 1000, {"requested_spacing_um": 1.0}, "spacing"),
    ],
)
def test_coordinates_of_something_else_are_refused(
    slide: dict[str, Any], width: int, config: dict[str, Any], what: str, tiling: Tiling, tmp_path: Path
) -> None:
    write_coordinates(tmp_path, tiling)
    with pytest.raises(TilingError, match=f"slide s: .*{what}"):
        loaded = read_coordinates(tmp_path, "s")
        check_tiling(loaded, a_slide(**slide), reader(width), CONFIG.updated(**config))


def test_another_slides_coordinates_under_this_name(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    edit(tmp_path, lambda meta: meta["provenance"].update(sample_id="t"))
    with pytest.raises(TilingError, match="sample_id"):
        check_tiling(read_coordinates(tmp_path, "s"), a_slide(), reader(), CONFIG)


def test_missing_files(tiling: Tiling, tmp_path: Path) -> None:
    with pytest.raises(TilingError, match=r"slide s: .*meta\.json does not exist"):
        load_coordinates(tmp_path, "s")
    write_coordinates(tmp_path, tiling)
    coordinate_paths(tmp_path, "s")[0].unlink()
    with pytest.raises(TilingError, match=r"npz does not exist"):
        load_coordinates(tmp_path, "s")


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("tiling"),
        lambda meta: meta["tiling"].pop("read_level"),
        lambda meta: meta["tiling"].update(n_tiles=3),
        lambda meta: meta["tiling"].update(read_tile_size_px=0),
        lambda meta: meta["slide"].update(base_spacing_um=None),
        lambda meta: meta["slide"].update(dimensions=[5]),
        lambda meta: meta.update(tiling=[]),
        lambda meta: meta["tiling"].update(read_spacing_um=True),
        lambda meta: meta["tiling"].update(requested_spacing_um="12"),
        lambda meta: meta["provenance"].update(requested_backend=3.5),
        lambda meta: meta["filtering"].update(a_t=True),
        lambda meta: meta["slide"].update(level_downsamples=[1.0, float("inf")]),
        lambda meta: meta["provenance"].update(mask_backend=float("nan")),
    ],
)
def test_damaged_metadata(change: Callable[[Meta], object], tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    edit(tmp_path, change)
    with pytest.raises(TilingError, match=r"slide s: .*cannot be read"):
        load_coordinates(tmp_path, "s")


@pytest.mark.parametrize(
    "name", ["seg_spacing_um", "seg_level", "seg_downsample", "requested_seg_downsample"]
)
def test_a_segmentation_without_its_numbers(name: str, tiling: Tiling, tmp_path: Path) -> None:
    """HS2P always writes them, in the versions that have them."""
    write_coordinates(tmp_path, tiling)
    edit(tmp_path, lambda meta: meta["segmentation"].update({name: None}))
    with pytest.raises(TilingError, match=rf"slide s: .*segmentation\.{name} is None, not a number"):
        load_coordinates(tmp_path, "s")


@pytest.mark.parametrize("which", [0, 1])
def test_truncated_files(which: int, tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    path = coordinate_paths(tmp_path, "s")[which]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TilingError, match="slide s: "):
        load_coordinates(tmp_path, "s")


def test_a_write_that_fails_leaves_nothing(
    tiling: Tiling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coordinates(tmp_path, tiling)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        write_coordinates(tmp_path, tiling)
    assert [path.name for path in tmp_path.iterdir()] == ["s.coordinates.npz"]


def test_damaged_files_are_errors_at_worst(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    paths = coordinate_paths(tmp_path, "s")
    whole, chance = [path.read_bytes() for path in paths], random.Random(0)
    outcomes = set()
    for number in range(1500):
        data = bytearray(whole[number % 2])
        for _ in range(chance.randrange(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        paths[number % 2].write_bytes(data[: chance.randrange(len(data)) if number % 5 == 0 else None])
        try:
            outcomes.add(len(load_coordinates(tmp_path, "s")) == len(tiling))
        except TilingError as error:
            assert str(error).startswith("slide s: ")
            outcomes.add("error")
        paths[number % 2].write_bytes(whole[number % 2])
    assert outcomes == {True, "error"}


@pytest.mark.parametrize("value", [None, -1, 0, 1e400, float("nan"), "x", [], {}, 10**30, [1]])
def test_impossible_values_are_errors_at_worst(value: Any, tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    path = coordinate_paths(tmp_path, "s")[1]
    whole = json.loads(path.read_text())
    for section, values in whole.items():
        for name in values:
            path.write_text(json.dumps({**whole, section: {**values, name: value}}))
            try:
                geometry = load_coordinates(tmp_path, "s").geometry
            except TilingError:
                continue
            assert 0 < geometry.read_tile_size_px < 100_000 and geometry.read_spacing_um > 0
    path.write_text("[" * 100_000)
    with pytest.raises(TilingError):
        load_coordinates(tmp_path, "s")


def with_arrays(folder: Path, **changes: Any) -> None:
    path = coordinate_paths(folder, "s")[0]
    with np.load(path) as data:
        arrays = {name: data[name] for name in data}
    np.savez_compressed(path, **{**arrays, **changes})


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("value", [-1, 1000, 2**40])
def test_tiles_that_are_not_on_the_slide(name: str, value: int, tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path, tiling)
    changed = getattr(tiling, name).copy()
    changed[[7, 9]] = value
    with_arrays(tmp_path, **{name: changed})
    told = f"2 of {len(tiling)} are not on the slide: tile 7 has {name}={value}, and {name} goes from 0 to "
    with pytest.raises(TilingError, match=told):
        load_coordinates(tmp_path, "s")
    given = replace(tiling, **{name: changed})  # as a caller may give it
    with pytest.raises(TilingError, match=told):
        check_tiling(given, a_slide(), reader(), CONFIG)


def test_tiles_may_overhang_the_edge(tiling: Tiling, tmp_path: Path) -> None:
    x, y = tiling.x.copy(), tiling.y.copy()
    x[-1], y[-1] = 999, 799
    write_coordinates(tmp_path, replace(tiling, x=x, y=y))
    assert (load_coordinates(tmp_path, "s").x[-1], load_coordinates(tmp_path, "s").y[-1]) == (999, 799)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x": lambda x: x.astype(float)}, "x is float64, not whole numbers"),
        ({"y": lambda y: np.where(np.arange(len(y)) == 5, np.nan, y)}, "y is float64, .*, tile 5 has nan"),
        ({"x": lambda x: x.astype(np.uint64) + 2**63}, "are not on the slide: tile 0 has x="),
        (
            {"tissue_fractions": lambda f: np.where(np.arange(len(f)) == 3, np.nan, f)},
            "tile 3 has the tissue",
        ),
        ({"tissue_fractions": lambda f: f + 1}, "tile 0 has the tissue fraction"),
        ({"x": lambda x: x[:-1]}, "does not hold the"),
        ({"x": lambda x: np.zeros((len(x), 1000), np.int64)}, "more than the .* numbers of its record"),
    ],
)
def test_numbers_that_no_tiles_have(
    changes: dict[str, Callable[[Any], Any]], told: str, tiling: Tiling, tmp_path: Path
) -> None:
    write_coordinates(tmp_path, tiling)
    with_arrays(tmp_path, **{name: change(getattr(tiling, name)) for name, change in changes.items()})
    with pytest.raises(TilingError, match=told):
        load_coordinates(tmp_path, "s")


@pytest.mark.slow
def test_arrays_are_bounded_before_they_are_read(tiling: Tiling, tmp_path: Path) -> None:
    """Metadata and arrays agree on a number of tiles that the file could hold only as a bomb."""
    write_coordinates(tmp_path, tiling)
    count = 40_000_000
    edit(tmp_path, lambda meta: meta["tiling"].update(n_tiles=count))
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    with zipfile.ZipFile(coordinate_paths(tmp_path, "s")[0], "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("tile_index", "x", "y", "tissue_fractions"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(8 * count // 2**20):
                    member.write(bytes(2**20))
    with pytest.raises(TilingError, match="announces 320,000,000 bytes"):
        load_coordinates(tmp_path, "s")


def test_pipes_and_large_metadata_are_refused(tiling: Tiling, tmp_path: Path) -> None:
    metadata = coordinate_paths(tmp_path, "s")[1]
    os.mkfifo(metadata)
    with pytest.raises(TilingError, match="is a named pipe"):
        load_coordinates(tmp_path, "s")
    metadata.unlink()
    write_coordinates(tmp_path, tiling)
    os.truncate(metadata, 2**40)
    with pytest.raises(TilingError, match="it has more than"):
        load_coordinates(tmp_path, "s")


class Cycle:
    """Garbage whose collection lets other threads run."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        for _ in range(30):
            pass


def test_reading_in_several_threads(tiling: Tiling, tmp_path: Path) -> None:
    """NumPy's way of reading a header fails when a garbage collection brings two of them together."""
    write_coordinates(tmp_path, tiling)

    def read(_: int) -> bool:
        Cycle()
        return same(load_coordinates(tmp_path, tiling.sample_id), tiling)

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(1500)))
    finally:
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)


def test_our_own_back_end_has_a_name_that_hs2p_opens(tiling: Tiling, tmp_path: Path) -> None:
    read = replace(tiling, backend="tiff", requested_backend="tiff")
    _, metadata = write_coordinates(tmp_path, read)
    provenance = json.loads(metadata.read_text())["provenance"]
    assert (provenance["backend"], provenance["requested_backend"]) == ("tifffile", "tifffile")
    assert same(load_coordinates(tmp_path, "s"), read)
    edit(tmp_path, lambda meta: meta["provenance"].update(backend="tiff", requested_backend="auto"))
    assert same(load_coordinates(tmp_path, "s"), replace(read, requested_backend="auto"))
