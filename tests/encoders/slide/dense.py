"""Slide encoders as plain as they can be written: float64, whole matrices, head by head.

They take a checkpoint with the published names, and share no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from published import SLOPES_OF_12_HEADS
from torch import Tensor

State = dict[str, Tensor]
Kwargs = dict[str, Any]


class Parameters:
    """A checkpoint in float64, and the layers that it names."""

    def __init__(self, state: State, prefix: str = "") -> None:
        self.state, self.prefix = {name: value.double() for name, value in state.items()}, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def under(self, name: str) -> Parameters:
        return Parameters(self.state, f"{self.prefix}{name}.")

    def linear(self, name: str, values: Tensor) -> Tensor:
        result = values @ self[f"{name}.weight"].T
        return result + self[f"{name}.bias"] if f"{self.prefix}{name}.bias" in self.state else result

    def norm(self, name: str, values: Tensor, eps: float = 1e-5) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]


def gelu(values: Tensor) -> Tensor:
    return 0.5 * values * (1 + torch.erf(values / 2**0.5))


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Callable[[int], Tensor] | None = None
) -> Tensor:
    """(Q, D), (N, D), (N, D) -> (Q, D); `bias` gives the (Q, N) matrix of a head."""
    size = query.shape[1] // heads
    found = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / size**0.5
        if bias is not None:
            scores = scores + bias(head)
        found.append(torch.softmax(scores, dim=-1) @ value[:, part])
    return torch.cat(found, dim=1)


def stacked_attention(
    weights: Parameters, query: Tensor, context: Tensor, heads: int, biased: bool
) -> Tensor:
    """Multi-head attention whose three layers are stacked in one matrix."""
    layers = weights["in_proj_weight"].chunk(3)
    biases = weights["in_proj_bias"].chunk(3) if biased else (0.0, 0.0, 0.0)
    inputs = (query, context, context)
    parts = [x @ matrix.T + b for x, matrix, b in zip(inputs, layers, biases, strict=True)]
    return weights.linear("out_proj", attention(*parts, heads))


def titan(state: State, kwargs: Kwargs, features: Tensor, coords: Tensor, tile_size_lv0: int) -> Tensor:
    """A grid as large as the slide, filled tile by tile."""
    model = Parameters(state, "vision_encoder.")
    at = (coords - coords.min(dim=0).values) // tile_size_lv0
    width, height = (int(side) + 1 for side in at.max(dim=0).values)
    grid = torch.zeros(width, height, features.shape[1], dtype=torch.float64)
    for (column, row), feature in zip(at.tolist(), features.double(), strict=True):
        grid[column, row] += feature
    seen = (grid != 0).any(-1).flatten()
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="ij")
    cells = torch.stack([columns, rows], -1).reshape(-1, 2)[seen].double()
    distance = torch.zeros(1 + len(cells), 1 + len(cells), dtype=torch.float64)
    distance[1:, 1:] = ((cells[:, None] - cells[None]) ** 2).sum(-1).sqrt()

    tokens = gelu(model.linear("patch_embed.0", grid.flatten(0, 1)[seen]))
    tokens = torch.cat([model["cls_token"][0], tokens])
    for number in range(kwargs["depth"]):
        block = model.under(f"blocks.modules_list.{number}")
        parts = block.linear("attn.qkv", block.norm("norm1", tokens, 1e-6)).chunk(3, dim=1)
        attended = attention(*parts, kwargs["heads"], lambda head: -SLOPES_OF_12_HEADS[head] * distance)
        tokens = tokens + block.linear("attn.proj", attended)
        hidden = gelu(block.linear("mlp.fc1", block.norm("norm2", tokens, 1e-6)))
        tokens = tokens + block.linear("mlp.fc2", hidden)
    pool = model.under("attn_pool_contrastive")
    context = pool.norm("ln_k", model.norm("norm", tokens, 1e-6))
    query = pool.norm("ln_q", pool["query"])
    return stacked_attention(pool.under("attn"), query, context, kwargs["pool_heads"], biased=True)[0]


def prism(state: State, kwargs: Kwargs, features: Tensor) -> tuple[Tensor, Tensor]:
    """Every round reads the tiles by itself; nothing is kept between rounds."""
    model = Parameters(state, "image_resampler.")
    perceiver = model.under("perceiver")
    latents, tiles = perceiver["latents"], features.double()

    def feed_forward(weights: Parameters, values: Tensor) -> Tensor:
        hidden = weights.linear("net.0", weights.norm("norm", values))
        half = hidden.shape[1] // 2
        return weights.linear("net.2", hidden[:, :half] * gelu(hidden[:, half:]))

    for number in range(kwargs["rounds"]):
        reading = perceiver.under(f"layers.{min(number, 1)}.xattn")
        cross = reading.under("xattn")
        query = cross.linear("to_q", cross.norm("x_norm", latents))
        both = cross.linear("to_kv", tiles)
        key, value = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        latents = latents + cross.linear("to_out", attention(query, key, value, heads=1))
        latents = latents + feed_forward(reading.under("ff"), latents)
        for depth in range(kwargs["depth"]):
            block = perceiver.under(f"layers.0.tf.{depth}")
            normed = block.norm("mhsa.norm", latents)
            mha = block.under("mhsa.mha")
            latents = latents + stacked_attention(mha, normed, normed, kwargs["heads"], biased=False)
            latents = latents + feed_forward(block.under("ff"), latents)
    return model.norm("cls_norm", latents[:1])[0], model.norm("img_norm", latents[1:])


def gigapath_slide(
    state: State,
    kwargs: Kwargs,
    features: Tensor,
    coords: Tensor,
    tile_size_lv0: int,
    mean: bool = False,
) -> Tensor:
    """The class token, or the mean over the tiles, which leaves out the closing norm of the layers."""
    model = Parameters(state)
    dim = kwargs["dim"]
    places = []
    for x, y in (coords // tile_size_lv0).tolist():
        quarter = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
        waves = [cell / 10_000**quarter for cell in (y, x)]
        places.append(torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)]))
    tokens = model.linear("patch_embed.proj", features.double()) + torch.stack(places)
    tokens = torch.cat([model["cls_token"][0], tokens])
    for number in range(kwargs["depth"]):
        layer = model.under(f"encoder.layers.{number}")
        normed = layer.norm("self_attn_layer_norm", tokens)
        parts = [layer.linear(f"self_attn.{name}_proj", normed) for name in "qkv"]
        attended = dilated(*parts, kwargs["heads"], kwargs["segments"], kwargs["dilations"])
        attended = layer.norm("self_attn.inner_attn_ln", attended)
        tokens = tokens + layer.linear("self_attn.out_proj", attended)
        hidden = gelu(layer.linear("ffn.fc1", layer.norm("final_layer_norm", tokens)))
        tokens = tokens + layer.linear("ffn.fc2", layer.norm("ffn.ffn_layernorm", hidden))
    if mean:
        return model.norm("norm", tokens[1:].mean(0, keepdim=True), 1e-6)[0]
    return model.norm("norm", model.norm("encoder.layer_norm", tokens[:1]), 1e-6)[0]


def weighed(attention: Parameters, tiles: Tensor, values: Tensor) -> Tensor:
    """Tile by tile: the values, each times its share, added up."""
    scores = []
    for tile in tiles:
        gate = 1 / (1 + torch.exp(-attention.linear("attention_b.0", tile)))
        scores.append(
            attention.linear("attention_c", torch.tanh(attention.linear("attention_a.0", tile)) * gate)
        )
    shares = torch.exp(torch.stack(scores) - max(scores))
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for share, value in zip(shares, values, strict=True):
        total += share / shares.sum() * value
    return total


def feather(state: State, kwargs: Kwargs, features: Tensor) -> Tensor:
    model = Parameters(state, "model.")
    tiles = model.linear("patch_embed.0", features.double()).clamp(min=0)
    return weighed(model.under("global_attn"), tiles, tiles)


def chief(state: State, kwargs: Kwargs, features: Tensor) -> Tensor:
    model = Parameters(state, "attention_net.")
    tiles = model.linear("0", features.double()).clamp(min=0)
    return weighed(model.under("3"), tiles, features.double())


def madeleine(state: State, kwargs: Kwargs, features: Tensor) -> Tensor:
    """Elements of all heads lie beside each other: (e, head) is number e * heads + head."""
    model, heads = Parameters(state), kwargs["heads"]
    tiles = features.double()
    for number in (0, 4, 8):
        layer = model.under("wsi_embedders.pre_attn")
        tiles = gelu(layer.norm(str(number + 1), layer.linear(str(number), tiles)))
    pooled = torch.zeros(tiles.shape[1], dtype=torch.float64)
    for head in range(heads):
        own = tiles[:, head::heads]
        pooled[head::heads] = weighed(model.under(f"wsi_embedders.attn.{head}"), own, own)
    return model.linear("projector", pooled)


def dilated(
    query: Tensor, key: Tensor, value: Tensor, heads: int, segments: list[int], dilations: list[int]
) -> Tensor:
    """All branches of all heads, with the zeros that fill up segments, mixed at the end."""
    tokens, dim = query.shape
    size = dim // heads
    outputs = torch.zeros(len(segments), tokens, dim, dtype=torch.float64)
    sums = torch.full((len(segments), tokens, heads), -1e8, dtype=torch.float64)
    for branch, (segment, dilation) in enumerate(zip(segments, dilations, strict=True)):
        segment = min(segment, tokens)
        room = -(-segment // dilation) * dilation
        for start in range(0, tokens, segment):
            stop = min(start + segment, tokens)
            filled = [torch.zeros(room, dim, dtype=torch.float64) for _ in range(3)]
            for target, source in zip(filled, (query, key, value), strict=True):
                target[: stop - start] = source[start:stop]
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                seen = torch.arange(head // (heads // dilation), room, dilation)
                q, k, v = (each[seen][:, part] for each in filled)
                scores = q @ k.T / size**0.5
                real = seen[seen < stop - start]
                outputs[branch, start + real, part] = (torch.softmax(scores, -1) @ v)[: len(real)]
                sums[branch, start + real, head] = torch.logsumexp(scores, -1)[: len(real)]
    shares = torch.softmax(sums, dim=0).repeat_interleave(size, dim=2)
    return (shares * outputs).sum(0)


def moozy_slide(state: State, kwargs: Kwargs, features: Tensor, coords: Tensor, tile_size_lv0: int) -> Tensor:
    model = Parameters(state)
    prefix = 1 + kwargs["num_registers"]
    places = coords.double() / tile_size_lv0
    distance = torch.zeros(prefix + len(places), prefix + len(places), dtype=torch.float64)
    distance[prefix:, prefix:] = ((places[:, None] - places[None]) ** 2).sum(-1).sqrt()
    tokens = gelu(model.linear("input_proj.0", features.double()))
    tokens = torch.cat([model["cls_token"][0], model["register_tokens"][0], tokens])
    for number in range(kwargs["n_layers"]):
        block = model.under(f"blocks.{number}")
        tokens = moozy_block(block, tokens, kwargs["n_heads"], model["pos_bias.slopes"], distance)
    return model.norm("norm", tokens[:1])[0]


def moozy(state: State, kwargs: Kwargs, slides: Tensor) -> Tensor:
    model = Parameters(state)
    tokens = torch.cat([model["case_token"][0], slides.double()])
    for number in range(kwargs["num_layers"]):
        tokens = moozy_block(model.under(f"blocks.{number}"), tokens, kwargs["num_heads"])
    return model.norm("norm", tokens[:1])[0]


def moozy_block(
    block: Parameters,
    tokens: Tensor,
    heads: int,
    slopes: Tensor | None = None,
    distance: Tensor | None = None,
) -> Tensor:
    normed = block.norm("norm1", tokens)
    parts = [block.linear(f"{name}_proj", normed) for name in "qkv"]
    scaled = slopes is None or distance is None
    bias = None if slopes is None or distance is None else lambda head: slopes[head] * distance
    attended = block.linear("out_proj", attention(*parts, heads, bias))
    tokens = tokens + (attended * block["ls_attn.gamma"] if scaled else attended)
    hidden = block.linear("fc2", gelu(block.linear("fc1", block.norm("norm2", tokens))))
    return tokens + (hidden * block["ls_mlp.gamma"] if scaled else hidden)
