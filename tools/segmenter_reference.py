"""What the published implementations of learned segmenters say with weights that anybody can compute: printed
for tests/encoders/test_segmentation.py. And what those say that are published, for who has them.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install segmentation-models-pytorch==0.6.0
    SAM2_BUILD_CUDA=0 /tmp/reference/bin/pip install --no-build-isolation sam2==1.1.0
    /tmp/reference/bin/python tools/segmenter_reference.py --atlaspatch sam2.1_hiera_t.yaml

    python tools/segmenter_reference.py --weights grandqc=Tissue_Detection_MPP10.pth hest=   # slide2vec's own

The second loads each file as a run does, labels a generated thumbnail, and prints digests to be pinned in
engines/segmenters/.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["box", "fill", "pictures", "said"]

#: Side of the pictures: the smallest that every network takes.
SIDE = 256


def fill(module: nn.Module) -> nn.Module:
    """Give every parameter and buffer values that follow from its name and shape, and keep signals alive."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        published = name.replace(".mlp.fc1.", ".mlp.layers.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
        phase = sum(map(ord, published)) % 97
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7310 + phase)
        if name.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif value.ndim > 1:
            wave = wave * (5 / value[0].numel()) ** 0.5
        elif name.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.05 * wave
        value.copy_(wave.reshape(value.shape))
    return module.eval()


def pictures(side: int = SIDE) -> Tensor:
    """Two pictures, (2, 3, side, side) float32, smooth and not symmetric."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side, dtype=torch.float64)] * 2, indexing="ij")
    planes = [torch.sin(a * x * x + b * y + c) for a, b, c in ((9, 4, 0), (3, 14, 1), (21, 8, 2))]
    first = torch.stack(planes)
    return torch.stack([first, first.flip(0) * x]).float()


def box(side: int = SIDE) -> Tensor:
    """The box that SAM is asked about: (2, 4)."""
    return torch.tensor([[0.0, 0.0, side, side], [0.0, 0.0, side, 0.6 * side]])


def said(logits: Tensor) -> list[float]:
    """Logits in a few numbers: mean, deviation, and some of them, in steps through all."""
    flat = logits.detach().double().flatten(1)
    some = flat[:, :: flat.shape[1] // 7 + 1].flatten()
    return [round(float(value), 5) for value in (flat.mean(), flat.std(), *some)]


def published(atlaspatch: Path | None) -> dict[str, list[float]]:
    """Of the published implementations, by `arch`."""
    import segmentation_models_pytorch as smp

    found = {}
    with torch.inference_mode():
        for arch, kind, classes in (("unet", smp.Unet, 8), ("unet++", smp.UnetPlusPlus, 2)):
            network = fill(kind("timm-efficientnet-b0", encoder_weights=None, classes=classes))
            found[arch] = said(network(pictures()))
        if atlaspatch is not None:
            found["sam2"] = said(_sam2(atlaspatch))
    return found


def _sam2(configuration: Path) -> Tensor:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    made: Any = OmegaConf.load(configuration)["model"]
    made.image_size = SIDE
    model: Any = fill(instantiate(made))
    predictor: Any = SAM2ImagePredictor(model, mask_threshold=0.0)
    low = []
    for picture, asked in zip(pictures(), box(), strict=True):
        # what `set_image` does after it has resized and normalised
        _, maps, _, sizes = model._prepare_backbone_features(model.forward_image(picture[None]))
        maps[-1] = maps[-1] + model.no_mem_embed
        *finer, coarse = (
            each.permute(1, 2, 0).view(1, -1, *size) for each, size in zip(maps, sizes, strict=True)
        )
        predictor._features = {"image_embed": coarse, "high_res_feats": finer}
        predictor._orig_hw, predictor._is_image_set = [(SIDE, SIDE)], True
        low.append(predictor._predict(None, None, asked[None], multimask_output=False)[2][0])
    return torch.stack(low)


def check_weights(method: str, weights: str) -> str:
    """Load weights as a run does, and label a generated thumbnail with them."""
    import numpy as np

    from slide2vec.config import SegmentationConfig
    from slide2vec.encoders.weights import find_weights
    from slide2vec.recipes import segmenter_recipe
    from slide2vec.synthetic.thumbnails import THUMBNAIL_SPACING_UM, make_thumbnail
    from slide2vec.tiling.tissue_methods import chosen

    path = find_weights(segmenter_recipe(method), weights or None)
    segmenter: Any = chosen(SegmentationConfig(method=method, weights=weights or None))  # type: ignore[arg-type]
    slide = make_thumbnail("he", seed=1)
    labels = segmenter.segment(slide.pixels, THUMBNAIL_SPACING_UM)
    shares = {name: 0.0 for name in segmenter.names}
    for number, share in enumerate(np.bincount(labels.ravel(), minlength=len(segmenter.names)) / labels.size):
        shares[segmenter.names[number]] += float(share)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    return f'{method}: "{path.name}" = "{digest}", weights {segmenter.checkpoint}; {told}'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atlaspatch", type=Path, help="its sam2.1_hiera_t.yaml")
    parser.add_argument("--weights", nargs="+", metavar="METHOD=FILE", help="METHOD= for those of the hub")
    asked = parser.parse_args()
    if asked.weights:
        for each in asked.weights:
            print(check_weights(*each.split("=", 1)), flush=True)
    else:
        for arch, numbers in published(asked.atlaspatch).items():
            print(arch, numbers)


if __name__ == "__main__":
    main()
