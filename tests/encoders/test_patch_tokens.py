"""Grids of patch tokens, against timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from shallow import shallow

from slide2vec.encoders import build_encoder
from slide2vec.encoders.base_classes import TileEncoder, TimmTileEncoder
from slide2vec.encoders.patch_tokens import (
    encode_tiles_dense,
    encode_tiles_dense_prenorm,
    patch_size,
    ready_for,
)
from slide2vec.errors import ConfigError, UnsupportedError
from slide2vec.recipes import Recipe, load_recipe

#: Of one architecture run by two paths of timm.
ROUNDING = 1e-5


def made(name: str, **kwargs: Any) -> tuple[Any, Recipe]:
    recipe = shallow(load_recipe(name))
    more = {**recipe.encoder.kwargs, **kwargs}
    recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": more})})
    return build_encoder(recipe, recipe.variant(None)[1], "random"), recipe


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hibou() -> tuple[Any, Recipe]:
    """A ViT-B/14 with a class token and four registers."""
    return made("hibou-b")


def test_tokens_are_timms_folded_row_by_row(hibou: tuple[Any, Recipe]) -> None:
    encoder, _ = hibou
    with torch.inference_mode():
        found = encode_tiles_dense(encoder, pixels(224, 224))
        before = encode_tiles_dense_prenorm(encoder, pixels(224, 224))
        after = encoder.trunk.forward_intermediates(
            pixels(224, 224), indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )[-1]
        tokens = encoder.trunk.forward_features(pixels(224, 224))
    assert found.shape == before.shape == (2, 768, 16, 16)
    torch.testing.assert_close(found, after, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found[1, :, 2, 5], tokens[1, 5 + 2 * 16 + 5], atol=ROUNDING, rtol=0)
    normed = encoder.trunk.norm(before.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(normed, found, atol=ROUNDING, rtol=0)
    assert (before - found).abs().max() > 0.1


def test_oblong_inputs(hibou: tuple[Any, Recipe]) -> None:
    """A patch sees its own pixels: a grid's mirror is the mirror of none, but its size and order are."""
    encoder, recipe = hibou
    ready_for(encoder, recipe, (224, 140), "target_size=(224, 140)")
    with torch.inference_mode():
        assert encode_tiles_dense(encoder, pixels(224, 140)).shape == (2, 768, 16, 10)
    with pytest.raises(ConfigError, match="target_size=230: preset hibou-b takes no inputs of 230 px"):
        ready_for(encoder, recipe, (230, 224), "target_size=230")
    with pytest.raises(ConfigError, match="multiples of the patch, 14 x 14 px"):
        encode_tiles_dense(encoder, pixels(230, 224))


def test_three_grey_pictures_are_side_by_side() -> None:
    encoder, _ = made("genbio-pathfm", depth=1, dim=64, heads=1, hidden=64)
    picture = pixels(32, 64)
    with torch.inference_mode():
        found = encode_tiles_dense(encoder, picture)
        grey = [encoder.norm(encoder.tokens(picture[:, [k, k, k]]))[0] for k in range(3)]
    assert found.shape == (2, 3 * 64, 2, 4) and patch_size(encoder) == (16, 16)
    for channel, tokens in enumerate(grey):
        expected = tokens[encoder.prefix_tokens :].T.reshape(64, 2, 4)
        torch.testing.assert_close(found[0, 64 * channel : 64 * (channel + 1)], expected)
    with pytest.raises(UnsupportedError, match="patch_features_prenorm"):
        encode_tiles_dense_prenorm(encoder, picture)


def test_projected_tokens() -> None:
    encoder, _ = made("isight", depth=1)
    with torch.inference_mode():
        found = encode_tiles_dense(encoder, pixels(336, 336)[:1])
        tokens = encoder.projection(encoder.vit.forward_features(pixels(336, 336)[:1]))
    torch.testing.assert_close(found[0, :, 1, 2], tokens[0, 1 + 24 + 2])


def test_code_that_came_with_the_weights() -> None:
    """Its model has a patch embedding, and gives its last tokens."""

    class Output:
        def __init__(self, tokens: torch.Tensor) -> None:
            self.last_hidden_state = tokens

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = torch.nn.Conv2d(3, 8, 4, 4)
            self.patch_embed.patch_size = 4

        def forward(self, pixel_values: torch.Tensor) -> Output:
            tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
            return Output(torch.cat([tokens.new_full((len(tokens), 3, 8), 7.0), tokens], dim=1))

    encoder = torch.nn.Module()
    encoder.network, encoder.prefix_tokens = Network(), 3
    found = encode_tiles_dense(encoder, pixels(8, 12))
    torch.testing.assert_close(found, encoder.network.patch_embed(pixels(8, 12)))


def test_encoders_that_users_bring() -> None:
    """What their class does counts; else the vision transformer of timm inside is looked at."""
    trunk = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0).eval()
    encoder = torch.nn.Module()
    encoder.own = TimmInside(trunk)
    with torch.inference_mode():
        expected = trunk.forward_features(pixels(32, 32))[:, 1:].transpose(1, 2).reshape(2, 192, 2, 2)
        torch.testing.assert_close(encode_tiles_dense(encoder, pixels(32, 32)), expected)
        assert encode_tiles_dense_prenorm(encoder, pixels(32, 32)).shape == (2, 192, 2, 2)
    assert patch_size(encoder) == (16, 16)
    encoder.own = WithItsOwn(trunk)
    assert encode_tiles_dense(encoder, pixels(9, 9)).shape == (2, 1, 9, 9) and patch_size(encoder) == (3, 1)


def test_class_around_timm_has_them_as_methods() -> None:
    """As in 7.1.4, for classes that build on it."""
    small = TimmTileEncoder("vit_tiny_patch16_224", pretrained=False, depth=2, dynamic_img_size=True)
    batch, model = pixels(48, 32), small._model
    with torch.inference_mode():
        torch.testing.assert_close(
            small.encode_tiles_dense(batch),
            model.forward_features(batch)[:, 1:].transpose(1, 2).reshape(2, 192, 3, 2),  # type: ignore[operator]
        )
        torch.testing.assert_close(
            small.encode_tiles_dense_prenorm(batch),
            model.forward_intermediates(  # type: ignore[operator]
                batch, indices=1, norm=False, intermediates_only=True
            )[-1],
        )
    with pytest.raises(UnsupportedError, match="ResNet has no patch tokens"):
        TimmTileEncoder("resnet10t", pretrained=False).encode_tiles_dense(batch)


class TimmInside(TileEncoder):
    encode_dim, device = 192, torch.device("cpu")

    def __init__(self, trunk: Any) -> None:
        self._model = trunk

    def to(self, device: Any) -> Any:
        return self

    def get_transform(self) -> Any:
        raise AssertionError

    def encode_tiles(self, batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class WithItsOwn(TimmInside):
    patch_size = (3, 1)

    def encode_tiles_dense(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[:, :1]


def test_what_has_no_patches_says_so() -> None:
    encoder, _ = made("scattering")
    with pytest.raises(UnsupportedError, match="has no patch tokens"):
        patch_size(encoder)
    with pytest.raises(UnsupportedError, match="has no patch tokens"):
        encode_tiles_dense(encoder, pixels(224, 224))


def test_musk_takes_its_own_size_only() -> None:
    recipe = load_recipe("musk")
    with pytest.raises(ConfigError, match="target_size=400: preset musk takes no inputs of 400 px"):
        ready_for(torch.nn.Identity(), recipe, (400, 400), "target_size=400")
