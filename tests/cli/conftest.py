"""Runs the command line in this process, and slides made for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slide2vec.cli import app
from slide2vec.synthetic import write_synthetic_slide

sys.path.insert(0, str(Path(__file__).parent))  # tests import `hub_server`

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs `slide2vec` with arguments, 80 columns wide; what it logs to stderr ends with the test."""
    monkeypatch.setenv("COLUMNS", "80")
    logger = logging.getLogger("slide2vec")
    handlers, level = list(logger.handlers), logger.level
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    logger.handlers, logger.level = handlers, level


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic slide of 2,048 px a side, 0.25 µm/px."""
    path = tmp_path_factory.mktemp("slides") / "small.svs"
    return write_synthetic_slide(path, size_px=2048, seed=1)
