"""iSight against transformers' CLIPModel with the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slide2vec.encoders import build_encoder
from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, load_recipe

DEPTH = 2
#: fp32, other order of the same sums.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def clip() -> Any:
    """The published architecture at full width with two blocks; every vision parameter random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": DEPTH,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99},
    )
    assert config.vision_config.hidden_act == "quick_gelu"
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.vision_model.named_parameters():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + one)
    return model


@pytest.fixture(scope="module")
def checkpoint(clip: Any) -> dict[str, Tensor]:
    """In the keys of the training checkpoint, with the parts that are not used."""
    torch.manual_seed(1)
    state = {f"patch_encoder.{key}": value for key, value in clip.state_dict().items()}
    # transformers 5 keeps the vision model's keys in memory as on disk; position_ids is of older ones.
    state["patch_encoder.vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    projection = torch.nn.Linear(1024, 1024)
    state["visual_token_projection.weight"] = projection.weight.detach()
    state["visual_token_projection.bias"] = projection.bias.detach()
    for unused in ("attention_net.attention_c.bias", "classifiers.0.weight", "cell_type_projection.bias"):
        state[unused] = torch.ones(4)
    state["text_projection_to_visual_dim.bias"] = torch.ones(4)
    return state


def shallow() -> Recipe:
    recipe = load_recipe("isight")
    kwargs = {**recipe.encoder.kwargs, "depth": DEPTH}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})


@pytest.mark.parametrize("variant", ["token_mean", "cls"])
def test_equals_transformers(variant: str, clip: Any, checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": checkpoint}, tmp_path / "w.pth")
    recipe = shallow()
    ours = build_encoder(recipe, recipe.variants[variant], tmp_path / "w.pth")
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        output = clip.vision_model(pixels, output_hidden_states=True)
        tokens = torch.nn.functional.linear(
            output.hidden_states[-1],
            checkpoint["visual_token_projection.weight"],
            checkpoint["visual_token_projection.bias"],
        )
        expected = tokens.mean(dim=1) if variant == "token_mean" else tokens[:, 0]
        torch.testing.assert_close(ours(pixels), expected, atol=TOLERANCE, rtol=0)
        normed = clip.vision_model.post_layernorm(output.hidden_states[-1][:, 0])
    assert tokens.shape == (2, 577, 1024)
    # The last hidden state is the one before the closing norm, whose result would be another.
    torch.testing.assert_close(normed, output.pooler_output, atol=TOLERANCE, rtol=0)
    assert (normed - output.hidden_states[-1][:, 0]).abs().max() > 0.1


def test_missing_projection_is_named(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    lacking = {key: value for key, value in checkpoint.items() if "visual_token_projection" not in key}
    torch.save(lacking, tmp_path / "w.pth")
    recipe = shallow()
    with pytest.raises(WeightsError, match=r"missing: projection\.bias, projection\.weight"):
        build_encoder(recipe, recipe.variant(None)[1], tmp_path / "w.pth")


def test_published_parameter_count() -> None:
    """The vision tower's, less the closing norm, plus the projection."""
    recipe = load_recipe("isight")
    with torch.device("meta"):
        encoder = build_encoder(recipe, recipe.variant(None)[1], "random")
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == 303_507_456 - 2 * 1024 + 1024 * 1025
