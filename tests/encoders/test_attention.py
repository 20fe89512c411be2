"""Attention maps against the weights that the encoder itself attends with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slide2vec.choices import TILE_ENCODERS
from slide2vec.encoders.attention import (
    AttentionChannel,
    attention_channels,
    encode_tiles_attention,
    features_and_attention,
    why_no_attention,
)
from slide2vec.encoders.base_classes import TorchTileEncoder
from slide2vec.encoders.registered import BroughtTiles
from slide2vec.encoders.remote_code import RemoteEncoder
from slide2vec.errors import ConfigError, UnsupportedError
from slide2vec.recipes import Recipe, Variant, list_models, load_recipe

#: fp32, other order of the same sums.
TOLERANCE = 1e-6
DEPTH = 2
#: One of every kind of attention; the others differ from them by numbers, and are slow.
KINDS = {"conch", "dinov3-vitb16", "genbio-pathfm", "h0-mini", "isight", "lunit", "musk", "plip"}
#: Presets without a class token and registers, or whose attention is not of that kind.
WITHOUT = {"scattering", "ctranspath", "chief-ctranspath", "lunit-bt", "lunit-moco", "lunit-swav"}


def has_maps(recipe: Recipe) -> bool:
    return recipe.encoder.family != "remote" and recipe.name not in WITHOUT


PRESETS = [name for name in list_models("tile") if has_maps(load_recipe(name))]


class Attended(TorchFunctionMode):
    """Notes the weights of every attention that is computed, in double precision: (N, heads, T, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[0].double(), args[1].double()
            self.weights.append((query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1))
        return func(*args, **(kwargs or {}))


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make attention uneven, where those at the start of training would hardly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.uniform_(-0.1, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def shallow(name: str, variant: str | None = None) -> tuple[Recipe, nn.Module]:
    """Of few blocks, for inputs of 4 x 4 patches."""
    recipe = load_recipe(name)
    kwargs = recipe.encoder.kwargs
    side = kwargs.get("patch_size") or int(recipe.encoder.arch.partition("patch")[2].partition("_")[0])
    few = {"depth": DEPTH, "img_size": 4 * side, **({"hidden": 64} if "hidden" in kwargs else {})}
    spec = recipe.encoder.model_copy(update={"kwargs": {**kwargs, **few}})
    recipe = recipe.model_copy(
        update={"transform": recipe.transform.model_copy(update={"crop": 4 * side, "resize": 4 * side})}
    )
    encoder = TILE_ENCODERS[spec.family].imported()(spec, recipe.variant(variant)[1])
    return recipe, spread(encoder)


def expected(weights: list[Tensor], recipe: Recipe, rows: int, images: int = 1) -> Tensor:
    """Maps of the first tokens in the order that slide2vec 7.1.4 documents, written out."""
    prefix, maps = recipe.encoder.prefix_tokens, []
    for block in weights:
        side = round((block.shape[-1] - prefix) ** 0.5)
        for token in range(rows):
            for image in range(images):
                for head in range(block.shape[1]):
                    row = block[image::images, head, token, prefix:]
                    maps.append(row.reshape(-1, side, side))
    return torch.stack(maps, dim=1).float()


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_equal_what_the_encoder_attends_with(name: str) -> None:
    recipe, encoder = shallow(name)
    pixels = torch.randn(2, 3, *(recipe.transform.crop,) * 2, generator=torch.Generator().manual_seed(1))
    registers = recipe.encoder.prefix_tokens - 1
    with torch.inference_mode():
        with Attended() as attended:
            features = encoder(pixels)
        pooled = 1 if recipe.encoder.family == "coca" else 0  # the pooling attends, too
        weights = attended.weights[: len(attended.weights) - pooled]
        assert len(weights) == DEPTH
        if recipe.encoder.family == "musk":
            weights = [block[::5] for block in weights]  # without the quadrants
        images = 3 if recipe.encoder.family == "channelwise" else 1
        last = encode_tiles_attention(encoder, pixels)
        every = encode_tiles_attention(encoder, pixels, blocks=(0, 1), include_registers=True)
        both = features_and_attention(encoder, pixels, blocks=(0, -1), include_registers=True)
    side = 4
    heads = images * weights[0].shape[1]
    assert last.shape == (2, heads, side, side) and last.dtype == torch.float32
    assert every.shape == (2, DEPTH * (1 + registers) * heads, side, side)
    assert last.std(dim=(2, 3)).min() > 0  # not even
    torch.testing.assert_close(last, expected(weights[1:], recipe, 1, images), atol=TOLERANCE, rtol=0)
    whole = expected(weights, recipe, 1 + registers, images)
    torch.testing.assert_close(every, whole, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(both[1], every, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(both[0], features)


@contextmanager
def unfused(model: Any) -> Iterator[list[Tensor]]:
    """timm's own attention step by step; its softmax as it comes out, block by block."""
    found: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, __: found.append(args[0]))
    yield found


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "qk_norm": True}),
        ("vit_tiny_patch16_224", {"class_token": True, "reg_tokens": 2, "no_embed_class": True}),
        ("vit_small_patch16_dinov3", {"img_size": 64}),  # rotated by place, its biases apart
        ("eva02_tiny_patch14_224", {"img_size": 56}),  # three projections
        ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64, "class_token": True}),
    ],
)
def test_equal_timm_without_fused_attention(arch: str, more: dict[str, Any]) -> None:
    model: Any = spread(timm.create_model(arch, num_classes=0, depth=DEPTH, **more))
    size = 56 if "14" in arch else more.get("img_size", 224)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if "img_size" not in more:
        model.set_input_size((size, size))
    with torch.inference_mode():
        found = encode_tiles_attention(model, pixels, blocks=(1, 0, -1), include_registers=True)
        with unfused(model) as weights:
            model.forward_features(pixels)
    prefix = model.num_prefix_tokens
    recipe: Any = SimpleNamespace(encoder=SimpleNamespace(prefix_tokens=prefix))
    whole = expected([weights[1], weights[0], weights[1]], recipe, prefix)
    torch.testing.assert_close(found, whole, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    arch = "vit_tiny_patch16_224"
    made = timm.create_model(arch, num_classes=0, depth=DEPTH, img_size=64, reg_tokens=2, num_heads=3)
    return spread(made)


PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_mean_over_heads_and_names_of_channels(model: nn.Module) -> None:
    asked: dict[str, Any] = {"blocks": (0, 1), "include_registers": True}
    heads = encode_tiles_attention(model, PIXELS, **asked)
    mean = encode_tiles_attention(model, PIXELS, **asked, mean_heads=True)
    torch.testing.assert_close(mean, heads.reshape(2, 6, 3, 4, 4).mean(2))
    names = attention_channels(model, **asked)
    assert len(names) == heads.shape[1] and names[3:5] == [
        AttentionChannel(0, "register 1", 0),
        AttentionChannel(0, "register 1", 1),
    ]
    assert names[-1] == AttentionChannel(1, "register 2", 2)
    means = attention_channels(model, **asked, mean_heads=True)
    assert means[3] == AttentionChannel(1, "class", None) and len(means) == mean.shape[1]


def test_what_is_missing_from_one_is_the_share_of_the_other_tokens(model: nn.Module) -> None:
    with Attended() as attended:
        model.get_submodule("")(PIXELS)
    found = encode_tiles_attention(model, PIXELS).sum(dim=(2, 3))
    others = attended.weights[-1][:, :, 0, :3].sum(-1).float()
    torch.testing.assert_close(found + others, torch.ones(2, 3))


def test_rectangles(model: nn.Module) -> None:
    wide: Any = spread(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, dynamic_img_size=True)
    )
    pixels = torch.randn(1, 3, 32, 64)
    found = encode_tiles_attention(wide, pixels)
    assert found.shape == (1, 3, 2, 4)
    with Attended() as attended:
        wide.forward_features(pixels)
    torch.testing.assert_close(found, attended.weights[0][:, :, 0, 1:].reshape(1, 3, 2, 4).float())


