"""The nearest tiles, against NumPy in double precision; pixels of the contact sheet, against OpenSlide."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from openslide import OpenSlide
from safetensors.torch import save_file
from typer.testing import CliRunner

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cli import app
from slide2vec.encoders.text.clip import ClipTextEncoder
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.recipes import TextSpec, load_recipe
from slide2vec.search import draw_sheet, searched_run
from slide2vec.search import index as index_module
from slide2vec.search.index import TileIndex

DIM = 48


def write_run(folder: Path, slides: dict[str, NDArray[np.float32]], dtype: torch.dtype) -> Path:
    """Tile embeddings with just the sidecar that is needed."""
    (folder / "tile_embeddings").mkdir(parents=True)
    for name, rows in slides.items():
        write_slide(folder, name, rows, dtype)
    return folder


def write_slide(folder: Path, name: str, rows: NDArray[np.float32], dtype: torch.dtype) -> None:
    path = folder / "tile_embeddings" / f"{name}.safetensors"
    at = torch.arange(len(rows))[:, None] * torch.tensor([10, 0])
    save_file({"features": torch.from_numpy(rows).to(dtype), "coords": at}, path)
    sidecar = {
        **{
            "artifact_type": "tile_embeddings",
            "sample_id": name,
            "format": "safetensors",
            "schema_version": 2,
        },
        **{"num_tiles": len(rows), "feature_dim": rows.shape[1], "feature_dtype": str(dtype)[6:]},
        **{"encoder_name": "made up", "encoder_level": "tile", "image_path": f"/slides/{name}.svs"},
        **{"tile_size_lv0": 10},
        "file_size_bytes": path.stat().st_size,
    }
    (folder / "tile_embeddings" / f"{name}.meta.json").write_text(json.dumps(sidecar))


def nearest_in_double(
    slides: dict[str, NDArray[np.float32]], query: NDArray[np.float32]
) -> list[tuple[str, int]]:
    """All tiles, the nearest first."""
    scored = []
    for name, rows in slides.items():
        wide, long = rows.astype(np.float64), np.linalg.norm(rows.astype(np.float64), axis=1)
        cosines = wide @ query.astype(np.float64) / np.maximum(long, 1e-12) / np.linalg.norm(query)
        scored += [(-cosine, name, row) for row, cosine in enumerate(cosines)]
    return [(name, row) for _, name, row in sorted(scored)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles are nearer to each other than half precision tells apart, of very different lengths."""
    monkeypatch.setattr(index_module, "BLOCK_BYTES", 2 * DIM * 77)  # several blocks, ends within slides
    rng = np.random.default_rng(0)
    query = rng.standard_normal(DIM).astype(np.float32)
    slides = {}
    for name, count in (("b", 300), ("a", 201), ("none", 0), ("c", 1)):
        rows = rng.standard_normal((count, DIM)).astype(np.float32)
        rows[::3] = query + 1e-3 * rows[::3]
        rows *= np.exp(rng.uniform(-3, 3, count).astype(np.float32))[:, None]
        slides[name] = torch.from_numpy(rows).to(dtype).float().numpy()
    slides["a"][5] = 0  # no direction at all
    index = TileIndex.of(write_run(tmp_path / "run", slides, dtype))
    assert len(index) == 502 and index.dim == DIM
    found = index.nearest(torch.from_numpy(query), 60)
    expected = nearest_in_double(slides, query)[:60]
    assert [(hit.sample_id, hit.row) for hit in found] == expected
    assert found[0].score == pytest.approx(1, abs=1e-5)
    assert len(index.nearest(torch.from_numpy(query), 1000)) == 502


