"""Attention maps: how much the class token and the registers take in of each patch, head by head.

Attention runs fused, and its weights are nowhere: the input of the asked block's attention is kept as it
passes, and the rows of those tokens are computed from it: one pass over the encoder gives maps and features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from slide2vec.encoders import channelwise
from slide2vec.errors import ConfigError, UnsupportedError
from slide2vec.lazy import import_timm

__all__ = [
    "AttentionChannel",
    "AttentionEncoder",
    "attention_channels",
    "encode_tiles_attention",
    "features_and_attention",
    "why_no_attention",
]


class AttentionChannel(NamedTuple):
    """What a channel of attention maps is.

    Attributes:
        block: index of the transformer block, 0 the first.
        token: whose attention it is: "class", "register 1", …
        head: index of the head; None for the mean over all.
    """

    block: int
    token: str
    head: int | None


class _Kept(NamedTuple):
    """What an attention was called with: its tokens (N, T, D), and how it turns queries and keys by their
    place (another tensor, or two; None: not at all)."""

    tokens: Tensor
    rotation: Any


class _Asked(NamedTuple):
    """Arguments of `encode_tiles_attention`."""

    blocks: Sequence[int]
    include_registers: bool
    mean_heads: bool


@dataclass(frozen=True)
class _Tower:
    """The transformer inside an encoder.

    Attributes:
        run: passes tiles (B, 3, H, W) through its blocks.
        attentions: the attention of each block.
        tokens: names of the tokens before the patches, whose maps there are.
        patch: (height, width) of a patch in px.
        images: that a tile is seen as, each with maps of its own: three grey ones, say.
        passes: that `forward` of the encoder makes of a tile, the first over the tile as it is.
    """

    run: Callable[[Tensor], Tensor]
    attentions: Sequence[nn.Module]
    tokens: tuple[str, ...]
    patch: tuple[int, int]
    images: int = 1
    passes: int = 1


def encode_tiles_attention(
    encoder: nn.Module,
    batch: Tensor,
    *,
    blocks: Sequence[int] = (-1,),
    include_registers: bool = False,
    mean_heads: bool = False,
) -> Tensor:
    """Attention of the class token, and of the registers, to the patches of tiles.

    Each map is a row of softmax(query · key) of one head, without the columns of the class token and the
    registers: what is missing from 1 is their share.

    Args:
        encoder: of `build_encoder`, or a vision transformer of timm.
        batch: (B, 3, H, W) float, normalised; H and W are multiples of the patch.
        blocks: indices of the blocks, in the order of the maps; negative ones count from the last.
        include_registers: maps of the registers, too.
        mean_heads: the mean over the heads instead of each.

    Returns:
        (B, K, h, w) float32, h = H / patch. K = blocks · (1 + registers, if included) · heads, in the order
        [block][class token, registers…][head]. An encoder that sees red, green and blue as three pictures has
        so many times the heads: those of red, of green, of blue.

    Raises:
        UnsupportedError: a NotImplementedError: the encoder has no class token, or no such attention.
        ConfigError: a ValueError: there is no such block, or the tiles have another shape.
    """
    theirs = getattr(getattr(encoder, "own", None), "encode_tiles_attention", None)
    if theirs is not None and not mean_heads:  # of a class that a user registered
        return cast("Tensor", theirs(batch, blocks=tuple(blocks), include_registers=include_registers))
    tower = _tower(encoder)
    grid = _grid(tower, batch)
    with _keeping(tower, blocks) as kept:
        tower.run(batch)
    return _maps(tower, grid, kept, _Asked(blocks, include_registers, mean_heads))


def features_and_attention(
    encoder: nn.Module,
    batch: Tensor,
    *,
    blocks: Sequence[int] = (-1,),
    include_registers: bool = False,
    mean_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features (B, D) of tiles and their attention maps (B, K, h, w), from one pass over the encoder.

    Arguments, order of the maps and errors as of `encode_tiles_attention`.
    """
    tower = _tower(encoder)
    grid = _grid(tower, batch)
    with _keeping(tower, blocks) as kept:
        features = encoder(batch)
    first = {index: each._replace(tokens=each.tokens[:: tower.passes]) for index, each in kept.items()}
    return features, _maps(tower, grid, first, _Asked(blocks, include_registers, mean_heads))


