"""Learned segmenters: what they do with pixels, and how runs know them by their weights."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torchvision.transforms.functional import normalize, to_tensor
from typer.testing import CliRunner

from slide2vec.choices import learned_methods
from slide2vec.cli import app
from slide2vec.config import PreprocessingConfig, QualityConfig, SegmentationConfig
from slide2vec.encoders.segmentation.unet import Unet, UnetPlusPlus
from slide2vec.errors import ConfigError
from slide2vec.readers import open_slide
from slide2vec.recipes import Recipe, segmenter_recipe
from slide2vec.segmenters import learned
from slide2vec.slides import as_slide
from slide2vec.tiling import tile_slide
from slide2vec.tiling.previous_files import recorded_qc
from slide2vec.tiling.tissue_methods import checkpoint_of, chosen

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.segmenter_reference import fill

#: ImageNet's, as every published implementation here has them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WINDOW_PX = 64
#: Of a tile's side.
PIXEL = 1 / 64


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Windows of 64 px (SAM's of 128): the networks take any."""

    def recipe(name: str) -> Recipe:
        side = 128 if name == "sam2" else WINDOW_PX
        made = segmenter_recipe(name)
        return made.model_copy(
            update={
                "tile_size_px": side,
                "transform": made.transform.model_copy(update={"resize": side, "crop": side}),
            }
        )

    monkeypatch.setattr(learned, "segmenter_recipe", recipe)
    learned._built.cache_clear()
    yield
    learned._built.cache_clear()


def segmenter(method: str, weights: str | Path = "random") -> Any:
    return chosen(SegmentationConfig(method=method, weights=weights, device="cpu"))  # type: ignore[arg-type]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(1).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def logits_of(network: torch.nn.Module, picture: NDArray[np.uint8]) -> torch.Tensor:
    """By torchvision's transforms, as the published code has them."""
    pixels = normalize(to_tensor(np.ascontiguousarray(picture)), MEAN, STD)[None]
    with torch.inference_mode():
        return network(pixels)


@pytest.mark.parametrize("method", ["grandqc", "grandqc-artefact"])
def test_labels_are_the_classes_of_the_largest_logits(method: str) -> None:
    made, windows = segmenter(method), np.stack([noise(64, 64), noise(64, 64)[::-1]])
    usual = logits_of(made._network, windows[0]).view(len(made.names), -1).mean(1)
    made._network.segmentation_head[0].bias -= usual  # or one class has all of the pixels
    for window, found in zip(windows, made.label(windows), strict=True):
        if method == "grandqc":  # cv2 takes RGB for BGR, and back
            data = cv2.imencode(".jpg", np.ascontiguousarray(window), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
            window = np.asarray(cv2.imdecode(data, 1), np.uint8)
        expected = logits_of(made._network, window).view(len(made.names), 64, 64).argmax(0)
        assert (found == expected.numpy()).mean() > 0.999 and len(np.unique(found)) > 1


def test_names_are_those_of_grandqc() -> None:
    assert segmenter("grandqc").names == ("tissue", "background")
    assert segmenter_recipe("grandqc-artefact").encoder.kwargs["classes"] == [
        *("background", "tissue", "fold", "spot", "pen", "bubble", "blur", "background")
    ]
    spacings = {name: segmenter_recipe(name).default_spacing_um for name in learned_methods()}
    assert spacings == {
        "hest": 1.0,
        "grandqc": 10.0,
        "grandqc-artefact": 1.5,
        "grandqc-artefact-1um": 1.0,
        "grandqc-artefact-2um": 2.0,
        "sam2": 8.0,
    }


def test_sam_is_asked_what_is_in_the_box_of_the_slide() -> None:
    made, picture = segmenter("sam2"), noise(96, 160)
    fill(made._network)  # or all is inside
    padded = np.full((160, 160, 3), 255, np.uint8)
    padded[:96] = picture
    pixels = F.interpolate(to_tensor(padded)[None], (128, 128), mode="bilinear", antialias=True)
    box = torch.tensor([[0.0, 0.0, 128.0, 96 * 128 / 160]])
    with torch.inference_mode():
        low = made._network(normalize(pixels, MEAN, STD), box).view(1, 1, 32, 32)
    mask = (F.interpolate(low, (160, 160), mode="bilinear")[0, 0, :96] > 0).numpy().astype(np.uint8)
    expected = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8))
    found = made.segment(picture, 8.0)
    assert (found == expected).mean() > 0.999 and 0.01 < found.mean() < 0.99


def test_random_weights_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        segmenter("grandqc-artefact")
    assert "grandqc-artefact has random weights: the tissue that it finds means nothing" in caplog.text