def test_order_of_half_precision_alone_is_wrong(tmp_path: Path) -> None:
    """The case above would pass by chance if halves sufficed."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal(DIM).astype(np.float32)
    rows = query + 1e-3 * rng.standard_normal((300, DIM)).astype(np.float32)
    index = TileIndex.of(write_run(tmp_path / "run", {"a": rows}, torch.float32))
    scores = index._scores(torch.from_numpy(query / np.linalg.norm(query)))
    assert np.argsort(-scores)[:20].tolist() != [row for _, row in nearest_in_double({"a": rows}, query)[:20]]
    halves = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ (query / np.linalg.norm(query))
    assert np.abs(scores - halves).max() < index_module.HALF_ERROR


def test_index_is_kept_and_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    slides = {name: rng.standard_normal((5, 8)).astype(np.float32) for name in "ab"}
    run = write_run(tmp_path / "run", slides, torch.float32)
    TileIndex.of(run)
    built: list[int] = []
    build = index_module._built
    monkeypatch.setattr(index_module, "_built", lambda *args: built.append(1) or build(*args))
    assert len(TileIndex.of(run)) == 10 and built == []
    write_slide(run, "c", slides["a"][:2] * 3, torch.float32)
    assert len(TileIndex.of(run)) == 12 and len(built) == 1
    write_slide(run, "a", -slides["a"], torch.float32)
    os.utime(run / "tile_embeddings/a.meta.json", ns=(1, 1))
    (best,) = TileIndex.of(run).nearest(torch.from_numpy(-slides["a"][3]), 1)
    assert (best.sample_id, best.row, len(built)) == ("a", 3, 2)
    for spoil in (b"{", json.dumps({"schema_version": 99}).encode()):
        (run / "search/index.json").write_bytes(spoil)
        assert len(TileIndex.of(run)) == 12
    with (run / "search/halves").open("ab") as file:
        file.write(b"xx")
    assert len(TileIndex.of(run)) == 12 and len(built) == 5
    write_slide(run, "d", np.ones((2, 9), np.float32), torch.float32)
    with pytest.raises(ArtifactError, match=r"slide d: its embeddings have 9 dimensions, those before 8"):
        TileIndex.of(run)
    assert not (run / "search/index.json").exists()


@pytest.fixture(scope="module")
def made(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run over two slides."""
    folder = tmp_path_factory.mktemp("search")
    slides = [
        generated_slide(folder / f"s{number}.svs", size_px=1024, seed=number, levels=2) for number in range(2)
    ]
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(requested_spacing_um=0.25, requested_tile_size_px=224, filtering={"a_t": 1})
    Pipeline(model, config, ExecutionOptions(output_dir=folder / "out")).run(slides=slides)
    return SimpleNamespace(out=folder / "out", slides=slides, model=model)


def test_by_a_tile_of_a_run(made: SimpleNamespace) -> None:
    run = searched_run(made.out)
    assert run.encoder["name"] == "scattering"
    embedded = torch.load(made.out / "tile_embeddings/s1.pt")
    with np.load(made.out / "tiles/s1.coordinates.npz") as file:
        x, y = int(file["x"][3]), int(file["y"][3])
    tile, query = run.index.tile_at("s1", x, y)
    assert (tile.x, tile.y, tile.row, tile.tile_size_lv0) == (x, y, 3, 224)
    torch.testing.assert_close(query, embedded[3])
    within, _ = run.index.tile_at("s1", x + 100, y + 223)
    assert (within.x, within.y) == (x, y)
    found = run.nearest(query, 6, without=tile)
    assert len(found) == 6 and (tile.sample_id, tile.row) not in [
        (each.sample_id, each.row) for each in found
    ]
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert run.nearest(query, 1)[0].row == 3
    for each in found:
        again = run.index.tile_at(each.sample_id, each.x, each.y)[1]
        cosine = torch.nn.functional.cosine_similarity(again, query, dim=0)
        assert each.score == pytest.approx(float(cosine), abs=1e-5)


