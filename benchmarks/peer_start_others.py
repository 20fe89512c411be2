"""From a process's start to its last tile with LazySlide or TRIDENT: run by the Python that has it.

    python peer_start_others.py lazyslide|trident SLIDE WEIGHTS ARCH KWARGS FOLDER

The steps of their tutorials over one slide, on the CPU in fp32, tissue by what needs no weights (LazySlide's
own, TRIDENT's Otsu), tiles of 224 px at 0.5 µm/px, batches of 32, no previews. The encoder is timm's ARCH
with KWARGS (JSON) and the weights of a file. Prints one JSON object like peer_start.py; nothing of ours is
imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peer_start import FOUND, note

TILE_PX, SPACING_UM, MAGNIFICATION, BATCH = 224, 0.5, 20, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder(arch: str, kwargs: dict[str, Any], weights: str) -> Any:
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(arch, pretrained=False, **kwargs)
    model.load_state_dict(load_file(weights))
    model.register_forward_hook(note)
    return model.eval()


def transform() -> Any:
    from torchvision.transforms import Compose, Normalize, ToTensor

    return Compose([ToTensor(), Normalize(MEAN, STD)])


def lazyslide(slide: str, folder: Path, model: Any) -> int:
    import lazyslide as zs
    from wsidata import open_wsi

    wsi = open_wsi(slide, store=str(folder / "slide.zarr"))
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, TILE_PX, mpp=SPACING_UM, background_filter=False)  # else a third of the tiles
    zs.tl.feature_extraction(
        wsi, model, transform=transform(), model_name="vit", batch_size=BATCH, device="cpu", pbar=False
    )
    wsi.write()
    return len(wsi.shapes["tiles"])


def trident(slide: str, folder: Path, model: Any) -> int:
    import h5py
    import torch
    from trident import load_wsi
    from trident.patch_encoder_models.load import CustomInferenceEncoder
    from trident.segmentation_models import segmentation_model_factory

    with load_wsi(slide_path=slide, lazy_init=False) as wsi:
        segmenter = segmentation_model_factory(model_name="otsu")
        wsi.segment_tissue(
            segmentation_model=segmenter,
            target_mag=segmenter.target_mag,
            job_dir=str(folder),
            device="cpu",
        )
        coords = wsi.extract_tissue_coords(
            target_mag=MAGNIFICATION, patch_size=TILE_PX, save_coords=str(folder)
        )
        features = wsi.extract_patch_features(
            patch_encoder=CustomInferenceEncoder("vit", model, transform(), torch.float32),
            coords_path=coords,
            save_features=str(folder / "features"),
            device="cpu",
            batch_limit=BATCH,
        )
    with h5py.File(features) as file:
        return len(file["features"])


def main() -> None:
    tool, slide, weights, arch, kwargs, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True)
    model = encoder(arch, json.loads(kwargs), weights)
    tiles = {"lazyslide": lazyslide, "trident": trident}[tool](slide, Path(folder), model)
    print(json.dumps({**FOUND, "tiles": tiles, "runs_on": "PyTorch, fp32 on cpu"}))


if __name__ == "__main__":
    main()
