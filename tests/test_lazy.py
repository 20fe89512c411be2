"""Names that are imported when they are first used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PACKAGE = """\
from slide2vec.lazy import lazy_attributes

__all__ = ["here", "there"]
here = 1
__getattr__, __dir__ = lazy_attributes(__name__, {"there": "home"})
"""


def test_lazy_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily").mkdir()
    (tmp_path / "lazily/__init__.py").write_text(PACKAGE)
    (tmp_path / "lazily/home.py").write_text("there = 2\nother = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazily

    assert dir(lazily) == ["here", "there"] and "lazily.home" not in sys.modules
    assert (lazily.here, lazily.there) == (1, 2)
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'other'"):
        _ = lazily.other
    with pytest.raises(ImportError, match="nothing"):
        from lazily import nothing  # noqa: F401
