"""Networks that label pixels, against the published implementations with the same weights."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from slide2vec.encoders import build_encoder
from slide2vec.encoders.checkpoints import convert
from slide2vec.encoders.pickled_modules import state_of_pickled_module
from slide2vec.encoders.segmentation.sam import TissueSam
from slide2vec.encoders.segmentation.unet import Unet, UnetPlusPlus
from slide2vec.errors import WeightsError
from slide2vec.recipes import segmenter_recipe

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.segmenter_reference import box, fill, pictures, said

#: What `tools/segmenter_reference.py` printed of segmentation-models-pytorch 0.6.0 and sam2 1.1.0.
PUBLISHED = {
    Unet: (
        *(0.00372, 0.04078, -0.01037, -0.00644, 0.0258, 0.04786, 0.04655, 0.01765, -0.02206),
        *(-0.03592, -0.00602, 0.0258, 0.04786, 0.04672, 0.01765, -0.02206),
    ),
    UnetPlusPlus: (
        *(-0.01927, 0.02058, -0.04481, -0.03386, -0.03473, -0.03612, -0.00382, 0.00208, -0.00497),
        *(-0.0226, -0.0337, -0.03472, -0.03619, -0.00334, 0.00206, -0.00496),
    ),
    TissueSam: (
        *(0.9801, 1.10604, 3.16277, 2.12302, 1.52866, 1.97902, -1.38385, 0.88326, -1.53987),
        *(0.77669, 0.6099, 0.26881, 1.51263, 1.76556, 1.21863, 3.44778),
    ),
}
#: Of the fifth decimal, by another order of sums.
ROUNDING = 3e-5
CLASSES = {Unet: "abcdefgh", UnetPlusPlus: "ab", TissueSam: "ab"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_logits_are_those_of_the_published_implementation(kind: type[nn.Module]) -> None:
    network = fill(kind(CLASSES[kind]))
    with torch.inference_mode():
        logits = network(pictures(), box()) if kind is TissueSam else network(pictures())
    assert said(logits) == pytest.approx(PUBLISHED[kind], abs=ROUNDING)


def state(arch: type[nn.Module], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**fill(arch(CLASSES[arch])).state_dict(), **changes}


def built(name: str, path: Path) -> nn.Module:
    recipe = segmenter_recipe(name)
    return build_encoder(recipe, recipe.variants["default"], path)


def test_files_are_loaded_strictly(tmp_path: Path) -> None:
    path = tmp_path / "artefact.pth"
    torch.save(state(Unet), path)
    loaded = built("grandqc-artefact", path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state(Unet).items())
    torch.save(state(Unet, another=torch.zeros(1)), path)
    with pytest.raises(WeightsError, match=r"not for preset grandqc-artefact; unexpected: another"):
        built("grandqc-artefact", path)
    torch.save(state(UnetPlusPlus), path)
    with pytest.raises(WeightsError, match=r"missing: decoder\.blocks\.0\.conv1"):
        built("grandqc-artefact", path)


def test_files_of_whole_modules_are_read_without_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = tmp_path / "GrandQC_MPP15.pth", fill(Unet(CLASSES[Unet]))
    monkeypatch.setattr(Unet, "__module__", "code_of_others")
    monkeypatch.setitem(sys.modules, "code_of_others", sys.modules["slide2vec.encoders.segmentation.unet"])
    torch.save(network, path)
    monkeypatch.undo()
    loaded = built("grandqc-artefact", path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())
    assert "code_of_others" not in sys.modules
    torch.save({"weights": network}, path)  # beside something else: not what it is for
    assert state_of_pickled_module(path) is None


def test_sam_is_loaded_from_what_the_whole_model_was_saved_as(tmp_path: Path) -> None:
    recipe = segmenter_recipe("sam2")
    own = state(TissueSam)
    saved = {
        name.replace(".mlp.fc1.", ".mlp.layers.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
        if name.startswith("image_encoder")
        else name: value
        for name, value in own.items()
    }
    assert saved.keys() != own.keys() and convert("sam2", dict(saved), recipe.encoder).keys() == own.keys()
    rest = ("memory_attention.norm.bias", "maskmem_tpos_enc", "sam_prompt_encoder.point_embeddings.0.weight")
    path = tmp_path / "model.pth"
    torch.save({"model": saved | {name: torch.zeros(1) for name in rest}}, path)
    assert torch.equal(built("sam2", path).state_dict()["no_mem_embed"], own["no_mem_embed"])
    torch.save({"model": saved | {"sam_prompt_encoder.another": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match=r"unexpected: sam_prompt_encoder\.another"):
        built("sam2", path)


@pytest.mark.slow
def test_hest_is_torchvisions_network_from_a_checkpoint_of_lightning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torchvision.models.segmentation import deeplabv3_resnet50

    published = fill(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2, aux_loss=True))
    path = tmp_path / "deeplabv3_seg_v4.ckpt"
    saved = {f"model.{name}": value for name, value in published.state_dict().items()}
    torch.save({"state_dict": saved, "epoch": 3}, path)
    with caplog.at_level(logging.INFO):
        network = built("hest", path)
    assert "the prefix model. is taken off" in caplog.text
    with torch.inference_mode():
        logits = network(pictures(64)).view(2, 2, 64, 64)
        assert torch.equal(logits, published(pictures(64))["out"])
        # TRIDENT's condition is the larger logit
        assert torch.equal(logits.argmax(1) == 1, logits.softmax(1)[:, 1] > 0.5)
