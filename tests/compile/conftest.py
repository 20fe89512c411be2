"""Lets the tests of this folder import `compile_helpers` and the fake TensorRT of tests/runtime; a small
encoder, once."""

import sys
from pathlib import Path

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from compile_helpers import tiny_encoder, tiny_recipe

from slide2vec.recipes import Recipe


@pytest.fixture(autouse=True, scope="session")
def in_short_rounds(short_rounds: None) -> None:
    """No test of this folder is about how fast an engine is."""


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return tiny_recipe()


@pytest.fixture
def encoder(recipe: Recipe) -> nn.Module:
    return tiny_encoder(recipe)
