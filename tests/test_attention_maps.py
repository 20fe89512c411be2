"""Attention of the tiles of a slide: the pixels that were read, where they were, and pictures of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from openslide import OpenSlide
from shallow import few_blocks
from typer.testing import CliRunner

from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.attention_maps import draw_attention
from slide2vec.cli import app
from slide2vec.encoders.attention import encode_tiles_attention
from slide2vec.errors import ConfigError, SlideError, UnsupportedError
from slide2vec.pictures import attention_overlay

#: fp32 through batches of other sizes.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> Model:
    """Patches of 14 px, one block of 6 heads."""
    with few_blocks():
        made = Model.from_preset(
            "prost40m", weights="random", device="cpu", allow_non_recommended_settings=True
        )
    for parameter in made.encoder.parameters():  # as initialised, attention is nearly even
        parameter.data.mul_(2)
    return made


@pytest.fixture(scope="module")
def slide(generated_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "drawn.svs"
    return generated_slide(path, size_px=1024, seed=0, levels=2)


#: Level 0 of the slide as it is.
CONFIG = PreprocessingConfig(requested_spacing_um=0.25, requested_tile_size_px=224, tissue_threshold=0.3)


def from_openslide(model: Model, slide: Path, x: int, y: int, side: int) -> torch.Tensor:
    """A tile of level 0 as the encoder takes it."""
    with OpenSlide(str(slide)) as opened:
        pixels = np.array(opened.read_region((x, y), 0, (side, side)).convert("RGB"))
    transform = model.recipe.transform
    mean, std = (torch.tensor(each)[:, None, None] for each in (transform.mean, transform.std))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std


def test_maps_are_those_of_the_pixels_that_openslide_reads(model: Model, slide: Path) -> None:
    found = model.attention_maps(slide, CONFIG, mean_heads=False)
    embedded = model.embed_slide(slide, CONFIG)
    assert len(found.x) > 2 and found.maps.shape == (len(found.x), 6, 16, 16)
    np.testing.assert_array_equal(np.stack([found.x, found.y]), np.stack([embedded.x, embedded.y]))
    torch.testing.assert_close(found.tile_embeddings, embedded.tile_embeddings, atol=TOLERANCE, rtol=1e-4)
    assert found.channels[0] == (0, "class", 0) and found.channels[-1] == (0, "class", 5)
    inside = np.flatnonzero(np.maximum(found.x, found.y) <= 1024 - 224)
    for index in (inside[0], inside[-1]):
        pixels = from_openslide(model, slide, int(found.x[index]), int(found.y[index]), 224)
        expected = encode_tiles_attention(model.encoder, pixels[None])[0]
        torch.testing.assert_close(found.maps[index], expected, atol=TOLERANCE, rtol=0)
        assert expected.flatten(1).std(dim=1).min() > 1e-4


def test_places_of_ones_own_in_their_order_and_larger_tiles(model: Model, slide: Path) -> None:
    places = [(500, 300), (10, 600), (500, 300)]
    config = CONFIG.updated(requested_tile_size_px=280)
    found = model.attention_maps(slide, config, at=places)
    assert list(zip(found.x.tolist(), found.y.tolist(), strict=True)) == places
    assert found.maps.shape == (3, 1, 20, 20) and found.tile_size_lv0 == 280
    assert found.channels == ((0, "class", None),)
    for index, (x, y) in enumerate(places):
        batch = from_openslide(model, slide, x, y, 280)[None]
        expected = model.encode_tiles_attention(batch, mean_heads=True)[0]
        torch.testing.assert_close(found.maps[index], expected, atol=TOLERANCE, rtol=0)
        per_head = model.encode_tiles_attention(batch)
        torch.testing.assert_close(per_head.mean(dim=1)[0], expected[0], atol=TOLERANCE, rtol=0)


def test_what_cannot_be_done_is_said(model: Model, slide: Path) -> None:
    with pytest.raises(SlideError, match=r"drawn.*of the places asked for"):
        model.attention_maps(slide, CONFIG, at=[(5000, 0)])
    with pytest.raises(ConfigError, match="region_tile_multiple"):
        model.attention_maps(slide, CONFIG.updated(region_tile_multiple=2))
    with pytest.raises(ConfigError, match="torch_compile"):
        model.attention_maps(slide, CONFIG, ExecutionOptions(torch_compile=True))
    with pytest.raises(ConfigError, match="has 1 blocks"):
        model.attention_maps(slide, CONFIG, blocks=(9,))
    with pytest.raises(ConfigError, match=r"batch of \(1, 3, 100, 224\).*patches have 14 px"):
        model.encode_tiles_attention(torch.zeros(1, 3, 100, 224))
    scattering = Model.from_preset("scattering", device="cpu")
    with pytest.raises(UnsupportedError, match="ScatteringEncoder has no attention maps"):
        scattering.attention_maps(slide, CONFIG)


def test_pictures_are_of_the_slide_and_of_a_tile(model: Model, slide: Path) -> None:
    found = model.attention_maps(slide, CONFIG)
    drawn = draw_attention(found)
    assert drawn.shape[1:] == (1024, 3) and drawn[1024:].min() < 60  # with words and a key below
    whole = drawn[:1024]
    with OpenSlide(str(slide)) as opened:
        pixels = np.array(opened.read_region((0, 0), 0, (1024, 1024)).convert("RGB"))
    covered = np.zeros((1024, 1024), bool)
    for x, y in zip(found.x, found.y, strict=True):
        covered[y : y + 224, x : x + 224] = True
    np.testing.assert_array_equal(whole[~covered], pixels[~covered])
    assert (whole[covered].max(1) > whole[covered].min(1)).mean() > 0.9  # coloured
    tile = draw_attention(found, tile=1, channel=0)
    x, y = int(found.x[1]), int(found.y[1])
    with OpenSlide(str(slide)) as opened:
        own = np.array(opened.read_region((x, y), 0, (224, 224)).convert("RGB"))
    np.testing.assert_array_equal(tile, attention_overlay(own, found.maps[1, 0].numpy()))
    with pytest.raises(ConfigError, match="channel=4: slide drawn has 1"):
        draw_attention(found, channel=4)


def test_command_line(slide: Path, tmp_path: Path, few_prost40m: None) -> None:
    common = [str(slide), "-p", "prost40m", "--weights", "random", "--device", "cpu", "--spacing", "0.25"]
    common += ["--allow-non-recommended-settings", "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(
        app, ["attention", *common, "--at", "300,200", "--at", "10,600", "--block", "0", "--heads"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    with np.load(said["path"]) as file:
        assert file["maps"].shape == (2, 6, 16, 16) and file["embeddings"].shape == (2, 384)
        assert file["x"].tolist() == [300, 10] and file["channels"][5] == "block 0, class, head 5"
    names = [Path(path).name for path in said["pictures"]]
    assert names == ["drawn.300_200.attention.png", "drawn.10_600.attention.png"]
    assert np.shape(cv2.imread(said["pictures"][0])) == (224, 224, 3)
    wrong = CliRunner().invoke(app, ["attention", *common, "--at", "300;200"])
    assert wrong.exit_code == 1 and "X,Y in level-0 px" in wrong.stderr


@pytest.fixture
def few_prost40m() -> Iterator[None]:
    with few_blocks():
        yield
