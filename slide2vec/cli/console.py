"""What subcommands print with: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slide2vec.choices import (
    BACKENDS,
    OUTPUT_FORMATS,
    SEGMENTATION_METHODS,
    Choices,
    EngineChoice,
    SegmentationMethod,
)
from slide2vec.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

__all__ = [
    "BACKEND",
    "EXPORT_FORMAT",
    "FORMAT",
    "BuildEngine",
    "Debug",
    "Devices",
    "Engine",
    "IdSource",
    "Json",
    "Method",
    "MinPiece",
    "NumGpus",
    "Offline",
    "Overlap",
    "SegmentationDownsample",
    "SegmentationWeights",
    "Sentences",
    "SlidesDir",
    "Sthresh",
    "TissueThreshold",
    "cause",
    "debugging",
    "device_names",
    "facts",
    "given",
    "log_to_stderr",
    "note",
    "print_error",
    "print_json",
    "stdout",
    "table",
    "tissue_options",
]

#: Columns where nobody says how wide the output is: a file or a pipe.
PIPE_WIDTH = 120
#: Columns that sentences in a table need: names of slides may have 60 characters.
_LEAST_SENTENCE = 40

_logger = logging.getLogger("slide2vec")


class _StderrHandler(logging.Handler):
    """Writes records to what is stderr at that moment (a live display takes it over).

    A warning is written once, however often it is said: `plan` opens slides again to try the encoder.
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno == logging.WARNING:
            if text in self._warnings:
                return
            self._warnings.add(text)
        _to_stderr(f"{record.levelname.lower()}: {text}")


class _AdviceHandler(logging.Handler):
    """Shows what is neither a warning nor only for debugging."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO and not debugging():
            note(record.getMessage())


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Show the library's records from `level` on; `--debug` shows all."""
    for handler in list(_logger.handlers):
        if isinstance(handler, _StderrHandler):
            _logger.removeHandler(handler)
    _logger.addHandler(_StderrHandler(level))
    advice = logging.getLogger("slide2vec.compile.engine_choice")  # one line at most, about a faster way
    advice.setLevel(min(level, logging.INFO))
    if not advice.handlers:
        advice.addHandler(_AdviceHandler(logging.INFO))
    # What tifffile complains of comes back in our errors, with the slide's name.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())


def _debug(asked: bool) -> None:
    if asked:
        _logger.setLevel(logging.DEBUG)
        log_to_stderr(logging.DEBUG)


def _offline(asked: bool) -> None:
    if asked:
        from slide2vec.files.hub import go_offline

        go_offline()


def debugging() -> bool:
    """Whether `--debug` was given."""
    return any(isinstance(h, _StderrHandler) and h.level == logging.DEBUG for h in _logger.handlers)


BuildEngine = Annotated[
    bool | None,
    typer.Option(
        "--build-engine/--no-build-engine",
        help="Compile the encoder first where the run then ends sooner [build].",
    ),
]
Engine = Annotated[
    EngineChoice, typer.Option(help="What runs the encoder: auto takes a compiled one where there is one.")
]
NumGpus = Annotated[int | None, typer.Option(min=0, help="GPUs to use [all, unless --device names one].")]
Devices = Annotated[
    str | None,
    typer.Option(help="The same by name, with commas: cuda:0,cuda:2; or worker processes: cpu,cpu."),
]
SlidesDir = Annotated[
    Path | None, typer.Option(help="Folder of the slides that a manifest names.", show_default=False)
]
#: As slide2vec.slides.IdFrom, which is not imported for the sake of start-up time.
IdSource = Annotated[
    Literal["name", "path"],
    typer.Option(
        "--id-from", help='Where no ids are given: the file\'s name, or its path with "__" for "/".'
    ),
]


def _by_name(table: Choices[Any], *others: str) -> dict[str, Any]:
    """Arguments of `typer.Option` for names of a table, of which installed packages may bring more."""

    def named(text: str) -> str:
        if text in others:
            return text
        try:
            return str(table.checked(text))
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None

    return {"parser": named, "metavar": f"<{'|'.join((*others, *table.ours))}>"}


