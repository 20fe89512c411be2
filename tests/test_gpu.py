"""The GPU against the CPU: `make gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import load_recipe
from slide2vec.synthetic import write_synthetic_slide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]

#: Smallest cosine to the CPU's fp32 embedding that the project allows per precision.
MIN_COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}
#: A uint8 resize in fixed point (CPU) and in float (GPU) round differently by one grey level.
GREY_LEVEL = 1.01 / 255 / 0.224


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_slide(tmp_path_factory.mktemp("slides") / "slide.svs", size_px=4096, seed=3)


@pytest.mark.parametrize(
    ("preset", "precision"),
    [("scattering", "fp32"), ("prost40m", "fp32"), ("prost40m", "bf16"), ("prost40m", "fp16")],
)
def test_embeddings_equal_the_cpu(slide: Path, preset: str, precision: str) -> None:
    config = PreprocessingConfig(requested_spacing_um=1.0)
    options: dict[str, Any] = {"weights": "random", "allow_non_recommended_settings": True}
    expected = Model.from_preset(preset, device="cpu", **options).embed_slide(slide, config)
    model = Model.from_preset(preset, device="cuda", precision=precision, **options)
    found = model.embed_slide(slide, config, ExecutionOptions(output_dtype="fp32"))
    cosine = torch.nn.functional.cosine_similarity(found.tile_embeddings, expected.tile_embeddings)
    assert found.num_tiles > 0
    assert cosine.min() >= MIN_COSINE[precision]


@pytest.mark.parametrize("side", [224, 256])
def test_preparing_equals_the_cpu(side: int) -> None:
    transform = load_recipe("lunit").transform
    tiles = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8)
    expected = TorchPreparer(transform, torch.device("cpu")).prepare(tiles)
    found = TorchPreparer(transform, torch.device("cuda")).prepare(tiles).cpu()
    assert (found - expected).abs().max() <= 2 * GREY_LEVEL
