"""From the keys of published checkpoints to those of our encoders.

Vision transformers of the transformers library keep query, key and value apart and name everything
differently from timm; the rest is the same arithmetic. What a conversion does not know it refuses
(inside the blocks) or leaves under its own name (outside), where the strict loading that follows
names it, unless the recipe ignores it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from slide2vec.encoders.checkpoint_keys import PUBLISHED, RENAMES
from slide2vec.errors import WeightsError
from slide2vec.recipes import EncoderSpec

__all__ = ["State", "convert"]

State = dict[str, Tensor]
Convert = Callable[[State, EncoderSpec], State]
Names = Mapping[str, str]

#: A block's parameter: the block's list and number, and the name inside it. transformers 5 calls the
#: list of ViTModel `layers` in memory.
_BLOCK = re.compile(r"(?P<where>(?:encoder\.layer|layers)\.(?P<number>\d+))\.(?P<name>.+)")

#: Parameters outside the blocks.
_AROUND: Names = MappingProxyType(
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
)

#: Names that transformers 5 uses in memory, and those that it and its predecessors write to files. A
#: model that wraps another may have been saved with either.
_WRITTEN: Names = MappingProxyType(
    {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.down_proj": "mlp.weights_out",
    }
)

#: Layers that timm computes in one: its layer, and what is stacked into it, in order. SwiGLUPacked
#: splits its first layer into a gate and a value, in this order, as transformers does.
_STACKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
    }
)

_VIT: Names = MappingProxyType(
    {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
)

_DINOV2: Names = MappingProxyType(
    {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.output.dense": "attn.proj",
        "layer_scale1": "ls1",
        "layer_scale2": "ls2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.weights_in": "mlp.fc1",
        "mlp.weights_out": "mlp.fc2",
    }
)


def convert(name: str, state: State, spec: EncoderSpec) -> State:
    """The checkpoint with the encoder's keys; as it is for "".

    Raises:
        WeightsError: there is no such conversion, or the checkpoint is not what it converts.
    """
    if not name:
        return state
    if name not in CONVERSIONS:
        raise WeightsError(f"weights.convert={name!r} is not one of {sorted(CONVERSIONS)}")
    return CONVERSIONS[name](state, spec)


def _vit(state: State, spec: EncoderSpec) -> State:
    """ViTModel of transformers."""
    return _converted(state, _VIT, "ViTModel")


def _dinov2(state: State, spec: EncoderSpec) -> State:
    """Dinov2Model of transformers, its position embeddings brought to the encoder's grid."""
    converted = _converted(state, _DINOV2, "Dinov2Model")
    if "pos_embed" in converted and "patch_embed.proj.weight" in converted and "img_size" in spec.kwargs:
        side = int(spec.kwargs["img_size"]) // converted["patch_embed.proj.weight"].shape[-1]
        published = converted["pos_embed"]
        converted["pos_embed"] = _resampled(published, side)
        if published.shape != converted["pos_embed"].shape:
            converted[PUBLISHED] = published
    return converted


def _dinov2_registers(state: State, spec: EncoderSpec) -> State:
    """Dinov2WithRegistersModel of transformers, and remote classes with its keys.

    transformers adds a position to the class token and none to the registers; the encoder adds
    positions to patches only, so the class token takes its own once and for all.
    """
    converted = _converted(state, _DINOV2, "Dinov2WithRegistersModel")
    missing = {"cls_token", "reg_token", "pos_embed"} - converted.keys()
    if missing:
        published = sorted(key for key, ours in _AROUND.items() if ours in missing)
        raise WeightsError(f"the checkpoint is not of a Dinov2WithRegistersModel: no {', '.join(published)}")
    positions = converted["pos_embed"]
    converted["cls_token"] = converted["cls_token"].float() + positions[:, :1].float()
    converted["pos_embed"] = positions[:, 1:].contiguous()
    return converted


