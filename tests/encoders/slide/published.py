"""Names and shapes of the published checkpoints, written from the facts about them, at any size.

`kwargs` are those of a recipe: its own, or smaller ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slide2vec.recipes import Recipe, load_recipe

Shapes = dict[str, tuple[int, ...]]
Kwargs = dict[str, Any]

#: Small models with every feature of the large ones: as many heads, several layers, all branches.
SMALL: dict[str, Kwargs] = {
    "titan": {"dim": 96, "depth": 2, "hidden": 40},
    "prism": {"in_dim": 48, "dim": 32, "latents": 7, "rounds": 4, "depth": 2},
    "gigapath-slide": {"in_dim": 24, "dim": 64, "depth": 2, "hidden": 40, "segments": [4, 11, 30, 62, 200]},
    "gigapath-flash-slide": {
        "in_dim": 20,
        "dim": 64,
        "depth": 2,
        "hidden": 40,
        "segments": [4, 11, 30, 62, 200],
    },
    "feather": {"in_dim": 24, "dim": 32, "hidden": 20},
    "feather-uni": {"in_dim": 28, "dim": 32, "hidden": 20},
    "feather-uni2": {"in_dim": 36, "dim": 32, "hidden": 20},
    "madeleine": {"in_dim": 24, "dim": 32, "hidden": 20},
    "chief": {"in_dim": 24, "dim": 32, "hidden": 20},
    "moozy-slide": {"d_model": 96, "n_layers": 2, "dim_feedforward": 40, "feat_dim": 20},
    "moozy": {"d_model": 96, "num_layers": 2, "dim_feedforward": 40},
}
#: Those of attention alone, which see neither places nor order.
ABMIL_PRESETS = ["chief", "feather", "madeleine"]
#: One of each architecture.
SLIDE_PRESETS = ["gigapath-slide", "moozy-slide", "prism", "titan", *ABMIL_PRESETS]


def small(preset: str) -> Recipe:
    """The preset's recipe with the small model."""
    return with_kwargs(load_recipe(preset), **SMALL[preset])


def with_kwargs(recipe: Recipe, **changes: Any) -> Recipe:
    kwargs = {**recipe.encoder.kwargs, **changes}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


def in_dim(recipe: Recipe) -> int:
    kwargs = recipe.encoder.kwargs
    return int(kwargs.get("in_dim") or kwargs["feat_dim"])


