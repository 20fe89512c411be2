"""The live display of a run: slides, tiles, speed and what is left, in a terminal or a notebook."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from threading import Event, RLock, Thread
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slide2vec.progress.events import ProgressEvent, RunFinished, RunStarted, RunSummary, SlideFailed
from slide2vec.progress.lines import in_words
from slide2vec.progress.screen import in_notebook
from slide2vec.progress.state import RunState, failure

__all__ = ["LiveReporter"]

logger = logging.getLogger(__name__)

#: Seconds between two drawings.
TERMINAL_S, NOTEBOOK_S = 1 / 8, 0.5
BAR_WIDTH = 20
#: Failed slides that are shown.
MOST_FAILED = 5


def draw(state: RunState, failed_slides: Sequence[str] = ()) -> Group:
    """The display: the slides that failed last, one row for slides, one for tiles, one for the stage."""
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
    lines = (Text(line, "red", no_wrap=True, overflow="ellipsis") for line in _listed(failed_slides))
    return Group(*lines, rows, stage)


def _listed(failed_slides: Sequence[str]) -> list[str]:
    """The last of the slides that failed, and how many came before them."""
    hidden = len(failed_slides) - MOST_FAILED
    more = [f"… and {hidden:,} slides that failed before"] if hidden > 0 else []
    return [*more, *failed_slides[-MOST_FAILED:]]


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


class TakingTurns(Console):
    """A console that threads use one after another.

    rich reckons from where to redraw when lines are rendered, and writes them later. Where another thread
    draws in between, the display is left standing, and the lines above it are erased instead.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._turn = RLock()
        super().__init__(*args, **options)

    def __enter__(self) -> TakingTurns:
        self._turn.acquire()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            super().__exit__(*raised)
        finally:
            self._turn.release()


class TerminalDisplay:
    """Redraws in place, on stderr; what others print meanwhile appears above it."""

    def __init__(self, console: TakingTurns | None = None) -> None:
        self._console = console or TakingTurns(stderr=True)
        self._live: Live | None = None
        self._stopped = Event()

    def start(self, render: Callable[[], Group]) -> None:
        """Begin to redraw, from a thread."""
        # Printing of the caller is only taken over where it goes to the same terminal.
        shared = sys.stdout is not None and sys.stdout.isatty()
        live = Live(
            get_renderable=render,
            console=self._console,
            auto_refresh=False,  # rich's own thread takes its lock before the console's turn
            transient=True,
            redirect_stdout=shared,
        )
        self._live, self._stopped = live, Event()
        with self._console:
            live.start()
        Thread(target=self._redraw, args=(live, self._stopped), name="slide2vec-display", daemon=True).start()

    def _redraw(self, live: Live, stopped: Event) -> None:
        try:
            while not stopped.wait(TERMINAL_S):
                with self._console:
                    if not stopped.is_set():
                        live.refresh()
        except Exception:  # as in LiveReporter.emit
            logger.debug("the progress display failed", exc_info=True)

    def update(self) -> None:
        """Nothing to do: the thread redraws."""

    def stop(self) -> None:
        """Erase the display. May be called twice."""
        live, self._live = self._live, None
        self._stopped.set()
        if live is not None:
            with self._console:
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
        self._failed: list[str] = []

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
            if isinstance(event, SlideFailed):
                self._failed.append(failure(event))
            self._display.update()

    def _begin(self, state: RunState) -> None:
        self._display.stop()
        self._state, self._failed = state, []
        self._display.start(lambda: draw(state, self._failed))

    def _end(self, summary: RunSummary) -> None:
        self._display.stop()
        self._state = None
        if self._summary:
            self._display.say("\n".join([*_listed(self._failed), str(summary)]))

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """Take the display away, and have a notebook show three lines instead of the traceback."""
        state, self._state = self._state, None
        self.close()
        if not isinstance(self._display, NotebookDisplay):
            return
        self._display.say("interrupted")
        lines = [
            f"KeyboardInterrupt: {in_words(state) if state else 'before the first slide'}",
            "Nothing goes on in the background; the model can be used again.",
            "What was written below an output_dir is kept: the same call goes on from there.",
        ]
        vars(error)["_render_traceback_"] = lambda: lines  # asked for by IPython

    def close(self) -> None:
        """Take the display away."""
        try:
            self._display.stop()
        except Exception:
            logger.debug("the progress display failed", exc_info=True)
