"""What the architectures promise: invariances, memory, one tile, none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from published import (
    ABMIL_PRESETS,
    PUBLISHED,
    SLIDE_PRESETS,
    SLOPES_OF_12_HEADS,
    in_dim,
    small,
    with_kwargs,
)
from slide_helpers import DENSE, a_bag, built, embed, loaded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slide2vec.encoders.slide import TileBag
from slide2vec.encoders.slide.alibi import BLOCK_BYTES, alibi_attention, alibi_slopes
from slide2vec.encoders.slide.blocks import in_chunks
from slide2vec.encoders.slide.longnet import position_embeddings
from slide2vec.encoders.slide.titan import grid_cells
from slide2vec.errors import ConfigError, NothingToEmbedError, Slide2VecError
from slide2vec.recipes import list_models, load_recipe

#: fp32, the same sums in another order.
ORDER = 2e-5
#: Float64 against our float32 of values between -1 and 1.
ROUNDING = 1e-6


@pytest.fixture(params=SLIDE_PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def embedding(preset: str, folder: Path, *bags: TileBag) -> list[Tensor]:
    encoder, _ = loaded(small(preset), folder)
    return [embed(encoder, bag).embedding for bag in bags]


def moved(bag: TileBag, by: tuple[int, int]) -> TileBag:
    return TileBag(bag.features, bag.coords + torch.tensor(by), bag.tile_size_lv0)


def shuffled(bag: TileBag) -> TileBag:
    order = torch.randperm(len(bag.features), generator=torch.Generator().manual_seed(5))
    return TileBag(bag.features[order], bag.coords[order], bag.tile_size_lv0)


# invariances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moozy-slide", "prism", "titan", *ABMIL_PRESETS])
def test_where_the_tissue_lies_on_the_slide_does_not_matter(name: str, tmp_path: Path) -> None:
    bag = a_bag(small(name), 90)
    here, there = embedding(name, tmp_path, bag, moved(bag, (100_003, -977)))
    assert torch.equal(here, there)  # integers until then


@pytest.mark.parametrize("name", ["moozy-slide", "titan", "gigapath-slide"])
def test_only_places_in_units_of_tiles_matter(name: str, tmp_path: Path) -> None:
    """The same tissue at twice the magnification."""
    bag = a_bag(small(name), 90)
    twice = TileBag(bag.features, bag.coords * 2, bag.tile_size_lv0 * 2)
    one, other = embedding(name, tmp_path, bag, twice)
    torch.testing.assert_close(one, other, atol=ORDER, rtol=0)


@pytest.mark.parametrize("name", ["moozy-slide", "prism", "titan", *ABMIL_PRESETS])
def test_order_of_the_tiles_does_not_matter(name: str, tmp_path: Path) -> None:
    bag = a_bag(small(name), 90)
    one, other = embedding(name, tmp_path, bag, shuffled(bag))
    torch.testing.assert_close(one, other, atol=ORDER, rtol=0)


def test_places_matter_but_for_prism_and_attention_alone(preset: str, tmp_path: Path) -> None:
    bag = a_bag(small(preset), 90)
    elsewhere = TileBag(bag.features, bag.coords.flip(0), bag.tile_size_lv0)
    one, other = embedding(preset, tmp_path, bag, elsewhere)
    without_places = {"prism", *ABMIL_PRESETS}
    assert torch.equal(one, other) == (preset in without_places)
    assert preset in without_places or (one - other).abs().max() > 10 * DENSE


def test_order_of_the_slides_of_a_patient_does_not_matter(tmp_path: Path) -> None:
    encoder, _ = loaded(small("moozy"), tmp_path)
    slides = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(slides), encoder(slides.flip(0)), atol=ORDER, rtol=0)
    assert (encoder(slides) - encoder(slides[:5])).abs().max() > 10 * DENSE


def test_nothing_is_random(preset: str, tmp_path: Path) -> None:
    bag = a_bag(small(preset), 40)
    one, again = embedding(preset, tmp_path, bag, bag)
    assert torch.equal(one, again)


# grids -------------------------------------------------------------------------------------------


def test_titan_sums_tiles_of_one_cell_and_leaves_out_empty_ones() -> None:
    coords = torch.tensor([[10, 20], [10 + 511, 20 + 511], [10 + 512, 20], [10, 20 + 1024], [10, 20 + 1100]])
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [5.0, 5.0], [-5.0, -5.0]])
    sums, cells = grid_cells(features, coords, 512)
    assert sums.tolist() == [[4.0, 6.0]] and cells.tolist() == [[0.0, 0.0]]


def test_tiles_without_features_are_background(tmp_path: Path) -> None:
    for name in ("titan", "moozy-slide"):
        bag = a_bag(small(name), 40)
        features = bag.features.clone()
        features[5:9] = 0
        kept = (features != 0).any(1)
        with_zeros = TileBag(features, bag.coords, bag.tile_size_lv0)
        without = TileBag(features[kept], bag.coords[kept], bag.tile_size_lv0)
        one, other = embedding(name, tmp_path, with_zeros, without)
        assert torch.equal(one, other)
        nothing = TileBag(torch.zeros_like(features), bag.coords, bag.tile_size_lv0)
        with pytest.raises(NothingToEmbedError, match="all zero"):
            embedding(name, tmp_path, nothing)


def test_gigapath_cells_are_those_of_its_authors_for_their_tiles() -> None:
    """A table of cells of 256 px, row x * 1000 + y + 1, of which theirs takes floor(coordinate / 256)."""
    coords = torch.tensor([[0, 0], [255, 256], [256 * 999, 256 * 3 + 7], [70_000, 200_001]])
    found = position_embeddings(coords // 256, 768)
    omega = 10_000.0 ** (-torch.arange(192, dtype=torch.float64) / 192)
    for row, (x, y) in zip(found, (coords // 256).tolist(), strict=True):
        expected = torch.cat([(y * omega).sin(), (y * omega).cos(), (x * omega).sin(), (x * omega).cos()])
        torch.testing.assert_close(row.double(), expected, atol=ROUNDING, rtol=0)


def test_gigapath_gives_every_tile_a_cell_of_its_own(tmp_path: Path) -> None:
    """In cells of 256 px, two of eight neighbouring tiles of 224 px would share one."""
    tiles = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)], dim=1)
    features = a_bag(small("gigapath-slide"), 8).features
    bags = [TileBag(features, tiles * size, size) for size in (224, 256, 448)]
    first, *others = embedding("gigapath-slide", tmp_path, *bags)
    assert all(torch.equal(first, other) for other in others)


# blocks of rows ----------------------------------------------------------------------------------


def test_published_slopes() -> None:
    assert alibi_slopes(12) == pytest.approx(SLOPES_OF_12_HEADS)
    assert alibi_slopes(8) == pytest.approx([2.0**-power for power in range(1, 9)])
    assert alibi_slopes(16)[:2] == pytest.approx([2**-0.5, 2**-1])


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("block_bytes", [1, 20_000, BLOCK_BYTES])
def test_attention_in_blocks_equals_the_whole(prefix: int, queries: int, block_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 70, 8, generator=generator) for _ in range(3))
    places = torch.rand(70 - prefix, 2, generator=generator) * 9
    distance = torch.zeros(70, 70, dtype=torch.float64)
    distance[prefix:, prefix:] = (places[:, None] - places[None]).double().norm(dim=-1)
    slopes = [0.5, 0.25, 0.7]
    found = alibi_attention(query[:, :queries], key, value, places, slopes, block_bytes)
    flat = (each.double().transpose(0, 1).flatten(1) for each in (query, key, value))
    expected = dense.attention(*flat, 3, lambda head: -slopes[head] * distance)[:queries]
    torch.testing.assert_close(found.transpose(0, 1).flatten(1).double(), expected, atol=ORDER, rtol=0)


def test_layers_in_chunks_equal_the_whole() -> None:
    tokens = torch.randn(40_000, 3)
    layer = torch.nn.Linear(3, 2)
    torch.testing.assert_close(in_chunks(layer, tokens), layer(tokens), atol=ROUNDING, rtol=0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *(each.untyped_storage().nbytes() for each in made)])
        return result


@pytest.mark.slow
def test_no_matrix_of_all_pairs_is_made(preset: str, tmp_path: Path) -> None:
    """6,000 tiles: one such matrix would take 144 MB for every head."""
    recipe = small(preset)
    if preset == "gigapath-slide":
        recipe = with_kwargs(recipe, segments=load_recipe(preset).encoder.kwargs["segments"])
    encoder, _ = loaded(recipe, tmp_path)
    bag = a_bag(recipe, 6000)
    with Largest() as largest:
        embed(encoder, bag)
    assert 0 < largest.bytes <= BLOCK_BYTES


# few tiles ---------------------------------------------------------------------------------------


def test_one_tile(preset: str, tmp_path: Path) -> None:
    (found,) = embedding(preset, tmp_path, a_bag(small(preset), 1))
    assert found.isfinite().all()


def test_no_tiles(preset: str, tmp_path: Path) -> None:
    with pytest.raises(NothingToEmbedError, match="no tiles") as error:
        embedding(preset, tmp_path, a_bag(small(preset), 0))
    assert isinstance(error.value, ValueError) and isinstance(error.value, Slide2VecError)


def test_no_slides(tmp_path: Path) -> None:
    encoder, _ = loaded(small("moozy"), tmp_path)
    with pytest.raises(NothingToEmbedError, match="no slides"):
        encoder(torch.zeros(0, 96))
    with pytest.raises(ConfigError, match=r"\(3, 7\) of a patient must be \(S, 96\)"):
        encoder(torch.zeros(3, 7))


def test_tiles_of_another_preset(preset: str) -> None:
    recipe = small(preset)
    encoder, bag = built(recipe, "random"), a_bag(recipe, 5)
    wide = torch.zeros(5, in_dim(recipe) + 1)
    with pytest.raises(ConfigError, match=f"have {in_dim(recipe) + 1} dimensions"):
        embed(encoder, TileBag(wide, bag.coords, 448))
    for coords in (bag.coords[:4], bag.coords[:, :1]):
        with pytest.raises(ConfigError, match="coords"):
            embed(encoder, TileBag(bag.features, coords, 448))
    with pytest.raises(ConfigError, match="tile_size_lv0=0"):
        embed(encoder, TileBag(bag.features, bag.coords, 0))


def test_half_precision_runs(preset: str) -> None:
    """As on a GPU; fp16's own rounding is all that separates them."""
    recipe = small(preset)
    bag = a_bag(recipe, 60)
    whole = embed(built(recipe, "random"), bag).embedding
    half = embed(built(recipe, "random").half(), bag).embedding
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(whole, half, dim=0) > 0.999


def test_every_preset_is_tested() -> None:
    assert set(PUBLISHED) | {"care", "prism2"} == {*list_models("slide"), *list_models("patient")}