def test_nothing_is_left_behind_and_other_threads_do_not_interfere(model: nn.Module) -> None:
    alone = encode_tiles_attention(model, PIXELS[:1])
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            features_and_attention(model, PIXELS[1:])

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(20):
            torch.testing.assert_close(encode_tiles_attention(model, PIXELS[:1]), alone)
    finally:
        stop.set()
        other.join()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("blocks", [(2,), (-3,), (0, 7)])
def test_a_block_that_is_not_there(model: nn.Module, blocks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"has 2 blocks, 0 to 1"):
        encode_tiles_attention(model, PIXELS, blocks=blocks)
    with pytest.raises(ValueError, match="at least one"):
        encode_tiles_attention(model, PIXELS, blocks=())


def test_tiles_that_are_no_whole_patches(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"multiples of the patch, 16 x 16 px; got \(2, 3, 60, 64\)"):
        encode_tiles_attention(model, PIXELS[:, :, :60])
    with pytest.raises(ConfigError, match="got"):
        encode_tiles_attention(model, PIXELS[0])


@pytest.mark.parametrize(
    ("arch", "problem"),
    [
        ("resnet18", "no vision transformer"),
        ("swin_tiny_patch4_window7_224", "no vision transformer"),
        ("vit_base_patch16_siglip_224", "no class token and no registers"),
        ("beitv2_base_patch16_224", "no vision transformer"),  # relative position biases
        ("xcit_nano_12_p16_224", "no vision transformer"),  # attends across channels
    ],
)
def test_encoders_without(arch: str, problem: str) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(arch, num_classes=0)
    assert problem in str(why_no_attention(encoder))
    with pytest.raises(NotImplementedError, match=problem):
        encode_tiles_attention(encoder, torch.empty(1, 3, 224, 224, device="meta"))


