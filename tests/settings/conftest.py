"""Settings from text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slide2vec.settings import RunSettings, load_settings

sys.path.insert(0, str(Path(__file__).parent))

from settings_files import Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads settings from text, with overrides; `model.name` is given unless the text gives it."""

    def loaded(text: str = "", *overrides: str, named: bool = True) -> RunSettings:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_settings(path, (["model.name=uni"] if named else []) + list(overrides))

    return loaded