def test_sheet_has_the_pixels_of_the_tiles(made: SimpleNamespace) -> None:
    run = searched_run(made.out)
    inside = [tile for tile in run.nearest(torch.ones(run.index.dim), 50) if max(tile.x, tile.y) <= 800]
    sheet, problems = draw_sheet(inside[:7])
    assert problems == [] and sheet.shape[0] == 2 * (224 + 32 + 8) + 8
    for number, tile in enumerate(inside[:7]):
        with OpenSlide(str(tile.image_path)) as opened:
            own = np.array(opened.read_region((tile.x, tile.y), 0, (224, 224)).convert("RGB"))
        top, left = 8 + number // 5 * 264, 8 + number % 5 * 232
        np.testing.assert_array_equal(sheet[top : top + 224, left : left + 224], own)
        assert sheet[top + 224 : top + 256, left : left + 224].min() < 120  # its caption


def test_numbers_on_a_sheet_are_those_of_the_list(made: SimpleNamespace) -> None:
    """The tile that was asked for comes before number 1."""
    run = searched_run(made.out)
    asked, *found = run.nearest(torch.ones(run.index.dim), 3)
    with_it, without = draw_sheet(found, asked=asked)[0], draw_sheet(found)[0]
    captions = slice(8 + 224, 8 + 224 + 16)
    for number in range(2):  # the same pictures, one place further, under the same numbers
        left = 8 + number * 232
        np.testing.assert_array_equal(
            with_it[8:248, left + 232 : left + 456], without[8:248, left : left + 224]
        )
    assert (with_it[captions, 8:232] != without[captions, 8:232]).any()


def test_what_cannot_be_searched_is_said(made: SimpleNamespace, tmp_path: Path) -> None:
    run = searched_run(made.out)
    with pytest.raises(ArtifactError, match="no tile embeddings of slide 's7'"):
        run.index.tile_at("s7", 0, 0)
    with pytest.raises(ArtifactError, match=r"no embedded tile at 1,2 .*; the nearest is at \d+,\d+"):
        run.index.tile_at("s0", 1, 2)
    with pytest.raises(ConfigError, match=r"query has shape \(7,\)"):
        run.nearest(torch.ones(7))
    with pytest.raises(ArtifactError, match="no tile embeddings to search"):
        searched_run(tmp_path)
    with pytest.raises(ConfigError, match="no tile embeddings of 'uni'"):
        searched_run(made.out, "uni")


def test_a_slide_that_is_gone_costs_its_pictures_only(made: SimpleNamespace) -> None:
    found = searched_run(made.out).nearest(torch.ones(searched_run(made.out).index.dim), 8)
    gone = made.slides[0].rename(made.slides[0].with_suffix(".gone"))
    try:
        sheet, problems = draw_sheet(found)
    finally:
        gone.rename(made.slides[0])
    assert len(problems) == len({tile.sample_id for tile in found} & {"s0"})
    assert all("slide s0: no pictures" in problem for problem in problems) and sheet.size


