"""Keys of published checkpoints with parts of other models in them -> those of our modules.

Each function takes a checkpoint and the encoder's specification and returns the state under our
keys. What belongs to a part that is not used keeps its name: the recipe says which of those may be
left over (`weights.ignore`), so that nothing is dropped unseen. Pieces that lack a partner are not
fused; loading then names the missing key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from slide2vec.recipes import EncoderSpec

__all__ = ["PUBLISHED", "RENAMES"]

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

#: A table of positions as published, where the encoder's own was resampled from it: a buffer of the vision
#: transformer that is not saved.
PUBLISHED = "published_positions"

#: CONCH keeps the vision tower under "visual.".
CONCH: Rules = (
    (r"^module\.", ""),
    (r"^visual\.trunk\.", "vit."),
    (r"^visual\.attn_pool_contrast\.", "pool."),
    (r"^visual\.ln_contrast\.", "norm."),
    (r"^pool\.attn\.out_proj\.", "pool.out."),
    (r"^pool\.ln_q\.", "pool.norm_query."),
    (r"^pool\.ln_k\.", "pool.norm_context."),
)
CONCH_V1_5: Rules = (
    (r"^trunk\.", "vit."),
    (r"^attn_pool_contrast\.", "pool."),
    (r"^ln_contrast\.", "norm."),
    (r"^pool\.to_(q|kv|out)\.", r"pool.\1."),
    (r"^pool\.ln_q\.", "pool.norm_query."),
    (r"^pool\.ln_k\.", "pool.norm_context."),
)
#: transformers' CLIP (its spelling: "pre_layrnorm"), in iSight under "patch_encoder.".
CLIP: Rules = (
    (r"^(patch_encoder\.)?vision_model\.", "vit."),
    (r"^visual_token_projection\.", "projection."),
    (r"^vit\.embeddings\.class_embedding$", "vit.cls_token"),
    (r"^vit\.embeddings\.patch_embedding\.", "vit.patch_embed.proj."),
    (r"^vit\.embeddings\.position_embedding\.weight$", "vit.pos_embed"),
    (r"^vit\.pre_layrnorm\.", "vit.norm_pre."),
    (r"^vit\.encoder\.layers\.", "vit.blocks."),
    (r"^(vit\.blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(vit\.blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"^(vit\.blocks\.\d+)\.self_attn\.", r"\1.attn."),
)
#: The same with its closing norm and its projection into the space that is shared with text.
CLIP_TOWER: Rules = (*CLIP, (r"^vit\.post_layernorm\.", "vit.norm."), (r"^visual_projection\.", "head."))
#: open_clip's own transformer.
OPEN_CLIP: Rules = (
    (r"^visual\.proj$", "head.weight"),
    (r"^visual\.class_embedding$", "vit.cls_token"),
    (r"^visual\.positional_embedding$", "vit.pos_embed"),
    (r"^visual\.conv1\.", "vit.patch_embed.proj."),
    (r"^visual\.ln_pre\.", "vit.norm_pre."),
    (r"^visual\.ln_post\.", "vit.norm."),
    (r"^visual\.transformer\.resblocks\.", "vit.blocks."),
    (r"^(vit\.blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(vit\.blocks\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"^(vit\.blocks\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"^(vit\.blocks\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"^(vit\.blocks\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
#: open_clip around a model of timm.
OPEN_CLIP_TIMM: Rules = ((r"^visual\.trunk\.", "vit."), (r"^visual\.head\.proj\.", "head."))
#: KEEP calls what timm calls gamma a weight.
KEEP: Rules = (
    (r"^visual\.", "vit."),
    (r"^visual_head\.", "head."),
    (r"^(vit\.blocks\.\d+\.ls[12])\.weight$", r"\1.gamma"),
)
METTLE: Rules = ((r"^backbone\.", "vit."),)
#: DINOv2's own code, whose training keeps the blocks in chunks; numbers count through them.
DINOV2: Rules = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.mlp\.w12\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.w3\.", r"\1.mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
#: BEiT-3 of torchscale: expert A is for pixels, B for text.
BEIT3: Rules = (
    (r"^beit3\.", ""),
    (r"^vision_head\.", "projection."),
    (r"^vision_embed\.cls_token$", "vit.cls_token"),
    (r"^vision_embed\.proj\.", "vit.patch_embed.proj."),
    (r"^encoder\.embed_positions\.A\.weight$", "vit.pos_embed"),
    (r"^encoder\.layer_norm\.A\.", "vit.norm."),
    (r"^encoder\.layers\.(\d+\.(?!.*\bB\b).*)$", r"vit.blocks.\1"),
    (r"^(vit\.blocks\.\d+)\.self_attn_layer_norm\.A\.", r"\1.norm1."),
    (r"^(vit\.blocks\.\d+)\.final_layer_norm\.A\.", r"\1.norm2."),
    (r"^(vit\.blocks\.\d+)\.self_attn\.inner_attn_ln\.A\.", r"\1.attn.norm."),
    (r"^(vit\.blocks\.\d+)\.self_attn\.out_proj\.A\.", r"\1.attn.proj."),
    (r"^(vit\.blocks\.\d+)\.self_attn\.([qkv])_proj\.A\.", r"\1.attn.\2_proj."),
    (r"^(vit\.blocks\.\d+)\.ffn\.A\.ffn_layernorm\.", r"\1.mlp.norm."),
    (r"^(vit\.blocks\.\d+)\.ffn\.A\.", r"\1.mlp."),
)
#: SAM 2 calls the layers of its transformer's perceptrons by their numbers.
SAM2: Rules = (
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.0\.", r"\1.fc1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.1\.", r"\1.fc2."),
)
#: Rows of BEiT-3's position table that are never used (it counts from 2, as fairseq does).
BEIT3_UNUSED_ROWS = 2


def conch(state: State, spec: EncoderSpec) -> State:
    """CONCH: its pooler is torch's MultiheadAttention with a projection each for q, k and v."""
    state = _renamed(state, CONCH)
    bias = state.pop("pool.attn.in_proj_bias", None)
    if bias is not None:
        width = bias.shape[0] // 3
        state["pool.q.bias"], state["pool.kv.bias"] = bias[:width], bias[width:]
    if "pool.attn.q_proj_weight" in state:
        state["pool.q.weight"] = state.pop("pool.attn.q_proj_weight")
    key_value = [f"pool.attn.{part}_proj_weight" for part in "kv"]
    if all(name in state for name in key_value):
        state["pool.kv.weight"] = torch.cat([state.pop(name) for name in key_value])
    if "visual.proj_contrast" in state:
        state["projection.weight"] = state.pop("visual.proj_contrast").t().contiguous()
    return state


