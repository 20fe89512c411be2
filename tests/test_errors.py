"""What a notebook shows of errors that say themselves what to do."""

from __future__ import annotations

import linecache

import pytest

from slide2vec.errors import ConfigError, Slide2VecError, nearest_names

CELL = "import slide2vec\n\nslide2vec.Model.from_preset('virchow3')\n"


def test_a_notebook_shows_the_callers_line_and_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the frames of ours in between, nor those of the hub's client where weights are missing."""
    lines = (len(CELL), None, CELL.splitlines(keepends=True), "<cell>")
    monkeypatch.setitem(linecache.cache, "<cell>", lines)  # as IPython does
    with pytest.raises(Slide2VecError) as raised:
        exec(compile(CELL, "<cell>", "exec"), {"__name__": "__main__"})
    line, message = raised.value._render_traceback_()
    assert line == "line 3: slide2vec.Model.from_preset('virchow3')"
    assert message.startswith("PresetError: there is no preset 'virchow3'") and "virchow2" in message


def test_errors_that_nobody_raised_are_shown_too() -> None:
    assert ConfigError("no such thing")._render_traceback_() == ["ConfigError: no such thing"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("virchov", "Did you mean virchow or virchow2?"),
        ("virchow_v3", "Did you mean virchow2 or virchow?"),
        ("hoptimus", "Did you mean other, h-optimus-1 or h-optimus-0?"),
        ("zzz", "Allowed: h-optimus-0, h-optimus-1, other, virchow, virchow2."),
    ],
)
def test_nearest_names(wrong: str, said: str) -> None:
    names = ("virchow", "virchow2", "h-optimus-0", "h-optimus-1", "other")
    aliases = {"virchow_v2": "virchow2", "virchow-v2": "virchow2", "optimus": "other"}
    assert nearest_names(wrong, names, aliases=aliases) == said