def test_command_line(made: SimpleNamespace, tmp_path: Path) -> None:
    first = searched_run(made.out).nearest(torch.ones(searched_run(made.out).index.dim), 1)[0]
    place = f"{first.sample_id}:{first.x},{first.y}"
    done = CliRunner().invoke(app, ["search", str(made.out), "--tile", place, "-n", "4", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["query"]["row"] == first.row and len(said["tiles"]) == 4
    assert said["sheet"] == str(made.out / "search" / f"{first.sample_id}_{first.x}_{first.y}.png")
    assert np.shape(cv2.imread(said["sheet"])) == (272, 1168, 3)
    text = CliRunner().invoke(
        app, ["search", str(made.out), "--tile", place, "-n", "2", "--sheet", str(tmp_path / "a.jpg")]
    )
    assert text.exit_code == 0 and "cosine" in text.stdout and (tmp_path / "a.jpg").exists()
    for both in ([], ["--tile", place, "--text", "tumor"]):
        failed = CliRunner().invoke(app, ["search", str(made.out), *both])
        assert failed.exit_code == 1 and "either --tile SLIDE:X,Y or --text" in failed.stderr
    for wrong in ("s0", "s0:1", ":1,2", "s0:a,b"):
        failed = CliRunner().invoke(app, ["search", str(made.out), "--tile", wrong])
        assert failed.exit_code == 1 and "SLIDE:X,Y" in failed.stderr


def test_by_a_text(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small text side for an encoder that has none."""
    common = ["search", str(made.out), "--text", "Tumor, 3 mm", "--sheet", str(tmp_path / "a.png"), "--json"]
    failed = CliRunner().invoke(app, common)
    assert failed.exit_code == 1 and "preset scattering has no text side" in failed.stderr
    with gzip.open(tmp_path / "merges.txt.gz", "wt") as file:
        file.write("#version: 0.2\nt u\ntu m\n")
    small = TextSpec(
        variant="default", kwargs={"width": 16, "heads": 2, "layers": 1, "context": 20, "vocabulary": 516}
    )
    recipe = load_recipe("scattering").model_copy(update={"text": small})
    assert recipe.default_variant == "default"
    monkeypatch.setattr("slide2vec.search.words.load_recipe", lambda name: recipe)
    monkeypatch.setattr(
        "slide2vec.encoders.text.tokenisers.clip_vocabulary", lambda: tmp_path / "merges.txt.gz"
    )
    done = CliRunner().invoke(app, [*common, "--weights", "random", "-n", "3"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["query"] == "Tumor, 3 mm" and len(said["tiles"]) == 3
    made.model.recipe = recipe
    made.model.origin = {"weights": "random", "seed": 0}
    (query,) = made.model.embed_text(["Tumor, 3 mm"])
    expected = searched_run(made.out).nearest(query, 3)
    assert [(tile["sample_id"], tile["row"]) for tile in said["tiles"]] == [
        (tile.sample_id, tile.row) for tile in expected
    ]


def test_many_tiles_that_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run may be as near as half precision tells: they are compared a few at a time."""
    monkeypatch.setattr(index_module, "EXACT_ROWS", 16)
    rng = np.random.default_rng(0)
    rows = (1 + 1e-5 * rng.standard_normal((300, DIM))).astype(np.float32)
    index = TileIndex.of(write_run(tmp_path / "run", {"a": rows}, torch.float32))
    sizes: list[int] = []
    unit = index_module._unit
    monkeypatch.setattr(index_module, "_unit", lambda values: sizes.append(len(values)) or unit(values))
    found = index.nearest(torch.ones(DIM), 5)
    assert [(hit.sample_id, hit.row) for hit in found] == nearest_in_double({"a": rows}, np.ones(DIM))[:5]
    assert max(sizes) == 16 and sum(sizes) == 301


def test_projected(tmp_path: Path) -> None:
    """The first numbers of the embeddings times a matrix; gathered apart from the embeddings as they are, and
    anew for another matrix."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, DIM)).astype(np.float32)
    run = write_run(tmp_path / "run", {"a": rows}, torch.float32)
    first, second = (torch.from_numpy(rng.standard_normal((40, 8)).astype(np.float32)) for _ in range(2))
    query = rng.standard_normal(8).astype(np.float32)
    for matrix in (first, second, first):
        index = TileIndex.of(run, matrix)
        assert (index.dim, len(index)) == (8, 50)
        expected = nearest_in_double({"a": rows[:, :40] @ matrix.numpy()}, query)[:5]
        assert [(hit.sample_id, hit.row) for hit in index.nearest(torch.from_numpy(query), 5)] == expected
    assert TileIndex.of(run).dim == DIM and (run / "search/texts/halves").is_file()


@pytest.mark.parametrize("name", ["plip", "quiltnet-b32", "quiltnet-b16"])
def test_presets_with_a_text_side(name: str) -> None:
    """Sizes are those of CLIP's text side: 63,428,096 parameters with the projection (OpenAI's ViT-B/32)."""
    recipe = load_recipe(name)
    assert recipe.text is not None and recipe.text.variant == recipe.default_variant
    with torch.device("meta"):
        encoder = ClipTextEncoder(**recipe.text.kwargs, dim=recipe.variants["default"].dim)
    assert sum(each.numel() for each in encoder.parameters()) == 63_428_096
    assert recipe.text.kwargs.get("quick_gelu", False) == (name == "plip")