def test_weights_are_for_networks() -> None:
    with pytest.raises(ConfigError, match="weights=random is for methods that are networks, hest, grandqc"):
        SegmentationConfig(weights="random")
    with pytest.raises(ConfigError, match=r"sthresh=20 is for another method than hest"):
        SegmentationConfig(method="hest", sthresh=20)
    with pytest.raises(ConfigError, match=r"max_spot=0\.1 is for a network"):
        QualityConfig(max_spot=0.1)


def test_where_weights_are_does_not_count_but_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first = tmp_path / "a.pth"
    torch.save(Unet("abcdefgh").state_dict(), first)
    first.with_name("b.pth").write_bytes(first.read_bytes())
    found = [
        SegmentationConfig(method="grandqc-artefact", weights=tmp_path / name, device="cpu")
        for name in ("a.pth", "b.pth")
    ]
    assert found[0].model_dump() == found[1].model_dump() and "weights" not in found[0].model_dump()
    assert checkpoint_of(found[0]) == checkpoint_of(found[1]) != segmenter("grandqc-artefact").checkpoint
    assert checkpoint_of(SegmentationConfig()) is None
    # what was recorded before there were networks stays as it was
    assert set(recorded_qc(QualityConfig(measure=True)) or ()) == {
        *("measure", "max_background", "max_blur", "max_bubble", "max_fold", "max_pen")
    }
    network = QualityConfig(method="grandqc-artefact", weights=first, device="cpu")
    assert (recorded_qc(network) or {})["checkpoint"] == checkpoint_of(found[0])


def test_tiles_are_found_anew_with_other_weights(tmp_path: Path, reference_slide: Path) -> None:
    weights = tmp_path / "other.pth"
    torch.save(fill(UnetPlusPlus("ab")).state_dict(), weights)
    record = tmp_path / "out/tiles/CMU-1-Small-Region.source.json"

    def run(weights: str) -> dict[str, Any]:
        options = ("--spacing", "8", "--tile-size", "32", "--segmentation-method", "grandqc")
        asked = ["tile", str(reference_slide), "-o", str(tmp_path / "out"), "--resume", *options]
        result = CliRunner().invoke(app, [*asked, "--segmentation-weights", weights])
        assert result.exit_code == 0, result.output
        return dict(json.loads(record.read_text()), at=record.stat().st_mtime_ns)

    first, again, other = run("random"), run("random"), run(str(weights))
    assert first == again
    assert len(first["segmenter"]) == 32 and other["segmenter"] != first["segmenter"]
    meta = json.loads(record.with_name("CMU-1-Small-Region.coordinates.meta.json").read_text())
    assert meta["segmentation"]["tissue_method"] == "grandqc"


def test_artefacts_of_tiles_are_the_networks_labels(
    reference_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Bands:
        """From left to right: tissue, blur, background, spots; each 128 px of 4 µm wide."""

        names = ("background", "tissue", "blur", "spot")
        spacing_um, window_px, batch_windows = 4.0, 512, 2

        def label(self, windows: Any) -> Any:
            seen.append(windows.shape)
            labels = np.zeros(windows.shape[:3], np.uint8)
            labels[..., :64], labels[..., 64:128], labels[..., 192:256] = 1, 2, 3
            return labels

    monkeypatch.setattr("slide2vec.tiling.tile_quality.chosen", lambda config: Bands())
    config = PreprocessingConfig(
        qc={"method": "grandqc-artefact", "max_spot": 0.5},  # type: ignore[arg-type]
        segmentation={"method": "otsu"},  # type: ignore[arg-type]
    )
    slide = as_slide(reference_slide)
    with open_slide(slide) as reader:
        tiling = tile_slide(reader, slide, 0.5, config.resolved(4.0, 64))[0]
    left = tiling.x / 8

    def of_band(number: int) -> Any:
        """How much of every tile lies in a band, 0 to 1."""
        return np.clip(np.minimum(left + 64, 64 * number + 64) - np.maximum(left, 64 * number), 0, 64) / 64

    assert seen and (of_band(2) > 0.3).any() and (of_band(3) <= 0.5 + PIXEL).all()
    shares = tiling.artefacts
    assert shares["background"] == pytest.approx(of_band(2), abs=PIXEL)
    assert shares["blur"] * (1 - shares["background"]) == pytest.approx(of_band(1), abs=PIXEL)
    assert shares["spot"] == pytest.approx(of_band(3), abs=PIXEL)
    assert not shares["pen"].any() and not shares["fold"].any()
