"""Encoders with a head on their class token, against published code or a dense reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import of_depth
from slide2vec.encoders import build_encoder
from slide2vec.encoders.timm import _resolve
from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, load_recipe

DEPTH = 2
#: Of the transformers here, which are narrow; those of the presets are counted in test_catalogue.py.
WIDTH, NARROW = 96, {"embed_dim": 96, "num_heads": 3}
#: fp32, other order of the same sums.
TOLERANCE = 1e-5
PIXELS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
State = dict[str, Tensor]


def randomised(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, norms and layer scales too: nothing may hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + one)
    return module.eval()


def narrow(name: str) -> Recipe:
    recipe = of_depth(load_recipe(name), DEPTH)
    head_dim = WIDTH if name == "mettle" else recipe.encoder.kwargs["head_dim"]
    kwargs = {**recipe.encoder.kwargs, **NARROW, "head_dim": head_dim}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


def trunk(name: str) -> nn.Module:
    """The transformer of a preset as timm makes it, without a head."""
    kwargs = narrow(name).encoder.kwargs
    own = {key: value for key, value in kwargs.items() if key not in ("head", "head_dim")}
    return randomised(timm.create_model(load_recipe(name).encoder.arch, **_resolve(own)))


def random_state(module: nn.Module, seed: int = 3) -> State:
    return {name: value.detach() for name, value in randomised(module, seed).state_dict().items()}


def features(name: str, state: State, folder: Path, variant: str | None = None) -> Tensor:
    """Of the preset, from a file in the published keys."""
    torch.save(state, folder / "w.bin")
    recipe = narrow(name)
    with torch.inference_mode():
        return build_encoder(recipe, recipe.variant(variant)[1], folder / "w.bin")(PIXELS)  # type: ignore[no-any-return]


def test_mettle(tmp_path: Path) -> None:
    """The head atom by atom, rank by rank, each variant."""
    body = trunk("mettle")
    sizes = (("mix", 16), ("shift", WIDTH))
    layers = {name: (nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, out)) for name, out in sizes}
    head = nn.ModuleDict({name: nn.Sequential(*each) for name, each in layers.items()})
    state = random_state(head)
    draw = torch.Generator().manual_seed(4)
    state |= {name: torch.randn(16, WIDTH, 8, generator=draw) * 0.05 for name in "PQ"}
    with torch.inference_mode():
        tokens: Tensor = body.forward_features(PIXELS)  # type: ignore[operator]
        token = tokens[:, 0]
        expected, mixture = token + head["shift"](token), head["mix"](token)
        for atom, rank in itertools.product(range(16), range(8)):
            along = (token @ state["P"][atom, :, rank])[:, None] * state["Q"][atom, :, rank]
            expected = expected + mixture[:, atom, None] * along
    assert (expected - token).abs().max() > 0.1  # the head matters
    published = {f"backbone.{key}": value for key, value in body.state_dict().items()}
    published |= {f"head.{key}": value for key, value in state.items()}
    torch.save(published, tmp_path / "w.bin")
    recipe = narrow("mettle")
    encoder = build_encoder(recipe, recipe.variants["cls"], tmp_path / "w.bin")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(PIXELS), expected, atol=TOLERANCE, rtol=0)
        encoder.pool = recipe.variants["cls_patch_mean"].pool  # type: ignore[assignment]
        both = torch.cat([expected, tokens[:, 5:].mean(1)], dim=1)
        torch.testing.assert_close(encoder(PIXELS), both, atol=TOLERANCE, rtol=0)


def test_keep(tmp_path: Path) -> None:
    """Its layer scales are called weights; the text tower beside it may be there."""
    body = trunk("keep")
    head = random_state(nn.Sequential(nn.Linear(WIDTH, 768), nn.GELU(), nn.Linear(768, 768)))
    with torch.inference_mode():
        token = body.forward_features(PIXELS)[:, 0]  # type: ignore[operator]
        hidden = F.gelu(token @ head["0.weight"].T + head["0.bias"])
        expected = hidden @ head["2.weight"].T + head["2.bias"]
    renamed = {key.replace(".gamma", ".weight"): value for key, value in body.state_dict().items()}
    state = {f"visual.{key}": value for key, value in renamed.items()}
    state |= {f"visual_head.{key}": value for key, value in head.items()}
    state |= {"text.embeddings.word_embeddings.weight": torch.zeros(3, 4), "logit_scale": torch.ones(())}
    found = features("keep", state, tmp_path)
    torch.testing.assert_close(found, expected / expected.norm(dim=1)[:, None], atol=TOLERANCE, rtol=0)


def clip(patch: int, act: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        vision_config={
            "patch_size": patch,
            "hidden_act": act,
            "num_hidden_layers": DEPTH,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_attention_heads": 3,
        },
        text_config={**sizes, "vocab_size": 99},
        projection_dim=512,
    )
    return randomised(transformers.CLIPModel(config))


def projected(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.visual_projection(model.vision_model(PIXELS).pooler_output)  # type: ignore[no-any-return]


def test_plip(tmp_path: Path) -> None:
    model = clip(32, "quick_gelu")
    state = dict(model.state_dict())
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]  # of older transformers
    torch.testing.assert_close(features("plip", state, tmp_path), projected(model), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "patch"), [("quiltnet-b32", 32), ("quiltnet-b16", 16)])
def test_quiltnet(name: str, patch: int, tmp_path: Path) -> None:
    model = clip(patch, "gelu")
    found = features(name, as_open_clip(model.state_dict()), tmp_path)
    torch.testing.assert_close(found, projected(model), atol=TOLERANCE, rtol=0)


def as_open_clip(state: State) -> State:
    """A CLIPModel of transformers in the keys of open_clip, as its authors' scripts convert them."""
    names = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.positional_embedding": "embeddings.position_embedding.weight",
        "visual.conv1.weight": "embeddings.patch_embedding.weight",
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        names |= {f"visual.{theirs}.{leaf}": f"{ours}.{leaf}" for leaf in ("weight", "bias")}
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    layers |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    made: State = {}
    for number in range(DEPTH):
        theirs, ours = f"visual.transformer.resblocks.{number}", f"encoder.layers.{number}"
        for leaf in ("weight", "bias"):
            names |= {f"{theirs}.{a}.{leaf}": f"{ours}.{b}.{leaf}" for a, b in layers.items()}
            parts = [state[f"vision_model.{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            made[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(parts)
    made |= {theirs: state[f"vision_model.{ours}"] for theirs, ours in names.items()}
    made["visual.proj"] = state["visual_projection.weight"].T
    text = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight")
    made |= dict.fromkeys((*text, "ln_final.bias", "text_projection", "attn_mask"), torch.zeros(2))
    return made | {"logit_scale": torch.ones(())}


@pytest.mark.parametrize("name", ["biomedclip", "quiltnet-b16-pmb"])
def test_open_clip_around_timm(name: str, tmp_path: Path) -> None:
    body = trunk(name)
    projection = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.05
    state = {f"visual.trunk.{key}": value for key, value in body.state_dict().items()}
    state |= {"visual.head.proj.weight": projection, "text.proj.0.weight": torch.zeros(2)}
    with torch.inference_mode():
        expected = body.forward_features(PIXELS)[:, 0] @ projection.T  # type: ignore[operator]
    found = features(name, state, tmp_path)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_lacking_head_is_named(tmp_path: Path) -> None:
    state = as_open_clip(clip(32, "gelu").state_dict())
    del state["visual.proj"]
    with pytest.raises(WeightsError, match=r"quiltnet-b32; missing: head\.weight"):
        features("quiltnet-b32", state, tmp_path)