#: Names that `weights.convert` of a recipe may give.
CONVERSIONS: Mapping[str, Convert] = MappingProxyType(
    {
        "transformers_vit": _vit,
        "transformers_dinov2": _dinov2,
        "transformers_dinov2_registers": _dinov2_registers,
        **RENAMES,
    }
)


def _converted(state: State, names: Names, model: str) -> State:
    """Every key renamed, blocks by `names`; unknown ones outside the blocks keep their names."""
    blocks: dict[str, State] = {}
    converted: State = {}
    for key, tensor in _unwrapped(state, model).items():
        match = _BLOCK.fullmatch(key)
        if match is None:
            _put(converted, _AROUND.get(key, key), tensor, key)
        else:
            blocks.setdefault(match["where"], {})[match["name"]] = tensor
    for where, block in blocks.items():
        number = where.rsplit(".", 1)[1]
        for name, tensor in _block(block, names, where, model).items():
            _put(converted, f"blocks.{number}.{name}", tensor, where)
    return converted


def _unwrapped(state: State, model: str) -> State:
    """The keys without the prefix of a model that wraps this one; other keys keep theirs."""
    landmark = "embeddings.cls_token"
    found = [key for key in state if key == landmark or key.endswith(f".{landmark}")]
    if len(found) != 1:
        has = (
            f"{len(found)} of them"
            if found
            else f"it starts with {', '.join(sorted(state)[:3]) or 'nothing'}"
        )
        raise WeightsError(f"the checkpoint is not of a {model}: it should have one {landmark}, but {has}")
    prefix = found[0].removesuffix(landmark)
    unwrapped: State = {}
    for key, tensor in state.items():
        _put(unwrapped, key.removeprefix(prefix), tensor, f"prefix {prefix!r}")
    return unwrapped


def _block(block: State, names: Names, where: str, model: str) -> State:
    """The parameters of one block under timm's names."""
    left = {_written(name): tensor for name, tensor in block.items()}
    if len(left) != len(block):
        raise WeightsError(f"the checkpoint has parameters of {where} twice, under two names")
    converted: State = {}
    for target, sources in _STACKED.items():
        for leaf in ("weight", "bias"):
            parts = [f"{source}.{leaf}" for source in sources]
            absent = [part for part in parts if part not in left]
            if len(absent) == len(parts):
                continue  # another kind of layer; if it should be there, strict loading misses it
            if absent:
                raise WeightsError(f"the checkpoint lacks {', '.join(f'{where}.{part}' for part in absent)}")
            converted[f"{target}.{leaf}"] = torch.cat([left.pop(part) for part in parts])
    unknown = []
    for name, tensor in left.items():
        layer, _, leaf = name.rpartition(".")
        if layer in names:
            renamed = "gamma" if leaf == "lambda1" else leaf
            _put(converted, f"{names[layer]}.{renamed}", tensor, where)
        else:
            unknown.append(f"{where}.{name}")
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise WeightsError(
            f"the checkpoint is not of a {model}: unexpected {', '.join(sorted(unknown)[:5])}{more}"
        )
    return converted


def _written(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{_WRITTEN.get(layer, layer)}.{leaf}"


def _put(state: State, key: str, tensor: Tensor, where: str) -> None:
    """Add a tensor under a new key: two that want the same name would hide each other."""
    if key in state:
        raise WeightsError(f"two parameters of the checkpoint are {key!r} of the encoder ({where})")
    state[key] = tensor


def _resampled(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + N, D), class token first, for a grid of side x side patches.

    The interpolation is the one of transformers at run time: bicubic, without antialiasing. timm's
    has antialiasing, and gives other features.
    """
    count = positions.shape[1] - 1
    had = math.isqrt(max(count, 0))
    if had * had != count:
        raise WeightsError(f"position embeddings {tuple(positions.shape)} are not of a square grid")
    if had == side:
        return positions
    grid = positions[:, 1:].float().reshape(1, had, had, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat([positions[:, :1].float(), patches], dim=1)
