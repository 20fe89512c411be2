"""Learned segmenters by name: HEST, GrandQC's two, SAM 2.1 as AtlasPatch and slide2vec 7.1.4 use it.

What each is, where its weights are and what their licence asks, is in `engines/segmenters/`. Weights, engines
and digests are those of encoders. Each does with pixels what its published code does:
TRIDENT's trident/segmentation_models/load.py, cpath-ukk/grandqc, hs2p.segmentation of HS2P 6.1.
"""

from __future__ import annotations

import logging
import threading
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from slide2vec.compile.engine_choice import select_engine
from slide2vec.compile.engine_key import EngineTarget
from slide2vec.compile.parity import for_layout
from slide2vec.encoders import build_encoder
from slide2vec.encoders.weights import weights_digest
from slide2vec.recipes import Recipe, segmenter_recipe
from slide2vec.runtime.base import Engine
from slide2vec.runtime.device import pick_device
from slide2vec.tiling.label_windows import label_map

__all__ = [
    "GRANDQC",
    "GRANDQC_ARTEFACT",
    "GRANDQC_ARTEFACT_1UM",
    "GRANDQC_ARTEFACT_2UM",
    "HEST",
    "SAM2",
    "LearnedSegmenter",
    "SamSegmenter",
]

logger = logging.getLogger(__name__)

Plane = NDArray[np.uint8]

#: GrandQC's tissue model was trained on JPEG of this quality.
JPEG_QUALITY = 80
#: HS2P closes gaps of this size in the masks of SAM, px of 8 µm.
CLOSED_PX = 4
#: Windows at once: on a CPU, where 4 of DeepLab's hold 1 GB, and on a GPU.
BATCH_CPU, BATCH_GPU = 4, 16
_OUTPUT = "default"


class _Method:
    """A `LearnedMethod`.

    Args:
        name: of its recipe.
        jpeg: whether pixels go through JPEG first.
    """

    def __init__(self, name: str, *, jpeg: bool = False) -> None:
        self.name, self.jpeg = name, jpeg

    def loaded(self, weights: str | Path | None, device: str | None) -> LearnedSegmenter | SamSegmenter:
        """With its weights, on its device."""
        return _loaded(self, weights, pick_device(device))


HEST = _Method("hest")
GRANDQC = _Method("grandqc", jpeg=True)
GRANDQC_ARTEFACT = _Method("grandqc-artefact")
GRANDQC_ARTEFACT_1UM = _Method("grandqc-artefact-1um")
GRANDQC_ARTEFACT_2UM = _Method("grandqc-artefact-2um")
SAM2 = _Method("sam2")

_LOADING = threading.Lock()


def _loaded(
    method: _Method, weights: str | Path | None, device: torch.device
) -> LearnedSegmenter | SamSegmenter:
    with _LOADING:  # slides are planned in several threads
        return _built(method, weights, device)


@cache
def _built(
    method: _Method, weights: str | Path | None, device: torch.device
) -> LearnedSegmenter | SamSegmenter:
    recipe = segmenter_recipe(method.name)
    network = build_encoder(recipe, recipe.variants[_OUTPUT], weights)
    if weights == "random":
        logger.warning(
            "segmentation method %s has random weights: the tissue that it finds means nothing", method.name
        )
    else:
        logger.info("segmentation method %s: %s (%s)", method.name, recipe.licence.name, recipe.licence.terms)
    kind = SamSegmenter if recipe.encoder.arch == "sam2" else LearnedSegmenter
    return kind(recipe, network, device, jpeg=method.jpeg)


class _Segmenter:
    """What they have in common.

    Attributes:
        names: of the labels, by their numbers.
        spacing_um: µm/px that it was trained on.
        checkpoint: digest of its weights.
    """

    def __init__(
        self, recipe: Recipe, network: nn.Module, device: torch.device, *, jpeg: bool = False
    ) -> None:
        assert recipe.default_spacing_um is not None
        self.names: tuple[str, ...] = tuple(recipe.encoder.kwargs["classes"])
        self.spacing_um = recipe.default_spacing_um
        self.checkpoint = weights_digest(network)
        self._recipe, self._network, self._device, self._jpeg = recipe, network, device, jpeg
        self._one_at_a_time = threading.Lock()


