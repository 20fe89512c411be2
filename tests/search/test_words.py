"""Texts and tiles of one small CoCa in the published keys: searched in the space that they share, by weights
that are those of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cli import app
from slide2vec.encoders import build_encoder
from slide2vec.encoders.text.coca import CocaTextEncoder
from slide2vec.errors import UnsupportedError, WeightsError
from slide2vec.recipes import load_recipe
from slide2vec.search import Run, nearest_to_text, searched_run
from slide2vec.viewer.viewed_run import ViewedRun

tokenizers = pytest.importorskip("tokenizers")

DIM, SIDE = 32, 64
RECIPE = f"""
schema_version = 1
title = "A small CoCa"
summary = "for tests"
tile_size_px = {SIDE}
spacing_um = [0.25]
default_spacing_um = 0.25
precision = "fp32"
params_m = 0.1
gflops = 0.1
default_variant = "default"
citation = "none"
[encoder]
family = "coca"
arch = "vit_tiny_patch16_224"
[encoder.kwargs]
img_size = {SIDE}
num_classes = 0
depth = 1
embed_dim = 48
num_heads = 4
pool_heads = 4
pool_bias = true
[weights]
files = ["w.bin"]
convert = "conch"
ignore = ["text.*", "projection.weight"]
[transform]
resize = {SIDE}
crop = {SIDE}
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[variants.default]
dim = {DIM}
pool = "none"
[variants.unit]
dim = {DIM}
pool = "none"
normalise = true
[variants.aligned]
dim = {DIM}
pool = "aligned"
normalise = true
[text]
variant = "aligned"
family = "coca"
projected = {{ default = {DIM} }}
tokeniser = ["tokenizer.json"]
[text.kwargs]
width = 32
heads = 4
layers = 1
context = 15
vocabulary = 259
[licence]
name = "Apache-2.0"
terms = "none"
url = "https://www.apache.org/licenses/LICENSE-2.0"
"""
TEXT = "pale stroma"


def write_weights(folder: Path, seed: int) -> Path:
    """A whole checkpoint in CONCH's keys, with its tokeniser beside it."""
    folder.mkdir()
    recipe = load_recipe("small-coca")
    encoder = build_encoder(recipe, recipe.variants["aligned"], "random", seed)
    own = {**encoder.state_dict()}
    assert recipe.text is not None
    torch.manual_seed(seed)
    text = CocaTextEncoder(**recipe.text.kwargs, dim=DIM)
    projection = torch.randn(DIM, DIM)
    width = DIM
    state = {f"visual.trunk.{key[4:]}": value for key, value in own.items() if key.startswith("vit.")}
    state |= {f"visual.ln_contrast.{key[5:]}": value for key, value in own.items() if key.startswith("norm.")}
    pool = "visual.attn_pool_contrast"
    state |= {
        f"{pool}.query": own["pool.query"],
        f"{pool}.attn.in_proj_bias": torch.cat([own["pool.q.bias"], own["pool.kv.bias"]]),
        f"{pool}.attn.q_proj_weight": own["pool.q.weight"],
        f"{pool}.attn.k_proj_weight": own["pool.kv.weight"][:width],
        f"{pool}.attn.v_proj_weight": own["pool.kv.weight"][width:],
        "visual.proj_contrast": projection,
    }
    for kind in ("weight", "bias"):
        state[f"{pool}.attn.out_proj.{kind}"] = own[f"pool.out.{kind}"]
        state[f"{pool}.ln_q.{kind}"] = own[f"pool.norm_query.{kind}"]
        state[f"{pool}.ln_k.{kind}"] = own[f"pool.norm_context.{kind}"]
    state |= {f"text.{k.replace('in_proj.', 'in_proj_')}": v.detach() for k, v in text.state_dict().items()}
    torch.save(state, folder / "w.bin")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: number for number, piece in enumerate(["<pad>", "<s>", "</s>", *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    return folder / "w.bin"


@pytest.fixture(scope="module")
def made(
    generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Runs of a slide by each output, and other weights."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "recipes").mkdir()
    (folder / "recipes/small-coca.toml").write_text(RECIPE)
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIDE2VEC_RECIPES", str(folder / "recipes"))
    try:
        weights, other = write_weights(folder / "own", 1), write_weights(folder / "other", 2)
        slide = generated_slide(folder / "s.svs", size_px=512, seed=3, levels=2)
        runs = {}
        config = PreprocessingConfig(filtering={"a_t": 1})
        for output in ("default", "unit", "aligned"):
            model = Model.from_preset("small-coca", weights=weights, output_variant=output, device="cpu")
            Pipeline(model, config, ExecutionOptions(output_dir=folder / output)).run(slides=[slide])
            runs[output] = searched_run(folder / output)
        yield SimpleNamespace(runs=runs, weights=weights, other=other, slide=slide, folder=folder)
    finally:
        patch.undo()


def cosines(made: SimpleNamespace) -> dict[tuple[int, int], float]:
    """Of every tile to the text: the image side's default output, projected by hand, and the text side."""
    recipe = load_recipe("small-coca")
    state = torch.load(made.weights)
    model = Model.from_preset("small-coca", weights=made.weights, output_variant="aligned", device="cpu")
    (text,) = model.embed_text([TEXT])
    assert recipe.text is not None and text.norm() == pytest.approx(1)
    rows = torch.load(made.folder / "default/tile_embeddings/s.pt").double()
    with np.load(made.folder / "default/tiles/s.coordinates.npz") as file:
        places = list(zip(file["x"].tolist(), file["y"].tolist(), strict=True))
    shared = F.normalize(rows @ state["visual.proj_contrast"].double(), dim=1)
    return dict(zip(places, (shared @ text.double()).tolist(), strict=True))


def test_by_a_text_in_its_own_space(made: SimpleNamespace) -> None:
    """Of embeddings that are in the space of texts, and of those that are projected into it."""
    expected = cosines(made)
    assert len(expected) > 6 and max(expected.values()) - min(expected.values()) > 0.01
    for output in ("default", "aligned"):
        found = nearest_to_text(made.runs[output], TEXT, 6, weights=made.weights)
        wanted = sorted(expected, key=lambda place: -expected[place])[:6]
        assert [(tile.x, tile.y) for tile in found] == wanted, output
        for tile in found:
            assert tile.score == pytest.approx(expected[tile.x, tile.y], abs=1e-5)
    apart = made.runs["default"].nearest(torch.load(made.folder / "default/tile_embeddings/s.pt")[0], 1)
    assert apart[0].score == pytest.approx(1)  # tiles are searched for as they are


@pytest.mark.parametrize("output", ["default", "aligned"])
def test_tiles_are_coloured_by_a_text(made: SimpleNamespace, output: str) -> None:
    """In the viewer: every tile's cosine, and the nearest of the run."""
    run = ViewedRun(made.folder / output, weights=str(made.weights))
    expected = cosines(made)
    tiles = run.slide(0, 0)["tiles"]
    places = list(zip(tiles["x"], tiles["y"], strict=True))
    found = run.colours(0, 0, "text", text=TEXT)
    assert found["cosines"] == pytest.approx([expected[place] for place in places], abs=1e-4)
    near = run.similar(0, 3, text=TEXT)
    wanted = sorted(expected, key=lambda place: -expected[place])[:3]
    assert [(each["x"], each["y"]) for each in near] == wanted
    assert [places[each["row"]] for each in near] == wanted
    run.close()


def test_other_spaces_are_refused(made: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedError, match=r"output 'unit' of preset small-coca.*_variant='aligned'"):
        nearest_to_text(made.runs["unit"], TEXT, weights=made.weights)
    model = Model.from_preset("small-coca", weights=made.weights, device="cpu")
    with pytest.raises(NotImplementedError, match="in the space of its output 'aligned', not of 'default'"):
        model.embed_text([TEXT])


@pytest.mark.parametrize("output", ["default", "aligned"])
def test_other_weights_are_refused(made: SimpleNamespace, output: str) -> None:
    with pytest.raises(WeightsError, match=r"made with other weights of small-coca .*other/w.bin"):
        nearest_to_text(made.runs[output], TEXT, weights=made.other)


def test_weights_that_are_not_recorded_are_said(
    made: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    run = made.runs["aligned"]
    encoder = {key: value for key, value in run.encoder.items() if key != "weights"}
    assert nearest_to_text(Run(run.features, encoder), TEXT, 1, weights=made.weights)
    assert "does not say which weights of small-coca it was made with" in caplog.text


def test_command_line(made: SimpleNamespace, tmp_path: Path) -> None:
    sheet = tmp_path / "a.png"
    given = ["search", str(made.folder / "default"), "--text", TEXT, "--weights", str(made.weights)]
    done = CliRunner().invoke(app, [*given, "--sheet", str(sheet), "-n", "3"])
    assert done.exit_code == 0 and sheet.is_file(), done.output
    best = max(cosines(made).items(), key=lambda item: item[1])
    assert f"{best[0][0]},{best[0][1]}" in done.stdout and f"{best[1]:.4f}" in done.stdout
