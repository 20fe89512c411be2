"""MOOZY against the published package, with the same random weights (`pip install moozy==0.1.1`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import random_state
from slide_helpers import built, embed, moozy_payload
from torch import Tensor, nn

from slide2vec.encoders.slide import TileBag
from slide2vec.recipes import load_recipe

pytest.importorskip("moozy", reason="pip install --no-deps moozy==0.1.1 compares MOOZY with its original")

#: fp32, the same sums in another order, through six layers; the largest difference seen is 2e-6.
SAME = 2e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    slide, case = (load_recipe(name) for name in ("moozy-slide", "moozy"))
    payload = moozy_payload(slide, random_state(slide))
    payload["case_transformer"] = random_state(case)
    payload["slide_encoder_config"] |= slide.encoder.kwargs
    payload["case_transformer_config"] |= case.encoder.kwargs
    path = tmp_path_factory.mktemp("moozy") / "moozy.pt"
    torch.save(payload, path)
    return path


def original(checkpoint: Path, part: str) -> nn.Module:
    """Their module, built by their code from the configuration in the checkpoint."""
    from moozy.models.case_transformer import CaseAggregator  # type: ignore[import-not-found]
    from moozy.models.serialization import (  # type: ignore[import-not-found]
        build_slide_encoder_from_payload,
        load_checkpoint_payload,
    )

    payload = load_checkpoint_payload(str(checkpoint))
    if part == "slide":
        made = build_slide_encoder_from_payload(
            payload["teacher_slide_encoder"], payload["slide_encoder_config"]
        )
    else:
        made = CaseAggregator(**payload["case_transformer_config"])
        made.load_state_dict(payload["case_transformer"], strict=True)
    module: nn.Module = made.eval()
    return module


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (40, 50)])
def test_slide_encoder(checkpoint: Path, height: int, width: int) -> None:
    """A grid with background, as their loader makes it."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(height, width, 384, generator=generator)
    if height > 1:
        grid[torch.rand(height, width, generator=generator) < 0.3] = 0
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns * 448 + 1077, rows * 448 + 20_003], dim=-1)
    theirs = original(checkpoint, "slide")
    with torch.inference_mode():
        expected = theirs(
            grid[None],
            invalid_mask=(grid == 0).all(-1)[None],
            coords_xy=places[None].float(),
            patch_sizes=torch.tensor([448.0]),
        )[0][0]
    ours = embed(
        built(load_recipe("moozy-slide"), checkpoint), TileBag(grid.flatten(0, 1), places.flatten(0, 1), 448)
    )
    torch.testing.assert_close(ours.embedding, expected, atol=SAME, rtol=0)


def test_the_loader_of_the_package_makes_the_same_grid(checkpoint: Path) -> None:
    """From tiles in any order, off the grid by less than a quarter: theirs are moved onto it first."""
    from moozy.data.features.grid import build_grid_from_coords  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(1)
    cells = torch.randperm(48, generator=generator)[:30]
    coords = torch.stack([cells % 8, cells // 8], dim=1) * 224 + 4000
    features = torch.randn(30, 384, generator=generator)
    grid, xs, ys = build_grid_from_coords(features.numpy(), coords.numpy(), 224)
    columns, rows = torch.meshgrid(torch.from_numpy(xs), torch.from_numpy(ys), indexing="xy")
    values: Tensor = torch.from_numpy(grid)
    with torch.inference_mode():
        expected = original(checkpoint, "slide")(
            values[None],
            invalid_mask=(values == 0).all(-1)[None],
            coords_xy=torch.stack([columns, rows], dim=-1)[None].float(),
            patch_sizes=torch.tensor([224.0]),
        )[0][0]
    ours = embed(built(load_recipe("moozy-slide"), checkpoint), TileBag(features, coords, 224)).embedding
    torch.testing.assert_close(ours, expected, atol=SAME, rtol=0)


@pytest.mark.parametrize("slides", [1, 2, 7])
def test_case_transformer(checkpoint: Path, slides: int) -> None:
    values = torch.randn(slides, 768, generator=torch.Generator().manual_seed(slides))
    with torch.inference_mode():
        expected = original(checkpoint, "case")(values)
        found = built(load_recipe("moozy"), checkpoint)(values)
    torch.testing.assert_close(found, expected, atol=SAME, rtol=0)
