"""How close an engine is to its encoder, with an engine of plain values: what spoils one tile is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slide2vec.compile.parity import (
    Parity,
    Reference,
    batch_sizes,
    compare,
    for_layout,
    reference_features,
    verify_engine,
    write_reference,
)
from slide2vec.compile.store import StoredEngine
from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import EngineRecord

CPU = torch.device("cpu")
MEAN_STD = ((0.0, 0.25, 0.5), (1.0, 0.5, 0.25))
TILES = 7
#: (7, 2, 2, 3) uint8: every pixel of a tile is its number.
PIXELS = torch.arange(TILES, dtype=torch.uint8)[:, None, None, None].expand(TILES, 2, 2, 3)
#: (7, 2): a direction per tile.
REFERENCE = torch.stack([torch.arange(TILES).float().cos(), torch.arange(TILES).float().sin()], 1)


class FakeEngine:
    """Gives the reference's features; those of some tiles spoilt.

    Args:
        spoil: tile -> what is made of its features, in batches of `at` tiles only, if given.
    """

    runtime, device, precision, feature_dim, layout = "fake", CPU, "fp32", 2, "uint8_nhwc"

    def __init__(self, spoil: dict[int, Callable[[Tensor], Tensor]] | None = None, at: int = 0) -> None:
        self.spoil, self.at = spoil or {}, at
        self.batches: list[list[int]] = []

    def run(self, pixels: Tensor) -> Tensor:
        tiles = pixels[:, 0, 0, 0].tolist()
        self.batches.append(tiles)
        features = REFERENCE[tiles].clone()
        for row, tile in enumerate(tiles):
            if tile in self.spoil and self.at in (0, len(tiles)):
                features[row] = self.spoil[tile](features[row])
        return features

    def close(self) -> None: ...


def compared(engine: Any, sizes: tuple[int, ...] = (1, 2), least: float = 0.5) -> Parity:
    return compare(engine, MEAN_STD, PIXELS, REFERENCE, sizes, least)


def test_the_encoder_itself() -> None:
    parity = compared(FakeEngine())
    assert parity.min_cosine == pytest.approx(1) and parity.mean_cosine == pytest.approx(1)
    assert (parity.finite, parity.least, parity.tiles, parity.batch_sizes) == (True, 0.5, TILES, (1, 2))
    assert parity.problem() is None


@pytest.mark.parametrize("sizes", [(1, 2), (2,)])
@pytest.mark.parametrize("tile", range(TILES))
def test_one_bad_tile_of_many_is_enough(tile: int, sizes: tuple[int, ...]) -> None:
    """Whichever it is: the mean, or a tile that is left out, would hide it."""
    parity = compared(FakeEngine({tile: lambda features: -features}), sizes)
    assert parity.min_cosine == pytest.approx(-1)
    assert parity.mean_cosine == pytest.approx(1 - 2 / TILES)
    assert parity.problem() == "its least cosine to the encoder in fp32 is -1.000000, below 0.5"


def test_every_size_is_run_and_every_tile() -> None:
    engine = FakeEngine()
    compared(engine, (1, 2))
    assert engine.batches == [[0], [1, 2], [3, 4], [5, 6]]
    engine = FakeEngine()
    compared(engine, (2, 3))
    assert engine.batches == [[0, 1], [2, 3, 4], [5, 6]]
    engine = FakeEngine()
    compared(engine, (2,))
    assert engine.batches == [[0, 1], [2, 3], [4, 5], [6]]
    engine = FakeEngine()
    compared(engine, (1, 4, 9))  # more than there are: from the first on again
    assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 0, 1, 2, 3, 4, 5, 6]]
    engine = FakeEngine()
    compared(engine, (16,))
    assert engine.batches == [[*range(7), *range(7), 0, 1]]


def test_a_size_that_goes_wrong() -> None:
    assert compared(FakeEngine({3: lambda features: -features}, at=4), (1, 2, 4)).min_cosine < 0
    assert compared(FakeEngine({3: lambda features: -features}, at=3), (1, 2, 4)).min_cosine > 0.9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tile", [0, TILES - 1])
def test_a_value_that_is_not_finite(value: float, tile: int) -> None:
    parity = compared(FakeEngine({tile: lambda features: features * 0 + value}), least=-1.0)
    assert not parity.finite and parity.min_cosine == -1
    assert parity.problem() == "some of its features are not finite"


def test_the_threshold_itself_is_close_enough() -> None:
    parity = Parity(0.99, 1.0, True, 0.99, 16, (1,))
    assert parity.problem() is None
    below = replace(parity, min_cosine=0.9899999).problem()
    assert below == "its least cosine to the encoder in fp32 is 0.990000, below 0.99"


def test_layouts() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 4, 5, 3)
    assert for_layout(pixels, MEAN_STD, "uint8_nhwc") is pixels
    normalised = for_layout(pixels, MEAN_STD, "float32_nchw")
    assert normalised.shape == (2, 3, 4, 5) and normalised.dtype == torch.float32
    torch.testing.assert_close(
        normalised[1, :, 3, 4], torch.tensor([0.0, (0.2 - 0.25) / 0.5, (1 - 0.5) / 0.25])
    )


def test_the_reference_is_the_encoder_on_every_tile_in_order() -> None:
    class Encoder(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            sizes.append(len(pixels))
            exact.append(torch.backends.cudnn.allow_tf32)
            return pixels[:, :2, 0, 0]

    sizes: list[int] = []
    exact: list[bool] = []
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 2, 2, 3)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        found = reference_features(Encoder(), MEAN_STD, pixels, CPU, 2)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    value = torch.arange(11) / 255
    assert torch.allclose(found, torch.stack([value, (value - 0.25) / 0.5], 1))
    assert sizes == [8, 3] and exact == [False, False]


def stored(folder: Path, parity: dict[str, Any]) -> StoredEngine:
    """An engine on disk, of which only what is compared with later is there: at least 0.5."""
    write_reference(folder, PIXELS, REFERENCE, 0.5)
    record = EngineRecord(
        **{"key": "k", "preset": "tiny", "variant": "both", "runtime": "fake", "precision": "fp32"},
        **{"asked_precision": "fp32", "layout": "uint8_nhwc", "input_size_px": 2, "feature_dim": 2},
        **{"profile": BatchProfile(1, 2, 2), "file": "a", "opset": None, "licence": "", "versions": {}},
        **{"built_at": "", "build_seconds": 1.0, "identity": {"normalisation": MEAN_STD}},
        **{"parity": parity, "checksums": {}},
    )
    return StoredEngine(folder, record)


@pytest.mark.parametrize(("parity", "least"), [({}, 0.5), ({"least": 0.75}, 0.75)], ids=str)
def test_what_was_kept_is_what_is_compared_with(tmp_path: Path, parity: dict[str, Any], least: float) -> None:
    """The record's threshold counts over the file's: a preset's may have been changed since."""
    kept = Reference.of(stored(tmp_path, parity))
    assert torch.equal(kept.pixels, PIXELS) and torch.equal(kept.features, REFERENCE)
    assert kept.least == least


def test_an_engine_that_is_no_longer_close_enough_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loaded = stored(tmp_path, {}), FakeEngine()
    monkeypatch.setattr("slide2vec.compile.parity.load_engine", lambda directory, device: loaded)
    parity = verify_engine(engine, CPU)
    assert parity.min_cosine == pytest.approx(1)
    assert (parity.least, parity.tiles, parity.batch_sizes) == (0.5, TILES, (1, 2))
    loaded = FakeEngine({3: lambda features: -features})
    with pytest.raises(EngineError, match=r"least cosine .* is -1.000000, below 0.5; build it again"):
        verify_engine(engine, CPU)
    damaged = replace(engine, record=replace(engine.record, checksums={"gone": "x"}))
    with pytest.raises(EngineError, match="gone is missing; build it again"):
        verify_engine(damaged, CPU)


def test_sizes_between_those_of_the_profile() -> None:
    assert batch_sizes(BatchProfile(1, 8, 8)) == (1, 2, 4, 8)
    assert batch_sizes(BatchProfile(2, 3, 20)) == (2, 3, 4, 8, 16, 20)
    assert batch_sizes(BatchProfile(3, 3, 7)) == (3, 4, 7)
    assert batch_sizes(BatchProfile(1, 1, 1)) == (1,)
