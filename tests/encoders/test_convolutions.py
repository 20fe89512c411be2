"""CTransPath and Lunit's ResNets against torchvision's networks, with the same random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common import of_depth
from slide2vec.encoders import build_encoder
from slide2vec.recipes import load_recipe

#: fp32, other order of the same sums.
TOLERANCE = 1e-5
#: Of Swin's first stage.
WIDTH = 24
PIXELS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def randomised(module: nn.Module) -> nn.Module:
    """Parameters and the statistics of batches, none at its initial value."""
    generator = torch.Generator().manual_seed(1)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            noise *= value[0].numel() ** -0.5
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            noise = 1 + noise.abs() * 0.2
        else:
            noise *= 0.1
        value.data.copy_(noise)
    return module.eval()


def features(name: str, depth: int, state: Any, folder: Path, **kwargs: Any) -> Tensor:
    torch.save(state, folder / "w.pth")
    recipe = of_depth(load_recipe(name), depth)
    spec = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, **kwargs}})
    recipe = recipe.model_copy(update={"encoder": spec})
    with torch.inference_mode():
        return build_encoder(recipe, recipe.variant(None)[1], folder / "w.pth")(PIXELS)  # type: ignore[no-any-return]


def swin() -> nn.Module:
    """torchvision's Swin-T of two blocks a stage and a quarter of the width, with the stem of CTransPath's
    authors."""
    model = torchvision.models.swin_transformer.SwinTransformer(
        patch_size=[4, 4], embed_dim=WIDTH, depths=[2] * 4, num_heads=[3, 6, 12, 24], window_size=[7, 7]
    )
    stem: list[nn.Module] = []
    for into, out in ((3, WIDTH // 8), (WIDTH // 8, WIDTH // 4)):
        stem += [nn.Conv2d(into, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    model.features[0][0] = nn.Sequential(*stem, nn.Conv2d(WIDTH // 4, WIDTH, 1))
    model.head = nn.Identity()
    return randomised(model)


#: torchvision's names and those of timm before 0.9, in which the authors published.
NAMES = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.(\d+)\.", lambda at: f"layers.{int(at[1]) // 2}.blocks.{at[2]}."),
    (r"^features\.(\d+)\.", lambda at: f"layers.{int(at[1]) // 2 - 1}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, new in NAMES:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    return renamed | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


@pytest.mark.parametrize("old", [True, False])
def test_ctranspath(old: bool, tmp_path: Path) -> None:
    """In the names of old timm, wrapped as the authors' file, and in those of new timm."""
    model = swin()
    state = as_published(model.state_dict())
    assert "layers.0.downsample.reduction.weight" in state
    wrapped: dict[str, Any] = {"model": state}
    if not old:
        up = {f"layers.{n}.downsample": f"layers.{n + 1}.downsample" for n in range(3)}
        stage = re.compile(r"^layers\.\d\.downsample")
        wrapped = {stage.sub(lambda at: up[at[0]], key): value for key, value in state.items()}
    name = "ctranspath" if old else "chief-ctranspath"
    found = features(name, 2, wrapped, tmp_path, embed_dim=WIDTH)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(PIXELS), atol=TOLERANCE, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_lunit_resnets(tmp_path: Path) -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1] * 4)
    model.fc = nn.Identity()
    randomised(model)
    classifier = {"fc.weight": torch.zeros(5, 2048)}
    found = features("lunit-bt", 1, model.state_dict() | classifier, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(PIXELS), atol=TOLERANCE, rtol=0)
