"""How results are laid out."""

from __future__ import annotations

import pytest

from slide2vec.cli.console import Sentences, stdout

SENTENCE = "slides/broken.svs cannot be read: it is a truncated TIFF; copy it again from its source"
LONG = "TCGA-OR-A5J1-01Z-00-DX1.600C7D8C-F04C-4125-AF14-B1E76DC01A1E"


def printed(rows: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    stdout().print(Sentences(("slide", "stage", "error"), rows))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_sentences_stand_beside_short_names(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed([("broken", "tiling", SENTENCE)], capsys)
    assert lines[0] == "slide   stage   error"
    assert lines[2] == "broken  tiling  slides/broken.svs cannot be read: it is a truncated TIFF; copy"


@pytest.mark.parametrize("columns", [20, 80, 100])
def test_sentences_stand_below_names_that_leave_them_little_room(
    columns: int, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed([(LONG, "tiling", SENTENCE), ("b", "plan", "it is empty")], capsys)
    assert max(map(len, lines)) <= columns and lines[-2:] == ["b  plan", "    it is empty"]
    assert lines[0] == "slide  stage  error"[:columns]
    if columns > 70:
        assert lines[1] == f"{LONG}  tiling" and lines[2].startswith("    slides/broken.svs cannot be read:")
    assert "".join("".join(lines).split()).endswith("againfromitssourcebplanitisempty")


def test_a_wide_terminal_has_room_for_both(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    lines = printed([(LONG, "tiling", SENTENCE)], capsys)
    assert lines[-1] == f"{LONG}  tiling  {SENTENCE}" and len(lines) == 3


def test_text_in_brackets_is_shown(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert printed([("a[b]", "x", "not [red]this[/red]")], capsys)[1:] == [
        "a[b]  x",
        "    not [red]this[/red]",
    ]
