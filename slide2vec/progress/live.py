"""The live display of a run: slides, tiles, speed and what is left, in a terminal or a notebook."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slide2vec.progress import (
    ProgressEvent,
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
    in_notebook,
)

__all__ = ["LiveReporter", "RunState"]

logger = logging.getLogger(__name__)

#: Seconds over which the speed is averaged.
WINDOW_S = 20.0
#: Seconds between two drawings in a notebook; a terminal is drawn by rich's own thread.
NOTEBOOK_S = 0.5
BAR_WIDTH = 20


class RunState:
    """What the events of a run say so far."""

    def __init__(self, slides: int, preset: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.slides, self.preset = slides, preset
        self.finished = self.failed = self.planned = self.tiles = 0
        self._tiles_of: dict[str, int] = {}
        self._known = 0
        self._clock = clock
        self._recent = deque([(clock(), 0)])

    def take(self, event: ProgressEvent) -> None:
        """Count an event in."""
        match event:
            case SlidePlanned(name, tiles, _):
                self.planned += 1
                self._known += tiles
                self._tiles_of[name] = tiles
            case TilesEncoded(count):
                self.tiles += count
                self._note_time()
            case SlideFinished(name, _):
                self.finished += 1
                self._tiles_of.pop(name, None)
            case SlideFailed(name, _):
                self.failed += 1
                self.planned += name not in self._tiles_of
                self._known -= self._tiles_of.pop(name, 0)

    def _note_time(self) -> None:
        now = self._clock()
        self._recent.append((now, self.tiles))
        while len(self._recent) > 2 and now - self._recent[1][0] >= WINDOW_S:
            self._recent.popleft()

    @property
    def known_tiles(self) -> int:
        """Tiles of the slides planned so far."""
        return max(self._known, self.tiles)

    @property
    def all_planned(self) -> bool:
        """Whether the number of tiles is final."""
        return self.planned >= self.slides

    @property
    def stage(self) -> str:
        """What is going on, in a few words."""
        if self.finished + self.failed >= self.slides:
            return "finishing"
        if not self._tiles_of:
            return "finding tissue"
        return f"embedding {next(iter(self._tiles_of))}"

    def tiles_per_second(self) -> float:
        """Speed of late; 0 before the first tiles."""
        since, before = self._recent[0]
        until, now = self._recent[-1]
        return (now - before) / (until - since) if until > since else 0.0

    def seconds_left(self) -> float | None:
        """An estimate that takes slides not planned yet for average ones; None while there is no speed."""
        speed = self.tiles_per_second()
        planned = self.planned - self.failed
        if speed <= 0 or planned <= 0:
            return None
        unplanned = max(0, self.slides - self.planned)
        total = self.known_tiles * (1 + unplanned / planned)
        return max(0.0, total - self.tiles) / speed


def draw(state: RunState) -> Group:
    """The display: one row for slides, one for tiles, one for the stage."""
    rows = Table.grid(padding=(0, 1))
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True, width=BAR_WIDTH)
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    through = state.finished + state.failed
    failed = Text(f"{state.failed:,} failed", "red") if state.failed else Text()
    rows.add_row(
        "slides", ProgressBar(max(state.slides, 1), through), f"{through:,}/{state.slides:,}", failed
    )
    total = state.known_tiles
    bar = ProgressBar(total or None, state.tiles, pulse=not state.planned)
    known = f"{state.tiles:,}/{total:,}{'' if state.all_planned else '+'}"
    rows.add_row("tiles", bar, known, _speed(state))
    stage = Text(f"{state.preset}: {state.stage}", "dim", no_wrap=True, overflow="ellipsis")
    return Group(rows, stage)


def _speed(state: RunState) -> str:
    speed, left = state.tiles_per_second(), state.seconds_left()
    if left is None:
        return ""
    return f"{speed:,.{0 if speed >= 10 else 1}f} tiles/s, {timedelta(seconds=round(left))} left"


class Display(Protocol):
    """Somewhere to draw."""

    def start(self, render: Callable[[], Group]) -> None:
        """Begin to show what `render` returns."""

    def update(self) -> None:
        """Something changed."""

    def stop(self) -> None:
        """Take the display away."""

    def say(self, text: str) -> None:
        """Leave a line of text."""


class TerminalDisplay:
    """Redraws in place, on stderr; what others print meanwhile appears above it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None

    def start(self, render: Callable[[], Group]) -> None:
        """Begin to redraw, from a thread of rich's."""
        # Printing of the caller is only taken over where it goes to the same terminal.
        shared = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            get_renderable=render,
            console=self._console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=shared,
        )
        self._live.start()

    def update(self) -> None:
        """Nothing to do: the thread redraws."""

    def stop(self) -> None:
        """Erase the display. May be called twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class NotebookDisplay:
    """One output cell, updated; needs no widgets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._drawn_at = clock, 0.0
        self._handle: Any = None
        self._render: Callable[[], Group] | None = None

    def start(self, render: Callable[[], Group]) -> None:
        """Show the first drawing."""
        self._show(_text(render()))
        self._render, self._drawn_at = render, self._clock()

    def update(self) -> None:
        """Draw again, not too often."""
        if self._render is not None and self._clock() - self._drawn_at >= NOTEBOOK_S:
            self._drawn_at = self._clock()
            self._show(_text(self._render()))

    def stop(self) -> None:
        """Draw a last time."""
        if self._render is not None:
            self._show(_text(self._render()))
        self._render = None

    def say(self, text: str) -> None:
        """Put a line in the place of the drawing."""
        self._show(text)
        self._handle = None

    def _show(self, text: str) -> None:
        bundle = {"text/plain": text}
        if self._handle is None:
            self._handle = import_module("IPython.display").display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _text(drawing: Group) -> str:
    console = Console(width=100, force_jupyter=False, force_terminal=False)
    with console.capture() as captured:
        console.print(drawing)
    return captured.get().rstrip()


class LiveReporter:
    """A progress reporter that draws a live display and ends each run with its summary.

    Args:
        display: where to draw; None = the notebook, if this is one, else the terminal on stderr.
        summary: whether to leave the summary of each run behind.
    """

    def __init__(self, display: Display | None = None, *, summary: bool = True) -> None:
        self._display = display or (NotebookDisplay() if in_notebook() else TerminalDisplay())
        self._summary = summary
        self._state: RunState | None = None

    def emit(self, event: ProgressEvent) -> None:
        """Show an event. A display that fails is given up, without disturbing the run."""
        try:
            self._take(event)
        except Exception:  # a broken terminal must not cost anybody their embeddings
            logger.debug("the progress display failed", exc_info=True)
            self._state = None

    def _take(self, event: ProgressEvent) -> None:
        if isinstance(event, RunStarted):
            self._begin(RunState(event.slides, event.preset))
        elif isinstance(event, RunFinished):
            self._end(event.summary)
        elif self._state is not None:
            self._state.take(event)
            self._display.update()

    def _begin(self, state: RunState) -> None:
        self._display.stop()
        self._state = state
        self._display.start(lambda: draw(state))

    def _end(self, summary: RunSummary) -> None:
        self._display.stop()
        self._state = None
        if self._summary:
            self._display.say(str(summary))

    def close(self) -> None:
        """Take the display away."""
        try:
            self._display.stop()
        except Exception:
            logger.debug("the progress display failed", exc_info=True)
