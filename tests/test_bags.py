"""Bags of a run: what is in them, and what is said of those that are missing."""

from __future__ import annotations

import logging
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader

from slide2vec import BagDataset, EmbeddedSlide
from slide2vec.artifacts import load_embeddings, write_tile_embeddings
from slide2vec.artifacts.export import export_run
from slide2vec.artifacts.mapped import map_embeddings
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, tile_slide, write_coordinates


@pytest.fixture(scope="module")
def tiling(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Tiling:
    path = generated_slide(tmp_path_factory.mktemp("slide") / "a.svs", size_px=1500, seed=3, levels=2)
    slide = Slide(sample_id="a", image_path=path)
    config = PreprocessingConfig(requested_spacing_um=1.0, requested_tile_size_px=64)
    with open_slide(slide) as reader:
        return tile_slide(reader, slide, 0.25, config)[0]


def write(run: Path, tiling: Tiling, name: str, count: int, encoder: str = "uni", dim: int = 6) -> None:
    """A slide of the first tiles, with random embeddings."""
    from dataclasses import replace

    own = replace(
        tiling,
        sample_id=name,
        x=tiling.x[:count],
        y=tiling.y[:count],
        tissue_fractions=tiling.tissue_fractions[:count],
    )
    embedded = EmbeddedSlide(
        sample_id=name,
        tile_embeddings=torch.randn((count, dim), generator=torch.Generator().manual_seed(count)),
        slide_embedding=None,
        x=own.x,
        y=own.y,
        tile_size_lv0=own.geometry.tile_size_lv0,
        image_path=own.image_path,
        mask_path=None,
        num_tiles=count,
    )
    root = run.parents[1] if run.parent.name == "encoders" else run
    write_tile_embeddings(
        run,
        embedded,
        own,
        encoder={"name": encoder, "level": "tile"},
        coordinates=write_coordinates(root / "tiles", own),
    )


@pytest.fixture(scope="module")
def run(tiling: Tiling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides 001 and 002 with 3 and 5 tiles, and blank without."""
    folder = tmp_path_factory.mktemp("bags")
    for name, count in (("001", 3), ("002", 5), ("blank", 0)):
        write(folder, tiling, name, count)
    return folder


def stored(run: Path, name: str) -> torch.Tensor:
    return torch.load(run / f"tile_embeddings/{name}.pt", weights_only=True)


def test_bags_with_labels_of_a_table(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("slide,grade\n002,high\n001,low\n")
    bags = BagDataset(run, table, label="grade", sample_id="slide")
    assert (bags.sample_ids, bags.classes, bags.unlabelled) == (["001", "002"], ("high", "low"), ("blank",))
    assert bags.targets is not None and bags.targets.tolist() == [1, 0]
    bag = bags[1]
    assert bag["sample_id"] == "002" and torch.equal(bag["features"], stored(run, "002"))
    assert np.array_equal(bag["coords"], np.stack([tiling.x[:5], tiling.y[:5]], axis=1))
    assert bag["label"].item() == 0 and bag["label"].dtype == torch.int64
    frame = pandas.DataFrame({"sample_id": ["001", "002"], "label": [0.5, None]})
    numbers = BagDataset(run, frame)
    assert numbers.sample_ids == ["001"] and numbers[0]["label"].item() == 0.5
    assert "label" not in BagDataset(run, missing="skip")[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_loader(run: Path, workers: int) -> None:
    bags = pickle.loads(pickle.dumps(BagDataset(run, {"001": 1, "002": 0})))
    context = "fork" if workers else None  # what others would be sent is pickled above
    loaded = list(DataLoader(bags, batch_size=None, num_workers=workers, multiprocessing_context=context))
    assert [tuple(bag["features"].shape) for bag in loaded] == [(3, 6), (5, 6)]


def test_missing_slides_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = {"001": 1, "blank": 0, "gone": 1}
    with pytest.raises(ArtifactError, match=r"2 slides are missing: blank \(no tiles\), gone \(no complete"):
        BagDataset(run, labels)
    with caplog.at_level(logging.WARNING):
        bags = BagDataset(run, labels, missing="skip")
    assert bags.sample_ids == ["001"] and set(bags.missing) == {"blank", "gone"}
    assert "blank (no tiles)" in caplog.text and "1 slides have no label" in caplog.text


def test_several_encoders(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    both = Path(shutil.copytree(run, tmp_path / "run"))
    write(both / "encoders/conch", tiling, "001", 3, "conch", 4)
    with pytest.raises(ConfigError, match=r"uni, conch: say which"):
        BagDataset(both)
    with pytest.raises(ConfigError, match="'conc'"):
        BagDataset(both, encoders="conc")
    bags = BagDataset(both, {"001": 0, "002": 1}, encoders=["uni", "conch"], missing="skip")
    assert bags.missing == {"002": "no complete embeddings of conch"}
    assert {name: tuple(each.shape) for name, each in bags[0]["features"].items()} == {
        "uni": (3, 6),
        "conch": (3, 4),
    }
    assert torch.equal(bags[0]["coords"]["uni"], bags[0]["coords"]["conch"])
    assert BagDataset(both, {"001": 0}, encoders="conch")[0]["features"].shape == (3, 4)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pandas.DataFrame({"id": ["001"], "label": [1]}), "no column 'sample_id', but id, label"),
        (pandas.DataFrame({"sample_id": ["001", "001"], "label": [1, 2]}), "001 has two labels, 1 and 2"),
        ({"001": "a", "002": 1}, "labels are int, str"),
    ],
)
def test_labels_that_cannot_be_understood(run: Path, labels: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BagDataset(run, labels)


def test_a_slide_that_was_tiled_anew(run: Path, tiling: Tiling, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    for end in ("npz", "meta.json"):
        shutil.copy(run / f"tiles/002.coordinates.{end}", own / f"tiles/001.coordinates.{end}")
    with pytest.raises(ArtifactError, match="3 embeddings and coordinates of 5 tiles"):
        BagDataset(own, {"001": 0})[0]


@pytest.mark.parametrize("file_format", ["pt", "safetensors", "h5"])
def test_files_are_mapped(file_format: str, run: Path, tmp_path: Path) -> None:
    """Not read into memory: the tensor follows the file, and the file not the tensor."""
    export_run(run, tmp_path, file_format)
    path = tmp_path / f"tile_embeddings/002.{file_format}"
    before = load_embeddings(path)
    found = map_embeddings(path, (5, 6))
    assert torch.equal(found, before)
    data = path.read_bytes()
    place = data.index(before[4].numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(np.full(6, 7.0, np.float32).tobytes())
    assert found[4].tolist() == [7.0] * 6
    found[0] = 0
    assert before[0].numpy().tobytes() in path.read_bytes()
    with pytest.raises(ArtifactError, match=r"has shape \(5, 6\), its sidecar says \(4, 6\)"):
        map_embeddings(path, (4, 6))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for suffix in (".pt", ".npz", ".safetensors", ".h5"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"\x00" * 100)
        with pytest.raises(ArtifactError, match=r"a\..* cannot be read|holds"):
            map_embeddings(path, (4, 6))


@pytest.mark.slow
def test_the_example_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slides with a few tiles of another tissue are told from those without, on slides of another seed."""
    example = Path(__file__).parents[1] / "docs/examples/attention_mil.py"
    monkeypatch.syspath_prepend(example.parent)
    monkeypatch.setattr("sys.argv", [str(example), str(tmp_path), "--slides", "8", "--epochs", "12"])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert float(said.split("AUC")[1].split()[0]) > 0.8, said