def layer(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def titan(kwargs: Kwargs) -> Shapes:
    """The vision side; the pooling for text has 128 queries and is not used, nor is `proj`."""
    dim, hidden = kwargs["dim"], kwargs["hidden"]
    found: Shapes = {"cls_token": (1, 1, dim), "proj": (dim, dim)}
    found |= layer("patch_embed.0", dim, kwargs["in_dim"]) | norm("norm", dim)
    for number in range(kwargs["depth"]):
        block = f"blocks.modules_list.{number}"
        found |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
        found |= layer(f"{block}.attn.qkv", 3 * dim, dim) | layer(f"{block}.attn.proj", dim, dim)
        found |= layer(f"{block}.mlp.fc1", hidden, dim) | layer(f"{block}.mlp.fc2", dim, hidden)
    for pool, queries in (("attn_pool", 128), ("attn_pool_contrastive", 1)):
        found[f"{pool}.query"] = (queries, dim)
        found[f"{pool}.attn.in_proj_weight"] = (3 * dim, dim)
        found[f"{pool}.attn.in_proj_bias"] = (3 * dim,)
        found |= layer(f"{pool}.attn.out_proj", dim, dim)
        found |= norm(f"{pool}.ln_q", dim) | norm(f"{pool}.ln_k", dim)
    return {f"vision_encoder.{name}": shape for name, shape in found.items()}


def prism(kwargs: Kwargs) -> Shapes:
    """The resampler, with shared layers under one name."""
    dim = kwargs["dim"]
    found: Shapes = {"perceiver.latents": (1 + kwargs["latents"], dim)}
    found |= norm("cls_norm", dim) | norm("img_norm", dim)

    def feed_forward(name: str) -> Shapes:
        return (
            norm(f"{name}.norm", dim)
            | layer(f"{name}.net.0", 2 * dim, dim)
            | layer(f"{name}.net.2", dim, dim)
        )

    for number in range(2):
        reading = f"perceiver.layers.{number}.xattn"
        found |= norm(f"{reading}.xattn.x_norm", dim) | feed_forward(f"{reading}.ff")
        found |= layer(f"{reading}.xattn.to_q", dim, dim, bias=False)
        found |= layer(f"{reading}.xattn.to_kv", 2 * dim, kwargs["in_dim"], bias=False)
        found |= layer(f"{reading}.xattn.to_out", dim, dim, bias=False)
    for number in range(kwargs["depth"]):
        block = f"perceiver.layers.0.tf.{number}"
        found |= norm(f"{block}.mhsa.norm", dim) | feed_forward(f"{block}.ff")
        found[f"{block}.mhsa.mha.in_proj_weight"] = (3 * dim, dim)
        found |= layer(f"{block}.mhsa.mha.out_proj", dim, dim, bias=False)
    return {f"image_resampler.{name}": shape for name, shape in found.items()}


def gigapath_slide(kwargs: Kwargs) -> Shapes:
    dim, hidden = kwargs["dim"], kwargs["hidden"]
    found: Shapes = {"cls_token": (1, 1, dim)} | layer("patch_embed.proj", dim, kwargs["in_dim"])
    found |= norm("norm", dim) | norm("encoder.layer_norm", dim)
    for number in range(kwargs["depth"]):
        here = f"encoder.layers.{number}"
        for name in ("k", "v", "q", "out"):
            found |= layer(f"{here}.self_attn.{name}_proj", dim, dim)
        found |= norm(f"{here}.self_attn.inner_attn_ln", dim) | norm(f"{here}.self_attn_layer_norm", dim)
        found |= layer(f"{here}.ffn.fc1", hidden, dim) | layer(f"{here}.ffn.fc2", dim, hidden)
        found |= norm(f"{here}.ffn.ffn_layernorm", hidden) | norm(f"{here}.final_layer_norm", dim)
    return found


def _gated(name: str, dim: int, hidden: int) -> Shapes:
    found = layer(f"{name}.attention_a.0", hidden, dim) | layer(f"{name}.attention_b.0", hidden, dim)
    return found | layer(f"{name}.attention_c", 1, hidden)


def feather(kwargs: Kwargs) -> Shapes:
    """Under the name that transformers' wrapper has for it."""
    dim = kwargs["dim"]
    found = layer("patch_embed.0", dim, kwargs["in_dim"]) | _gated("global_attn", dim, kwargs["hidden"])
    return {f"model.{name}": shape for name, shape in found.items()}


def madeleine(kwargs: Kwargs) -> Shapes:
    """With the projection of tokens for training, which is not used."""
    dim, heads = kwargs["dim"], kwargs["heads"]
    found = layer("token_projector", 128, dim * heads) | layer("projector", dim, dim * heads)
    for number, (into, out) in enumerate(((kwargs["in_dim"], dim), (dim, dim), (dim, dim * heads))):
        found |= layer(f"wsi_embedders.pre_attn.{4 * number}", out, into)
        found |= norm(f"wsi_embedders.pre_attn.{4 * number + 1}", out)
    for number in range(heads):
        found |= _gated(f"wsi_embedders.attn.{number}", dim, kwargs["hidden"])
    return found


def chief(kwargs: Kwargs) -> Shapes:
    """With the heads and the organs, which are not used."""
    dim, hidden = kwargs["dim"], kwargs["hidden"]
    found = layer("attention_net.0", dim, kwargs["in_dim"]) | _gated("attention_net.3", dim, hidden)
    for name in ("classifiers", "instance_classifiers.0", "instance_classifiers.1"):
        found |= layer(name, 2, dim)
    found |= layer("att_head.fc1", hidden, dim) | layer("att_head.fc2", 1, hidden)
    return found | layer("text_to_vision.0", dim, 768) | {"organ_embedding": (19, 768)}


def _moozy_blocks(dim: int, hidden: int, count: int) -> Shapes:
    found: Shapes = {}
    for number in range(count):
        block = f"blocks.{number}"
        found |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
        for name in ("q", "k", "v", "out"):
            found |= layer(f"{block}.{name}_proj", dim, dim)
        found |= layer(f"{block}.fc1", hidden, dim) | layer(f"{block}.fc2", dim, hidden)
    return found


def moozy_slide(kwargs: Kwargs) -> Shapes:
    """With the mask token, which is not used, and the slopes under the name of every block."""
    dim, count = kwargs["d_model"], kwargs["n_layers"]
    found: Shapes = {"cls_token": (1, 1, dim), "mask_token": (1, 1, dim)}
    found["register_tokens"] = (1, kwargs["num_registers"], dim)
    found |= layer("input_proj.0", dim, kwargs["feat_dim"]) | norm("norm", dim)
    found |= _moozy_blocks(dim, kwargs["dim_feedforward"], count)
    slopes = ["pos_bias.slopes", *(f"blocks.{number}.pos_bias.slopes" for number in range(count))]
    return found | dict.fromkeys(slopes, (kwargs["n_heads"], 1))


def moozy(kwargs: Kwargs) -> Shapes:
    dim, count = kwargs["d_model"], kwargs["num_layers"]
    found: Shapes = {"case_token": (1, 1, dim)} | norm("norm", dim)
    found |= _moozy_blocks(dim, kwargs["dim_feedforward"], count)
    scales = [f"blocks.{number}.{name}.gamma" for number in range(count) for name in ("ls_attn", "ls_mlp")]
    return found | dict.fromkeys(scales, (dim,))


PUBLISHED = {
    "titan": titan,
    "prism": prism,
    "gigapath-slide": gigapath_slide,
    "gigapath-flash-slide": gigapath_slide,
    "feather": feather,
    "feather-uni": feather,
    "feather-uni2": feather,
    "madeleine": madeleine,
    "chief": chief,
    "moozy-slide": moozy_slide,
    "moozy": moozy,
}


def shapes_of(recipe: Recipe) -> Shapes:
    return PUBLISHED[recipe.name](recipe.encoder.kwargs)


def random_state(recipe: Recipe, seed: int = 0) -> dict[str, Tensor]:
    """The published parameters with random values: norms and biases too, so that nothing hides behind
    a one or a zero, and of a size at which attention is neither uniform nor on one tile."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes_of(recipe).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            values *= shape[1] ** -0.5
        elif len(shape) == 1:
            values = values * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        state[name] = values
    for name in state:
        if name.endswith("slopes"):
            state[name] = -torch.tensor(SLOPES_OF_12_HEADS)[:, None]
    return state


#: As published for 12 heads: 2^-1 to 2^-8, then 2^-0.5, 2^-1.5, 2^-2.5 and 2^-3.5.
SLOPES_OF_12_HEADS = [2.0**-power for power in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)]