class AttentionEncoder(nn.Module):
    """An encoder whose features have its attention maps behind them, as one row: what runs features runs it.

    `forward` takes normalised pixels (B, 3, S, S) float and returns (B, D + K · h · w): maps times the number
    of patches, so that even attention is 1 and they weigh like features where engines are compared.
    Arguments and errors as of `encode_tiles_attention`.

    Attributes:
        channels: what each of the K maps is.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        blocks: Sequence[int] = (-1,),
        include_registers: bool = False,
        mean_heads: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.asked = _Asked(tuple(blocks), include_registers, mean_heads)
        self.channels = attention_channels(encoder, **self.asked._asdict())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D + K · h · w)."""
        features, maps = features_and_attention(self.encoder, pixels, **self.asked._asdict())
        patches = maps.shape[2] * maps.shape[3]
        return torch.cat([features.float(), maps.flatten(1) * patches], dim=1)

    @property
    def output_name(self) -> str:
        """Of the maps, for the names of engines."""
        blocks = dict.fromkeys(str(channel.block) for channel in self.channels)
        kinds = ["registers"] * self.asked.include_registers + ["mean"] * self.asked.mean_heads
        return ".".join(["attention", *blocks, *kinds])

    def map_shape(self, size_px: int) -> tuple[int, int, int]:
        """(K, h, w) of the maps of tiles of a size."""
        height, width = (size_px // side for side in _tower(self.encoder).patch)
        return len(self.channels), height, width

    def apart(self, rows: Tensor, size_px: int) -> tuple[Tensor, Tensor]:
        """Rows of `forward` -> features (B, D) and maps (B, K, h, w), of tiles of a size."""
        channels, height, width = self.map_shape(size_px)
        maps = rows[:, -channels * height * width :] / (height * width)
        return rows[:, : -maps.shape[1]], maps.reshape(-1, channels, height, width)


def attention_channels(
    encoder: nn.Module,
    *,
    blocks: Sequence[int] = (-1,),
    include_registers: bool = False,
    mean_heads: bool = False,
) -> list[AttentionChannel]:
    """What each of the K channels of the maps is; arguments and errors as of `encode_tiles_attention`."""
    tower = _tower(encoder)
    return [
        AttentionChannel(block, token, head)
        for block in _indices(tower, blocks)
        for token in _asked_tokens(tower, include_registers)
        for head in ([None] if mean_heads else range(tower.images * _heads(tower.attentions[block])))
    ]


def why_no_attention(encoder: nn.Module) -> str | None:
    """Why an encoder has no attention maps; None where it has."""
    try:
        _tower(encoder)
    except UnsupportedError as error:
        return str(error)
    return None


def _tower(encoder: nn.Module) -> _Tower:
    own = getattr(encoder, "own", None)  # that a user brought
    encoder = encoder if own is None else getattr(own, "_model", own)
    if isinstance(encoder, channelwise.ChannelwiseEncoder):
        registers = encoder.storage_tokens.shape[1]
        attentions = [block.get_submodule("attn") for block in encoder.blocks]
        return _Tower(encoder, attentions, _names(True, registers), (encoder.patch,) * 2, images=3)
    network = getattr(encoder, "network", None)
    if network is not None:
        return _remote_tower(encoder, getattr(network, "model", network))
    trunk: Any = getattr(encoder, "trunk", None) or getattr(encoder, "vit", None) or encoder
    attentions = _attentions(trunk, _known_attention)
    with_class = getattr(trunk, "cls_token", None) is not None
    tokens = _names(with_class, trunk.num_prefix_tokens - with_class)
    if not tokens:
        raise UnsupportedError(
            f"{type(trunk).__name__} has no class token and no registers, whose attention would be a map"
        )
    side = trunk.patch_embed.patch_size
    patch = (side, side) if isinstance(side, int) else (side[0], side[1])
    return _Tower(
        trunk.forward_features, attentions, tokens, patch, passes=getattr(encoder, "passes_per_tile", 1)
    )


def _remote_tower(encoder: Any, backbone: Any) -> _Tower:
    """Of code that came with the weights: its blocks are found by their names."""
    attentions = _attentions(backbone, lambda attention: hasattr(attention, "qkv"))
    side = backbone.patch_embed.patch_size
    patch = (side, side) if isinstance(side, int) else (side[0], side[1])
    return _Tower(encoder, attentions, _names(True, encoder.prefix_tokens - 1), patch)


def _names(with_class: bool, registers: int) -> tuple[str, ...]:
    return ("class",) * with_class + tuple(f"register {number + 1}" for number in range(registers))


def _attentions(trunk: Any, known: Callable[[Any], bool]) -> list[nn.Module]:
    """The attention of each block of a transformer."""
    found = [getattr(block, "attn", None) for block in getattr(trunk, "blocks", None) or ()]
    if not found or not all(known(attention) for attention in found):
        raise UnsupportedError(
            f"{type(trunk).__name__} has no attention maps: it is no vision transformer whose blocks attend "
            "from a class token to all patches"
        )
    return cast("list[nn.Module]", found)


def _known_attention(attention: Any) -> bool:
    """Whether softmax(query · key) is all there is to it, and computed as here."""
    timm = import_timm()
    kinds = (timm.layers.attention.Attention, timm.models.eva.EvaAttention, timm.models.beit.Attention)
    return type(attention) in kinds and getattr(attention, "relative_position_bias_table", None) is None


@contextmanager
def _keeping(tower: _Tower, blocks: Sequence[int]) -> Iterator[dict[int, _Kept]]:
    """In the block: keeps what the attentions of some blocks are called with in this thread, by index."""
    kept: dict[int, _Kept] = {}
    handles = [
        tower.attentions[index].register_forward_pre_hook(
            partial(_keep, kept, index, get_ident()), with_kwargs=True
        )
        for index in set(_indices(tower, blocks))
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    kept: dict[int, _Kept],
    index: int,
    thread: int,
    _: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    if get_ident() != thread:  # the same encoder, in somebody else's hands
        return
    if named.get("shared_rel_pos_bias") is not None:
        raise UnsupportedError("attention with relative position biases has no maps here")
    more = args[1:] if len(args) > 2 else args[1] if len(args) == 2 else None
    kept[index] = _Kept(args[0], named.get("rope", more))


def _indices(tower: _Tower, blocks: Sequence[int]) -> list[int]:
    count = len(tower.attentions)
    for block in blocks:
        if not -count <= block < count:
            raise ConfigError(f"blocks={tuple(blocks)}: the encoder has {count} blocks, 0 to {count - 1}")
    if not blocks:
        raise ConfigError("blocks=(): name at least one block; -1 is the last")
    return [block % count for block in blocks]


def _asked_tokens(tower: _Tower, include_registers: bool) -> tuple[str, ...]:
    if include_registers:
        return tower.tokens
    if tower.tokens[0] != "class":
        raise UnsupportedError("the encoder has registers but no class token: ask for include_registers=True")
    return tower.tokens[:1]


def _maps(tower: _Tower, grid: tuple[int, int], kept: dict[int, _Kept], asked: _Asked) -> Tensor:
    rows, prefix = len(_asked_tokens(tower, asked.include_registers)), len(tower.tokens)
    made = []
    for index in _indices(tower, asked.blocks):
        if index not in kept:
            raise UnsupportedError(
                f"block {index} was not run as a module of its own (torch.compile?): there is nothing to "
                "make maps of"
            )
        attention = _rows(tower.attentions[index], kept[index], rows)
        patches = attention[..., prefix:]  # (B · images, heads, rows, h · w)
        if patches.shape[-1] != grid[0] * grid[1]:
            raise ConfigError(
                f"the tiles have {grid[0]} x {grid[1]} patches, and the encoder made {patches.shape[-1]}"
            )
        heads = tower.images * patches.shape[1]
        by_tile = patches.reshape(-1, heads, rows, *grid).transpose(1, 2)
        made.append(by_tile.mean(dim=2) if asked.mean_heads else by_tile.flatten(1, 2))
    return torch.cat(made, dim=1)


def _grid(tower: _Tower, batch: Tensor) -> tuple[int, int]:
    """Patches of a tile: rows, columns."""
    (patch_height, patch_width), shape = tower.patch, tuple(batch.shape)
    if len(shape) != 4 or shape[2] % patch_height or shape[3] % patch_width:
        raise ConfigError(
            f"attention maps are of tiles (B, 3, H, W) whose sides are multiples of the patch, "
            f"{patch_height} x {patch_width} px; got {shape}"
        )
    return shape[2] // patch_height, shape[3] // patch_width


def _heads(attention: Any) -> int:
    return int(attention.heads if isinstance(attention, channelwise.Attention) else attention.num_heads)


def _rows(attention: Any, kept: _Kept, rows: int) -> Tensor:
    """Softmax rows of the first tokens, (N, heads, rows, T) float32."""
    query, key = _queries_and_keys(attention, kept.tokens)
    query, key = _turned(attention, query, kept.rotation), _turned(attention, key, kept.rotation)
    scale = query.shape[-1] ** -0.5
    scores: Tensor = (query[:, :, :rows].float() * scale) @ key.float().transpose(2, 3)
    return scores.softmax(dim=-1)


def _queries_and_keys(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T, D) -> two of (N, heads, T, d)."""
    if attention.qkv is None:
        query, key = attention.q_proj(tokens), attention.k_proj(tokens)
    else:
        projected = attention.qkv(tokens)
        if getattr(attention, "q_bias", None) is not None:  # kept apart, for keys have none
            projected = projected + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        query, key, _ = projected.chunk(3, dim=-1)
    heads, same = _heads(attention), nn.Identity()
    query, key = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key))
    return getattr(attention, "q_norm", same)(query), getattr(attention, "k_norm", same)(key)


def _turned(attention: Any, values: Tensor, rotation: Any) -> Tensor:
    """Queries or keys (N, heads, T, d), turned by the place of their patch where the encoder does so."""
    if rotation is None:
        return values
    if isinstance(attention, channelwise.Attention):
        return channelwise.rotated(values, *rotation)
    if isinstance(rotation, tuple):  # sine and cosine of all tokens, (T, d)
        first, second = values.chunk(2, dim=-1)
        sine, cosine = rotation
        return cast("Tensor", values * cosine + torch.cat([-second, first], dim=-1) * sine)
    prefix = attention.num_prefix_tokens
    turn = import_timm().layers.apply_rot_embed_cat
    patches = turn(values[:, :, prefix:], rotation, half=getattr(attention, "rotate_half", False))
    return torch.cat([values[:, :, :prefix], patches], dim=2).to(values.dtype)
