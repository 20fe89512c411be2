"""Statistics of tiles, with plain values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slide2vec.aggregate.pooling import Aggregator, aggregate, top_tissue
from slide2vec.errors import ArtifactError, ConfigError


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ([0.2, 1.0, 0.5, 1.0, 0.5, 0.5, 0.1, 0.0], [1, 3]),
        ([0.2, 1.0, 0.5, 0.5], [1]),
        ([0.2, 0.5, 0.5, 0.5], [1, 2, 3]),  # equal ones are all in
        # The number is rounded up: 2 of 5, 2 of 7, 3 of 9, 1 of 3.
        ([0.1, 0.9, 0.3, 0.8, 0.5], [1, 3]),
        ([0.7, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 6]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [6, 7, 8]),
        ([0.1, 0.3, 0.2], [1]),
        ([0.1], [0]),
    ],
)
def test_the_quarter_with_the_most_tissue(fractions: list[float], expected: list[int]) -> None:
    assert top_tissue(np.array(fractions, np.float32)).tolist() == expected


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [("mean", [2.0, -1.0]), ("max", [4.0, 2.0]), ("top_tissue", [3.0, -3.0])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooled(aggregator: Aggregator, expected: list[float], dtype: torch.dtype) -> None:
    tiles = torch.tensor([[1.0, 2.0], [2.0, -7.0], [4.0, 1.0], [1.0, 0.0]], dtype=dtype)
    fractions = np.array([0.1, 0.9, 0.9, 0.2], np.float32)
    pooled = aggregate(tiles, aggregator, fractions)
    assert pooled.tolist() == expected and pooled.dtype == dtype


def test_sums_are_of_single_precision() -> None:
    tiles = torch.full((4096, 1), 60000.0, dtype=torch.float16)
    assert aggregate(tiles, "mean").item() == 60000


def test_refused() -> None:
    tiles = torch.ones(2, 2)
    with pytest.raises(ConfigError, match=r'aggregator=\'median\' is not "mean", "max" or "top_tissue"'):
        aggregate(tiles, "median")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="needs the tissue fractions"):
        aggregate(tiles, "top_tissue")