class LearnedSegmenter(_Segmenter):
    """Labels windows: the class of the largest logit at every pixel. A `WindowSegmenter`, and a `Segmenter`
    of thumbnails.

    Attributes:
        window_px: side of the windows that it was trained on.
        batch_windows: how many at once.
    """

    def __init__(
        self, recipe: Recipe, network: nn.Module, device: torch.device, *, jpeg: bool = False
    ) -> None:
        super().__init__(recipe, network, device, jpeg=jpeg)
        self.window_px = recipe.tile_size_px
        target = EngineTarget(recipe, _OUTPUT, device, lambda: self.checkpoint)
        found = select_engine("auto", network, target, "fp32")
        self._engine: Engine = found.engine
        usual = BATCH_CPU if device.type == "cpu" else BATCH_GPU
        self.batch_windows = found.batch_size or usual

    def label(self, windows: Plane) -> Plane:
        """(B, side, side, 3) uint8 RGB -> (B, side, side) uint8."""
        if self._jpeg:
            windows = np.stack([_through_jpeg(window) for window in windows])
        pixels = torch.from_numpy(windows).to(self._device)
        mean_std = self._recipe.transform.mean, self._recipe.transform.std
        with self._one_at_a_time, torch.inference_mode():
            logits = self._engine.run(for_layout(pixels, mean_std, self._engine.layout))
            labels = logits.view(len(windows), len(self.names), *windows.shape[1:3]).argmax(1)
            return np.asarray(labels.to(torch.uint8).cpu().numpy())

    def segment(self, thumbnail: Plane, spacing_um: float) -> Plane:
        """Labels, (H, W) uint8, of an (H, W, 3) uint8 RGB thumbnail, which is brought to its own spacing."""
        height, width = thumbnail.shape[:2]
        scale = spacing_um / self.spacing_um
        size = max(1, round(width * scale)), max(1, round(height * scale))
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        picture = np.asarray(cv2.resize(thumbnail, size, interpolation=way), np.uint8)
        all_of_it = size[0] * size[1]

        def read(left: int, top: int) -> Plane:
            window = np.full((self.window_px, self.window_px, 3), 255, np.uint8)
            part = picture[top : top + self.window_px, left : left + self.window_px]
            window[: part.shape[0], : part.shape[1]] = part
            return window

        found = label_map(self, size, read, most_px=all_of_it, most_overview_px=all_of_it)
        return np.asarray(
            cv2.resize(found.labels, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8
        )


class SamSegmenter(_Segmenter):
    """Finds what is in a box around all of a thumbnail."""

    def segment(self, thumbnail: Plane, spacing_um: float) -> Plane:
        """Labels, (H, W) uint8, of an (H, W, 3) uint8 RGB thumbnail of `spacing_um` µm/px."""
        height, width = thumbnail.shape[:2]
        longer = max(height, width)
        padded = np.full((longer, longer, 3), 255, np.uint8)
        padded[:height, :width] = thumbnail
        with self._one_at_a_time, torch.inference_mode():
            network = self._network.to(self._device)
            side = self._recipe.transform.crop
            box = torch.tensor([[0.0, 0.0, width, height]], device=self._device) * (side / longer)
            logits = network(self._pixels(padded, side), box)
            low = logits.view(1, 1, side // 4, side // 4)
            inside = F.interpolate(low, (longer, longer), mode="bilinear", align_corners=False)[0, 0] > 0
            mask = inside[:height, :width].to(torch.uint8).cpu().numpy()
        kernel = np.ones((CLOSED_PX, CLOSED_PX), np.uint8)
        return np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel), np.uint8)

    def _pixels(self, picture: Plane, side: int) -> Tensor:
        """(S, S, 3) uint8 -> (1, 3, side, side) float32, normalised, resized as by torchvision."""
        pixels = torch.from_numpy(picture).to(self._device).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (
            torch.tensor(each, device=self._device)[:, None, None]
            for each in (self._recipe.transform.mean, self._recipe.transform.std)
        )
        return (small - mean) / std


def _through_jpeg(window: Plane) -> Plane:
    """As GrandQC has it: OpenCV takes red for blue, when it encodes and when it decodes."""
    done, data = cv2.imencode(".jpg", window, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