def conch_v1_5(state: State, spec: EncoderSpec) -> State:
    """CONCH v1.5: trained at 14 x 14 patches and used at more; its position table is resampled once."""
    state = _renamed(state, CONCH_V1_5)
    if "vit.pos_embed" in state:
        patches = spec.kwargs["img_size"] // spec.kwargs["patch_size"]
        published = state["vit.pos_embed"]
        state["vit.pos_embed"] = _resampled(published, patches)
        if published.shape != state["vit.pos_embed"].shape:
            state[PUBLISHED] = published
    return state


def _resampled(table: Tensor, patches: int) -> Tensor:
    """(1, 1 + n * n, D) -> (1, 1 + patches * patches, D), class token first.

    Bicubic with the scale (patches + 0.1) / n, as the model's own code and DINO's have it: plain
    resizing to the same grid gives other values.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if side == patches:
        return table
    first, grid = table[:, :1].float(), table[:, 1:].float()
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(patches + 0.1) / side, mode="bicubic")
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def clip_vision_linear(state: State, spec: EncoderSpec) -> State:
    """iSight: the vision tower of a transformers CLIPModel and the linear layer over its tokens."""
    return _as_timm(_fused(_renamed(state, CLIP)))


def clip_vision(state: State, spec: EncoderSpec) -> State:
    """PLIP: the vision tower of a transformers CLIPModel, with its projection."""
    return _as_timm(_fused(_renamed(state, CLIP_TOWER)))


def open_clip(state: State, spec: EncoderSpec) -> State:
    """QuiltNet: open_clip multiplies from the left with what is a linear layer's weight transposed."""
    state = _as_timm(_renamed(state, OPEN_CLIP))
    if "head.weight" in state:
        state["head.weight"] = state["head.weight"].T.contiguous()
    return state