BACKEND = _by_name(BACKENDS, "auto")
FORMAT = _by_name(OUTPUT_FORMATS)
EXPORT_FORMAT = _by_name(OUTPUT_FORMATS, "geojson", "parquet", "zarr")
Method = Annotated[
    SegmentationMethod | None,
    typer.Option(
        help="How tissue is distinguished from glass; auto finds any stain, and leaves pen out [hsv].",
        show_default=False,
        **_by_name(SEGMENTATION_METHODS),
    ),
]
SegmentationWeights = Annotated[
    str | None,
    typer.Option(
        help='Of methods that are networks: a file or directory, or "random"; by default from Hugging Face.',
        show_default=False,
    ),
]
SegmentationDownsample = Annotated[
    float | None, typer.Option(help="Of the level on which tissue is looked for, about [64].")
]
Sthresh = Annotated[
    int | None, typer.Option(min=0, max=255, help="Saturation of tissue, with method threshold [8].")
]
Overlap = Annotated[float | None, typer.Option(min=0, max=0.99, help="Of neighbouring tiles, 0 to 1 [0].")]
TissueThreshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Least tissue in a tile, 0 to 1 [0.01].")
]
MinPiece = Annotated[
    float | None,
    typer.Option(min=0, help="Tiles as large as a piece of tissue has to be (a_t of HS2P) [4]."),
]
Qc = Annotated[
    str | None,
    typer.Option(
        help="Measure background, blur, bubble, fold and pen in every tile, and leave out tiles with more: "
        "pen=0.1,blur=0.5; or measure, which leaves none out. By a network: grandqc-artefact,spot=0.1, with "
        "its weights=FILE.",
        show_default=False,
    ),
]
Masks = Annotated[
    str | None,
    typer.Option(
        help="Labels of the slides' annotation masks, as YAML or a file of it: {pixel_mapping: {tumor: 1}, "
        "min_coverage: {tumor: 0.5}}.",
        show_default=False,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_debug, is_eager=True, help="Log more; show tracebacks of errors."),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_offline,
        is_eager=True,
        help="Never ask the Hugging Face hub: weights are in its cache (see fetch-weights), or nowhere.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: earlier tiles keep what nobody says."""
    return {name: value for name, value in options.items() if value is not None}


def tissue_options(
    method: str | None,
    downsample: float | None,
    sthresh: int | None,
    min_piece: float | None,
    weights: str | None = None,
) -> dict[str, dict[str, Any]]:
    """`segmentation` and `filtering` of a PreprocessingConfig, from what was given of the options above."""
    segmentation = {"method": method, "downsample": downsample, "sthresh": sthresh, "weights": weights}
    return {
        "segmentation": given(**segmentation),
        "filtering": {} if min_piece is None else {"a_t": min_piece},
    }


def quality_limits(given: str | None) -> dict[str, Any]:
    """What `--qc` says, as fields of QualityConfig.

    Raises:
        typer.BadParameter: it is neither "measure", a network, nor shares of artefacts.
    """
    found: dict[str, Any] = {}
    for part in (given or "").split(",") if given is not None else ():
        name, equals, share = part.strip().partition("=")
        if not equals and name.startswith("grandqc"):
            found |= {"measure": True, "method": name}
            continue
        if name == "weights":
            found["weights"] = share
            continue
        try:
            found |= (
                {f"max_{name.strip()}": float(share)} if equals or name != "measure" else {"measure": True}
            )
        except ValueError:
            raise typer.BadParameter(
                f"--qc {given!r} is not measure, nor shares such as pen=0.1,blur=0.5"
            ) from None
    return found


def masks_option(text: str | None) -> Any:
    """What `--masks` says, for `PreprocessingConfig.masks`; None where it is not given."""
    from slide2vec.settings.text import parse_yaml, read_yaml

    if text is None:
        return None
    path = Path(text)
    is_file = path.suffix.lower() in (".yaml", ".yml")
    return read_yaml(path) if is_file else parse_yaml(text, f"--masks {text[:100]!r}")


def device_names(given: str | None) -> list[str] | None:
    """What `--devices` says."""
    return None if given is None else [name.strip() for name in given.split(",")]


def print_error(error: object) -> None:
    """One line on stderr."""
    text = " ".join(str(error).split()) or type(error).__name__
    _to_stderr(text, "error: ")


def note(text: str) -> None:
    """A line on stderr about what is going on."""
    _to_stderr(text, dim=True)


def _to_stderr(text: str, heading: str = "", *, dim: bool = False) -> None:
    """A line to what is stderr now; in a terminal broken between words. `typer.echo` writes past a live
    display that has taken stderr over, which then erases that line instead of its own."""
    if sys.stderr is None:
        return
    text = heading + text
    if sys.stderr.isatty():
        text = _broken(text)
        if "NO_COLOR" not in os.environ:
            red = typer.style(heading, fg=typer.colors.RED, bold=True) if heading else ""
            text = red + (typer.style(text[len(heading) :], dim=True) if dim else text[len(heading) :])
    # In one piece: print writes a line and its end apart, and threads write at once.
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _broken(text: str) -> str:
    """Lines that fit into the terminal; what is longer than a line by itself, such as a path, stays whole."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return text
    if not columns:
        return text
    lines = text.split("\n")
    fill = partial(textwrap.fill, width=columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join(fill(line) if len(line) > columns else line for line in lines)


def print_json(content: Any) -> None:
    """JSON on stdout, paths as text."""
    typer.echo(json.dumps(content, indent=2, default=str, ensure_ascii=False))


def stdout() -> Console:
    """Where results are printed."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_WIDTH if wide else None, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    """A table with a ruled header; columns named in `numbers` are right-aligned.

    Cells are shown as they are: text in brackets is not taken for markup.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


class Sentences:
    """A table whose last column is sentences, to be printed: below their row where the others leave them
    little room."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._columns, self._rows = columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        beside = (max(map(len, cells)) for cells in [*zip(self._columns, *self._rows, strict=True)][:-1])
        if options.max_width - sum(width + 2 for width in beside) >= _LEAST_SENTENCE:
            yield table(self._columns, self._rows)
            return
        yield Text("  ".join(self._columns), "bold")
        for *names, sentence in self._rows:
            yield Text("  ".join(names))
            yield Padding(Text(sentence), (0, 0, 0, 4))


def cause(sample_id: str, error: object) -> str:
    """What an error says, without the slide that is named beside it."""
    return str(error).removeprefix(f"slide {sample_id}: ") or type(error).__name__


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values, one pair a line."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return made
