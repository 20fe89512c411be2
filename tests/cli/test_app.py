"""The command as a whole: start-up, errors, exit statuses."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Group

from slide2vec import __version__
from slide2vec.cli import app
from slide2vec.cli.console import log_to_stderr, note, print_error
from slide2vec.cli.help_text import _GROUPS, EMBED, LOOK, MAX_WIDTH, SET_UP
from slide2vec.progress.live import TakingTurns, TerminalDisplay
from slide2vec.version import PROJECT

HEAVY = ("torch", "numpy", "pandas", "cv2", "huggingface_hub", "timm", "openslide", "cucim", "tifffile")


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys, atexit; sys.argv = ['slide2vec', *{arguments!r}]\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "from slide2vec.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() and ran.stderr.strip() == "[]"


def test_warnings_appear_above_a_live_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not past it: it then erases as many lines as its own, and so the warning instead of itself."""
    with (tmp_path / "terminal").open("w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        console = TakingTurns(file=terminal, force_terminal=True, record=True, width=80)
        log_to_stderr()
        display = TerminalDisplay(console)
        display.start(lambda: Group("the display"))
        try:
            logging.getLogger("slide2vec.tests").warning("a slide is odd")
            note("loading")
        finally:
            display.stop()
    assert "warning: a slide is odd\n" in (shown := console.export_text()) and "loading\n" in shown


def test_in_a_terminal_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than a line, such as a path, stays whole, to be copied; a pipe gets one line."""
    text = "slide a/b: " + "it cannot be read " * 8 + "/" + "long/" * 20 + " try another"
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    monkeypatch.setenv("NO_COLOR", "1")
    with os.fdopen(main, "rb") as shown, os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        print_error(text)
        lines = shown.read1(2000).decode().splitlines()
    assert " ".join(lines) == f"error: {text}"
    assert [line for line in lines if len(line) > 60] == [f"/{'long/' * 20}"] and len(lines) == 5
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    print_error(text)
    assert piped.getvalue() == f"error: {text}\n"


def test_a_command_ends_without_a_word_of_its_libraries(small_slide: Path, tmp_path: Path) -> None:
    """Such as Triton's bindings, which complain of whatever outlives the interpreter."""
    options = ["-p", "timm:resnet10t", "--weights", "random", "--spacing", "2", "--tile-size", "64"]
    options += ["--allow-non-recommended-settings", "--device", "cpu", "-o", str(tmp_path)]
    command = [sys.executable, "-m", "slide2vec", "embed", str(small_slide), *options, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "leaked" not in ran.stderr and "nanobind" not in ran.stderr


def test_listing_models_does_not_load_torch() -> None:
    code = (
        "import sys, atexit; sys.argv = ['slide2vec', 'models']\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from slide2vec.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "virchow2" in ran.stdout and ran.stderr.strip() == "False"


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "slide2vec", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"slide2vec {__version__} ({PROJECT})"


def test_help_names_every_command_in_a_group_with_a_sentence(run) -> None:
    text = run("--help").stdout
    assert all(f" {name} " in text for name in _commands())
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        *("Options:", f"{EMBED}:", f"{LOOK}:", f"{SET_UP}:")
    ]
    assert "..." not in text.replace("[ARGS]...", "")
    assert max(map(len, text.splitlines())) <= 80


def test_long_help_is_in_groups(run) -> None:
    """What is required comes first in its group; nobody's option is forgotten, and no name is of the past."""
    text = run("run", "--help").stdout
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Arguments:", *(f"{name}:" for name in _GROUPS), "Others:"]
    assert text.count("\n  -") == len(_options("run"))
    assert text.index("Output:") < text.index("  -o, ") < text.index("Others:") < text.index("  --json")
    assert "Slides:" not in run("export", "--help").stdout  # of few options
    listed = [option for options in _GROUPS.values() for option in options]
    known = {option for name in _commands() for option in _options(name)}
    assert len(listed) == len(set(listed)) and set(listed) <= known


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (300, MAX_WIDTH)])
def test_help_is_as_wide_as_the_terminal(columns: int, widest: int) -> None:
    command = [sys.executable, "-m", "slide2vec", "run", "--help"]
    environment = {**os.environ, "COLUMNS": str(columns)}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    sentences = [line for line in text.splitlines() if line.startswith(10 * " ")]
    assert widest - 15 < max(map(len, sentences)) <= widest


def _commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined,no-any-return]


def _options(command: str) -> list[str]:
    """By parameter, those that are shown."""
    shown = [each for each in _commands()[command].params if not getattr(each, "hidden", False)]
    return [*(str(each.name) for each in shown if each.param_type_name == "option"), "help"]


def test_errors_are_one_line_without_traceback(run) -> None:
    result = run("models", "virchow-2")
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "virchow-2" in line and "virchow2" in line


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "slide2vec", "models", "virchow-2", "--debug"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr and "PresetError" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed"],
        ["embed", "slide.svs", "--preset", "scattering"],
        ["embed", "slide.svs", "--preset", "scattering", "-o", "out", "--format", "csv"],
        ["embed", "slide.svs", "--preset", "scattering", "-o", "out", "--batch-size", "0"],
        ["models", "--level", "cell"],
        ["embedd"],
    ],
)
def test_wrong_usage_exits_2(run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_interrupt_exits_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(level: str | None = None) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("slide2vec.recipes.list_models", interrupted)
    result = run("models")
    assert result.exit_code == 130 and result.stderr == "\ninterrupted\n"


def test_interrupted_runs_say_that_they_go_on(
    run, tmp_path: Path, small_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slide2vec.pipeline.Pipeline.run", interrupted)
    result = run("embed", small_slide, "-p", "scattering", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.endswith("\ninterrupted: what is complete is kept, and the same command goes on\n")


def test_warnings_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a slide that is opened twice, say, once to count its tiles and once to try the encoder."""
    logger = logging.getLogger("slide2vec.tests")
    handlers = list(logging.getLogger("slide2vec").handlers)
    log_to_stderr()
    try:
        for name in ("a", "b", "a"):
            logger.warning("slide %s is odd", name)
    finally:
        logging.getLogger("slide2vec").handlers = handlers
    assert capsys.readouterr().err == "warning: slide a is odd\nwarning: slide b is odd\n"


def test_files_that_cannot_be_written_are_an_error_line(run, tmp_path: Path, small_slide: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = run("embed", small_slide, "--preset", "scattering", "-o", tmp_path / "taken")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ") and "taken" in result.stderr