def _as_timm(state: State) -> State:
    """The class token (D) and the positions (N, D) of a CLIP with the dimensions that timm's have."""
    if "vit.cls_token" in state:
        state["vit.cls_token"] = state["vit.cls_token"].reshape(1, 1, -1)
    if "vit.pos_embed" in state:
        state["vit.pos_embed"] = state["vit.pos_embed"].unsqueeze(0)
    return state


def dinov2(state: State, spec: EncoderSpec) -> State:
    """DINOv2's own vision transformers. Where they have registers, timm adds positions to patches only, so
    the class token takes its own once and for all."""
    state = _renamed(state, DINOV2)
    if {"reg_token", "cls_token", "pos_embed"} <= state.keys():
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"].float() + positions[:, :1].float()
        state["pos_embed"] = positions[:, 1:].contiguous()
    return state


def swin(state: State, spec: EncoderSpec) -> State:
    """Swin transformers as timm had them before 0.9: a stage ended with what the next one now begins with,
    and tables that follow from the size were saved, too."""
    kept = {
        key: value for key, value in state.items() if not re.search(r"relative_position_index|attn_mask", key)
    }
    if "layers.0.downsample.reduction.weight" not in kept:
        return kept
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) + 1}.downsample", key): value
        for key, value in kept.items()
    }


#: CRISP was tuned with matrices of rank 8 that count alpha / rank = 16 / 8 times.
LORA_SCALE = 2.0


def lora(state: State, spec: EncoderSpec) -> State:
    """CRISP: peft's adapters are added to the weights that they adapt."""
    state = _renamed(state, ((r"^base_model\.model\.", ""),))
    merged = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        layer, _, leaf = key.partition(".base_layer.")
        low, high = (state.get(f"{layer}.lora_{part}.default.weight") for part in "AB")
        if leaf == "weight" and low is not None and high is not None:
            value = value.float() + LORA_SCALE * (high.float() @ low.float())
        merged[f"{layer}.{leaf}" if leaf else key] = value
    return merged


def _by(rules: Rules) -> Callable[[State, EncoderSpec], State]:
    """A conversion that only renames."""
    return lambda state, spec: _renamed(state, rules)


def beit3_vision(state: State, spec: EncoderSpec) -> State:
    """MUSK: the vision expert of BEiT-3 in torchscale's keys."""
    state = _fused(_renamed(state, BEIT3))
    if "vit.pos_embed" in state:
        state["vit.pos_embed"] = state["vit.pos_embed"][BEIT3_UNUSED_ROWS:].unsqueeze(0)
    return state


def _renamed(state: State, rules: Rules) -> State:
    """Every rule is applied to every key, in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    return renamed


def _fused(state: State) -> State:
    """`x.q_proj`, `x.k_proj`, `x.v_proj` of our blocks -> `x.qkv`, rows in that order."""
    fused = dict(state)
    for key in state:
        match = re.fullmatch(r"(vit\.blocks\.\d+\.attn)\.q_proj\.(weight|bias)", key)
        if match is None:
            continue
        parts = [f"{match[1]}.{part}_proj.{match[2]}" for part in "qkv"]
        if all(part in state for part in parts):
            fused[f"{match[1]}.qkv.{match[2]}"] = torch.cat([fused.pop(part) for part in parts])
    return fused


#: Names that `weights.convert` of a recipe may give.
RENAMES: Mapping[str, Callable[[State, EncoderSpec], State]] = MappingProxyType(
    {
        "conch": conch,
        "conch_v1_5": conch_v1_5,
        "clip_vision_linear": clip_vision_linear,
        "beit3_vision": beit3_vision,
        "clip_vision": clip_vision,
        "open_clip": open_clip,
        "open_clip_timm": _by(OPEN_CLIP_TIMM),
        "dinov2": dinov2,
        "swin": swin,
        "lora": lora,
        "keep": _by(KEEP),
        "mettle": _by(METTLE),
        "sam2": _by(SAM2),
    }
)
