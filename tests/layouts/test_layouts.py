"""Layouts of other tools, read as their sources and documentation say, without our own code: CLAM, TRIDENT
and STAMP by short readers (the others are in `test_their_readers.py`). Sizes are held against the slide,
opened with OpenSlide.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import torch
import typer
import zarr
from layout_helpers import SIDE, SIZE, SPACING, features, write
from pyarrow import dataset, parquet
from typer.testing import CliRunner

from slide2vec.artifacts import write_slide_embedding
from slide2vec.artifacts.vectors import write_patient_embedding
from slide2vec.cli.export import export as export_command
from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.layouts import export_layout
from slide2vec.layouts.item import name_elsewhere
from slide2vec.layouts.lazyslide import _factor
from slide2vec.tiling import Tiling, load_coordinates, write_coordinates


def boxes(tiling: Tiling) -> set[tuple[int, int, int]]:
    """x, y and side of the tiles, level-0 px."""
    return {(x, y, SIDE) for x, y in zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)}


def test_clam(run: Path, tiling: Tiling, slide: Path, tmp_path: Path) -> None:
    """dataset_generic.py loads pt_files and h5_files; dataset_h5.py reads `patch_size` px at a level."""
    done, left = export_layout(run, tmp_path, "clam", encoder="uni")
    assert [item.sample_id for item in done] == ["a", "tumor/a"]
    (blank,) = left
    assert blank.sample_id == "b" and blank.left_out and "no tiles" in str(blank.error)
    bag = torch.load(tmp_path / "pt_files/a.pt", weights_only=True)
    assert bag.dtype == torch.float32 and np.array_equal(bag.numpy(), features(run))
    with h5py.File(tmp_path / "h5_files/a.h5") as file:
        assert np.array_equal(file["features"][:], features(run))
        coords = file["coords"][:]
    with h5py.File(tmp_path / "patches/a.h5") as file:
        assert np.array_equal(file["coords"][:], coords) and file["coords"].attrs["name"] == "a"
        size, level = (file["coords"].attrs[name] for name in ("patch_size", "patch_level"))
    side = round(size * openslide.open_slide(slide).level_downsamples[level])
    assert {(int(x), int(y), side) for x, y in coords} == boxes(tiling)
    assert (tmp_path / "tumor/pt_files/a.pt").is_file()


def test_clam_takes_sizes_of_a_level_or_none(tiling: Tiling, tmp_path: Path) -> None:
    coarse = replace(tiling.geometry, read_level=1)  # 230 px of it are 920 px of level 0
    write(tmp_path / "run", replace(tiling, geometry=coarse))
    done, (refused,) = export_layout(tmp_path / "run", tmp_path / "out", "clam")
    assert not done and not refused.left_out
    assert "no patch_size is right for CLAM" in str(refused.error) and "230 px" in str(refused.error)
    assert not (tmp_path / "out").exists()


def test_clam_has_float32_only(tiling: Tiling, tmp_path: Path) -> None:
    write(tmp_path / "run", tiling)
    with pytest.raises(ConfigError, match="fp32 only"):
        export_layout(tmp_path / "run", tmp_path / "out", "clam", "fp16")


def patcher(attributes: Any) -> int:
    """Side at level 0, as TRIDENT's WSIPatcher computes it."""
    source, target = 10 / attributes["level0_magnification"], 10 / attributes["target_magnification"]
    return round(attributes["patch_size"] * (target / source))


