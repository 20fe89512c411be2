"""Native encoders against plain dense references, with the same random weights as published."""

from __future__ import annotations

from pathlib import Path

import dense
import pytest
import torch
from published import SLIDE_PRESETS, random_state, small, with_kwargs
from slide_helpers import DENSE, a_bag, built, embed, loaded, write_checkpoint
from torch import Tensor

from slide2vec.encoders.slide import TileBag, build_slide_encoder
from slide2vec.recipes import Recipe, load_recipe


def reference(recipe: Recipe, state: dict[str, Tensor], bag: TileBag) -> Tensor:
    kwargs = recipe.encoder.kwargs
    if recipe.name == "prism":
        return dense.prism(state, kwargs, bag.features)[0]
    without_places = {"feather": dense.feather, "madeleine": dense.madeleine, "chief": dense.chief}
    if recipe.name in without_places:
        return without_places[recipe.name](state, kwargs, bag.features)
    with_places = {
        "titan": dense.titan,
        "gigapath-slide": dense.gigapath_slide,
        "moozy-slide": dense.moozy_slide,
    }
    return with_places[recipe.name](state, kwargs, bag.features, bag.coords, bag.tile_size_lv0)


@pytest.mark.parametrize("count", [1, 2, 29, 30, 61, 100])
@pytest.mark.parametrize("preset", SLIDE_PRESETS)
def test_small_model(preset: str, count: int, tmp_path: Path) -> None:
    """Numbers of tiles around every length of LongNet's segments (4, 11, 30, 62, 200 tokens)."""
    recipe = small(preset)
    encoder, state = loaded(recipe, tmp_path)
    bag = a_bag(recipe, count)
    found = embed(encoder, bag).embedding
    assert found.dtype == torch.float32 and found.shape == (reference(recipe, state, bag).shape)
    torch.testing.assert_close(found.double(), reference(recipe, state, bag), atol=DENSE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", SLIDE_PRESETS)
def test_five_thousand_tiles(preset: str, tmp_path: Path) -> None:
    """In several blocks of rows, and with the published segments; narrow, for the reference's sake."""
    recipe = small(preset)
    if preset == "gigapath-slide":
        recipe = with_kwargs(recipe, segments=load_recipe(preset).encoder.kwargs["segments"])
    encoder, state = loaded(recipe, tmp_path)
    bag = a_bag(recipe, 5000)
    expected = reference(recipe, state, bag)
    torch.testing.assert_close(embed(encoder, bag).embedding.double(), expected, atol=DENSE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", SLIDE_PRESETS)
def test_whole_model(preset: str) -> None:
    """The published width and, but for PRISM's 8 rounds of 6 blocks, depth; few tiles."""
    recipe = load_recipe(preset)
    if preset == "prism":
        recipe = with_kwargs(recipe, rounds=3, depth=1)
    state = random_state(recipe)
    with torch.device("meta"):
        encoder = built(recipe, "random")
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()}, assign=True)
    bag = a_bag(recipe, 40)
    expected = reference(recipe, state, bag)
    torch.testing.assert_close(embed(encoder, bag).embedding.double(), expected, atol=DENSE, rtol=0)


@pytest.mark.parametrize(("variant", "mean"), [(None, True), ("mean", True), ("cls", False)])
def test_outputs_of_gigapath_flash(variant: str | None, mean: bool, tmp_path: Path) -> None:
    recipe = small("gigapath-flash-slide")
    state = random_state(recipe)
    bag = a_bag(recipe, 50)
    path = write_checkpoint(recipe, state, tmp_path)
    encoder = build_slide_encoder(recipe, recipe.variant(variant)[1], path)
    given = (state, recipe.encoder.kwargs, bag.features, bag.coords, bag.tile_size_lv0)
    expected, other = (dense.gigapath_slide(*given, mean=which) for which in (mean, not mean))
    torch.testing.assert_close(embed(encoder, bag).embedding.double(), expected, atol=DENSE, rtol=0)
    assert (expected - other).abs().max() > 0.1


def test_titan_in_the_space_of_its_texts(tmp_path: Path) -> None:
    recipe = small("titan")
    state = random_state(recipe)
    bag = a_bag(recipe, 50)
    path = write_checkpoint(recipe, state, tmp_path)
    encoder = build_slide_encoder(recipe, recipe.variants["aligned"], path)
    given = (recipe.encoder.kwargs, bag.features, bag.coords, bag.tile_size_lv0)
    projected = dense.titan(state, *given) @ state["vision_encoder.proj"].double()
    expected = projected / projected.norm()
    torch.testing.assert_close(embed(encoder, bag).embedding.double(), expected, atol=DENSE, rtol=0)


def test_latents_of_prism(tmp_path: Path) -> None:
    recipe = small("prism")
    encoder, state = loaded(recipe, tmp_path)
    bag = a_bag(recipe, 50)
    latents = embed(encoder, bag).latents
    assert latents is not None and latents.dtype == torch.float32
    expected = dense.prism(state, recipe.encoder.kwargs, bag.features)[1]
    torch.testing.assert_close(latents.double(), expected, atol=DENSE, rtol=0)


@pytest.mark.parametrize("slides", [1, 2, 9])
def test_case_transformer(slides: int, tmp_path: Path) -> None:
    recipe = small("moozy")
    encoder, state = loaded(recipe, tmp_path)
    values = torch.randn(slides, 96)
    found = encoder(values)
    assert found.dtype == torch.float32 and found.shape == (96,)
    expected = dense.moozy(state, recipe.encoder.kwargs, values)
    torch.testing.assert_close(found.double(), expected, atol=DENSE, rtol=0)


def test_one_slide_of_a_patient_comes_out_changed(tmp_path: Path) -> None:
    encoder, _ = loaded(small("moozy"), tmp_path)
    slide = torch.randn(1, 96)
    assert (encoder(slide) - slide[0]).abs().max() > 0.1


@pytest.mark.parametrize("segments", [[8, 22], [5, 11], [100, 200]])
def test_zeros_that_fill_up_segments_take_part(segments: list[int]) -> None:
    """Without them the softmax would be another: the reference computes them, one by one."""
    from slide2vec.encoders.slide.dilated import dilated_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(29, 32, generator=generator) for _ in range(3))
    expected = dense.dilated(query.double(), key.double(), value.double(), 4, segments, [1, 4])
    by_head = (each.reshape(29, 4, 8).transpose(0, 1) for each in (query, key, value))
    found = dilated_attention(*by_head, segments, [1, 4]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.double(), expected, atol=DENSE, rtol=0)
    if segments[0] < 29:
        masked = torch.softmax(query[24:29] @ key[24:29].T / 32**0.5, -1) @ value[24:29]
        assert not torch.allclose(found[24:29], masked, atol=DENSE)


def test_checkpoint_in_half_precision(tmp_path: Path) -> None:
    recipe = small("titan")
    state = {name: value.half() for name, value in random_state(recipe).items()}
    encoder = built(recipe, write_checkpoint(recipe, state, tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    bag = a_bag(recipe, 30)
    half = TileBag(bag.features.half(), bag.coords, bag.tile_size_lv0)
    expected = reference(recipe, state, half)
    torch.testing.assert_close(embed(encoder, half).embedding.double(), expected, atol=DENSE, rtol=0)