def test_registers_without_a_class_token() -> None:
    made = timm.create_model(
        "vit_tiny_patch16_224", depth=1, class_token=False, reg_tokens=2, global_pool="avg", img_size=64
    )
    assert encode_tiles_attention(made.eval(), PIXELS, include_registers=True).shape == (2, 6, 4, 4)
    with pytest.raises(UnsupportedError, match="include_registers=True"):
        encode_tiles_attention(made, PIXELS)


@pytest.mark.parametrize("name", list_models("tile"))
def test_which_presets_have_maps(name: str) -> None:
    """Those that need remote code are tried below; the others without are in the documentation."""
    recipe = load_recipe(name)
    if recipe.encoder.family == "remote":
        return
    with torch.device("meta"):
        kwargs = recipe.encoder.kwargs
        few = {**kwargs, "depth": 1} if has_maps(recipe) else kwargs
        spec = recipe.encoder.model_copy(update={"kwargs": few})
        encoder = TILE_ENCODERS[spec.family].imported()(spec, recipe.variant(None)[1])
    assert (why_no_attention(encoder) is None) == (name not in WITHOUT)


class Turning(nn.Module):
    """As RudolfV 2's published code is described: fused projections, rotated by a sine and cosine of all
    tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 2, 8, 8**-0.5
        self.qkv, self.q_norm, self.k_norm = nn.Linear(16, 48), nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(tokens).reshape(*tokens.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        query, key, value = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        sine, cosine = rope
        turned = []
        for each in (query, key):
            crossed = torch.cat([-each[..., 4:], each[..., :4]], dim=-1)
            turned.append(each * cosine + crossed * sine)
        mixed = F.scaled_dot_product_attention(turned[0], turned[1], value)
        return mixed.transpose(1, 2).flatten(2)


class Patches(nn.Conv2d):
    patch_size = (8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Turning()


class Published(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Patches(3, 16, 8, stride=8)
        self.prefix = nn.Parameter(torch.randn(1, 9, 16))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.angles = nn.Parameter(torch.randn(9 + 16, 8))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = tokens + block.attn(tokens, rope=(self.angles.sin(), self.angles.cos()))
        return SimpleNamespace(last_hidden_state=tokens)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Published()

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        found: SimpleNamespace = self.model(pixel_values)
        return found


def test_code_of_repositories() -> None:
    network = Wrapped()
    encoder = RemoteEncoder(network, 9, Variant(dim=16, pool="cls")).eval().requires_grad_(False)
    pixels = PIXELS[:, :, :32, :32]
    with Attended() as attended:
        features = encoder(pixels)
    found = features_and_attention(encoder, pixels, blocks=(0, 1), include_registers=True)
    recipe: Any = SimpleNamespace(encoder=SimpleNamespace(prefix_tokens=9))
    torch.testing.assert_close(found[1], expected(attended.weights, recipe, 9), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[0], features)


def test_encoders_that_users_bring(model: nn.Module) -> None:
    """A registered class around a model of timm, one with maps of its own, and a bare module."""
    known = TorchTileEncoder(model, encode_dim=192, input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = encode_tiles_attention(model, PIXELS, blocks=(0,), include_registers=True)
    torch.testing.assert_close(
        known.encode_tiles_attention(PIXELS, blocks=(0,), include_registers=True), expected
    )
    recipe = load_recipe("uni")
    for own in (known, model):
        brought = BroughtTiles(own, recipe, "default").eval()
        found = encode_tiles_attention(brought, PIXELS, blocks=(0,), include_registers=True)
        torch.testing.assert_close(found, expected)
        features, maps = features_and_attention(brought, PIXELS, blocks=(0,), include_registers=True)
        torch.testing.assert_close(maps, expected)
        torch.testing.assert_close(features, model(PIXELS))

    class Special(TorchTileEncoder):
        def encode_tiles_attention(self, batch: Tensor, **asked: Any) -> Tensor:
            assert asked == {"blocks": (-1,), "include_registers": False}
            return batch[:, :1]

    special = Special(nn.Linear(1, 1), encode_dim=1, input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    brought = BroughtTiles(special, recipe, "default")
    torch.testing.assert_close(encode_tiles_attention(brought, PIXELS), PIXELS[:, :1])
    with pytest.raises(UnsupportedError, match="Linear has no attention maps"):
        features_and_attention(brought, PIXELS)