def test_trident(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    """Processor.py: the folder of coordinates, `patches/`, `features_<its name of the encoder>/`."""
    done, _ = export_layout(run, tmp_path, "trident")
    assert [item.sample_id for item in done] == ["a", "b", "tumor/a"]
    job = tmp_path / f"{10 / SPACING:g}x_{SIZE}px_0px_overlap"
    with h5py.File(job / "patches/a_patches.h5") as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
    side = patcher(attributes)
    assert {(int(x), int(y), side) for x, y in coords} == boxes(tiling)
    assert (attributes["patch_size"], attributes["patch_size_level0"]) == (SIZE, SIDE)
    assert (attributes["level0_width"], attributes["level0_height"]) == tiling.dimensions
    assert "patch_level" not in attributes
    with h5py.File(job / "features_uni_v1/a.h5") as file:
        assert np.array_equal(file["features"][:], features(run))
        assert np.array_equal(file["coords"][:], coords)
        assert dict(file["coords"].attrs) == attributes and file["features"].attrs["encoder"] == "uni_v1"
    with h5py.File(job / "features_uni_v1/b.h5") as file:
        assert file["features"].shape == (0, 1024)


def test_trident_takes_sizes_from_magnifications_that_give_the_true_one(
    tiling: Tiling, tmp_path: Path
) -> None:
    """A slide of 0.2526 um/px is 40x by its name, which would make tiles of 230 px."""
    odd = replace(tiling.geometry, base_spacing_um=0.2526, tile_size_lv0=228)
    write(tmp_path / "run", replace(tiling, geometry=odd))
    (done,), _ = export_layout(tmp_path / "run", tmp_path / "out", "trident")
    with h5py.File(done.path) as file:
        assert patcher(file["coords"].attrs) == 228


def test_trident_of_slides(tiling: Tiling, tmp_path: Path) -> None:
    write_coordinates(tmp_path / "run/tiles", tiling)
    vector = torch.arange(768.0)
    write_slide_embedding(tmp_path / "run", "a", vector, encoder={"name": "titan", "level": "slide"})
    (done,), _ = export_layout(tmp_path / "run", tmp_path / "out", "trident")
    assert done.path.parent.name == "slide_features_titan"
    with h5py.File(done.path) as file:
        assert np.array_equal(file["features"][:], vector) and patcher(file["coords"].attrs) == SIDE


def test_stamp(run: Path, tiling: Tiling, slide: Path, tmp_path: Path) -> None:
    """data.py `get_coords`, and heatmaps, which divide by the µm/px that OpenSlide says."""
    done, left = export_layout(run, tmp_path, "stamp")
    assert [item.path.relative_to(tmp_path).as_posix() for item in done] == ["uni/a.h5", "tumor/uni/a.h5"]
    assert [(item.sample_id, item.left_out) for item in left] == [("b", True)]
    mpp = float(openslide.open_slide(slide).properties["openslide.mpp-x"])
    with h5py.File(tmp_path / "uni/a.h5") as file:
        assert np.array_equal(file["feats"][:], features(run))
        found = dict(file.attrs)
        coords = np.round(file["coords"][:] / mpp).astype(int)
    assert {(x, y, round(found["tile_size_um"] / mpp)) for x, y in coords.tolist()} == boxes(tiling)
    assert (found["unit"], found["feat_type"], found["extractor"]) == ("um", "tile", "uni")
    assert found["tile_size_um"] / found["tile_size_px"] == pytest.approx(SIDE * 0.25 / SIZE)
    assert not {"stamp_version", "encoder"} & found.keys()  # it would take the file for another kind


def test_stamp_of_patients(tmp_path: Path) -> None:
    encoder = {"name": "moozy", "level": "patient"}
    write_patient_embedding(tmp_path / "run", "p 1", torch.arange(5.0), num_slides=1, encoder=encoder)
    (done,), _ = export_layout(tmp_path / "run", tmp_path / "out", "stamp")
    assert done.path == tmp_path / "out/moozy-pat/p 1.h5"
    with h5py.File(done.path) as file:
        assert np.array_equal(file["feats"][:], np.arange(5.0)) and file.attrs["feat_type"] == "patient"


def test_what_a_tool_has_no_place_for_is_left_out(tmp_path: Path) -> None:
    encoder = {"name": "titan", "level": "slide"}
    write_slide_embedding(tmp_path / "run", "a", torch.arange(6.0), encoder=encoder)
    done, (left,) = export_layout(tmp_path / "run", tmp_path / "out", "clam")
    assert not done and left.left_out and "no place for embeddings of slides" in str(left.error)


@pytest.mark.parametrize(
    ("encoder", "preset", "dim", "expected"),
    [
        ("virchow", "virchow", 2560, "virchow-full"),
        ("virchow2", "virchow2", 1280, "virchow2"),
        ("virchow2", "virchow2", 2560, "slide2vec-virchow2"),  # STAMP's are class tokens
        ("virchow2-bf16", "virchow2", 1280, "virchow2-bf16"),  # the second of a run
        ("scattering", "scattering", 195, "scattering"),
    ],
)
def test_an_encoder_has_a_name_of_the_tool_only_if_it_is_that(
    encoder: str, preset: str, dim: int, expected: str
) -> None:
    from slide2vec.layouts.item import Item
    from slide2vec.layouts.stamp import _EXTRACTORS

    item = Item(
        encoder=encoder,
        kind="tile",
        name="a",
        values=torch.zeros(1, dim),
        tiling=None,
        metadata={"encoder_name": preset},
        run=Path(),
        output=Path(),
    )
    assert name_elsewhere(item, _EXTRACTORS) == expected


def test_zarr(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    done, left = export_layout(run, tmp_path, "zarr", "fp16")
    assert [item.sample_id for item in done] == ["a", "b", "tumor/a"] and not left
    group = zarr.open_group(str(tmp_path / "tile_embeddings/a.zarr"), mode="r")
    assert np.array_equal(group["features"][:], features(run).astype(np.float16))
    assert np.array_equal(group["coords"][:], np.stack([tiling.x, tiling.y], axis=1))
    assert group.attrs["encoder_name"] == "uni" and group.attrs["base_spacing_um"] == 0.25
    assert zarr.open_group(str(tmp_path / "tile_embeddings/b.zarr"))["features"].shape == (0, 1024)
    assert (tmp_path / "tile_embeddings/tumor/a.zarr/.zgroup").is_file()
    assert not [path for path in tmp_path.rglob(".*.partial")]
    again, _ = export_layout(run, tmp_path, "zarr")  # in its place
    assert len(again) == 3
    assert zarr.open_group(str(tmp_path / "tile_embeddings/a.zarr"))["features"].dtype == np.float32


def test_a_folder_of_somebody_else_is_not_replaced(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "tile_embeddings/a.zarr"
    own.mkdir(parents=True)
    (own / "kept").write_text("")
    _, (refused,) = export_layout(run, tmp_path, "zarr")
    assert refused.sample_id == "a" and "none of ours" in str(refused.error) and (own / "kept").is_file()


def invoke(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(export_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_parquet(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    result = invoke(run, "-o", tmp_path, "--format", "parquet")
    assert result.exit_code == 0 and "of 3 slides" in result.stdout, result.output
    table = parquet.read_table(tmp_path / "tiles/a.parquet")
    frame = table.to_pandas()
    assert frame.tissue_fraction.to_numpy().dtype == np.float32
    assert np.array_equal(frame[["x", "y"]], np.stack([tiling.x, tiling.y], axis=1))
    for name, shares in load_coordinates(run / "tiles", "a").artefacts.items():
        assert np.array_equal(frame[name], shares), name
    about = json.loads(table.schema.metadata[b"slide2vec"])
    assert (about["tile_size_lv0"], about["base_spacing_um"]) == (SIDE, 0.25)
    whole = dataset.dataset(tmp_path / "tiles").to_table().to_pandas()
    assert set(whole.sample_id) == {"a"} and set(whole.annotation.dropna()) == {"tumor"}
    assert whole.pen.notna().sum() == 2 * len(tiling)


def test_command_line(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "-o", tmp_path / "clam", "--layout", "clam", "--json")
    assert result.exit_code == 0, result.output  # the blank slide is no failure
    found = json.loads(result.stdout)
    assert found["layout"] == "clam" and found["failed"][0]["left_out"] is True
    result = invoke(run, "-o", tmp_path / "x", "--layout", "clam", "--format", "pt")
    assert isinstance(result.exception, ConfigError) and "leave out --format" in str(result.exception)


def test_a_missing_package_is_named_with_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ExtraMissingError, match=r"install .*\[zarr\]"):
        export_layout(run, tmp_path, "zarr")


@pytest.mark.parametrize("size", [96, 224, 256, 518])
def test_lazyslide_cuts_factors_down_to_the_true_px(size: int) -> None:
    """wsidata: `int(width * base_downsample)`."""
    for wanted in range(size, 5 * size):
        assert int(size * _factor(size, wanted)) == wanted
