"""Events, reporters and the live display, on terminals and notebooks that are not there."""

from __future__ import annotations

import contextvars
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event
from types import ModuleType

import pytest
from rich.console import Console, Group

from slide2vec.progress import (
    NullReporter,
    ProgressEvent,
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    StationTime,
    TilesEncoded,
    activate_progress_reporter,
    active_reporter,
    in_turn,
    live_progress,
)
from slide2vec.progress.lines import LineReporter
from slide2vec.progress.live import (
    TERMINAL_S,
    LiveReporter,
    NotebookDisplay,
    TakingTurns,
    TerminalDisplay,
    draw,
)
from slide2vec.progress.state import RunState, failure

STATIONS = (StationTime("read", 2, 5.0, 1.0), StationTime("encode", 1, 11.9, 0.1))
SUMMARY = RunSummary(slides=3, failed=1, tiles=1234, seconds=12.3, stations=STATIONS, bottleneck="encode")
RUN: list[ProgressEvent] = [
    RunStarted(2, "scattering"),
    SlidePlanned("first", 100, "cucim"),
    TilesEncoded(40),
    SlidePlanned("second", 300, "openslide"),
    TilesEncoded(60),
    SlideFinished("first", 100),
    SlideFailed("second", RuntimeError("corrupt tile")),
    RunFinished(SUMMARY),
]


Attach = Callable[[io.StringIO, str], None]


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Collector:
    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []
        self.closed = 0

    def emit(self, event: ProgressEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def rendered(state: RunState, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(draw(state))
    return captured.get()


def state_of(events: list[ProgressEvent], slides: int, clock: Clock, step_s: float = 1.0) -> RunState:
    state = RunState(slides, "scattering", clock)
    for event in events:
        clock.now += step_s if isinstance(event, TilesEncoded) else 0
        state.take(event)
    return state


# summary --------------------------------------------------------------------------------------


def test_summary_says_how_much_how_fast_and_what_held_it_back() -> None:
    whole = "1,234 tiles of 3 slides (1 failed) in 12.3 s, 100 tiles/s, 4.1 s a slide; "
    assert str(SUMMARY) == f"{whole}energy not measured; bottleneck: encode (busy 97%)"
    measured = replace(SUMMARY, watt_hours=3.0, measured_by="NVML (1 GPU), CPU not measured")
    energy = "3 Wh by NVML (1 GPU), CPU not measured: 1 Wh a slide, 2.43 Wh per 1,000 tiles"
    assert str(measured) == f"{whole}{energy}; bottleneck: encode (busy 97%)"


def test_summary_of_one_slow_slide_and_of_nothing() -> None:
    one = RunSummary(slides=1, failed=0, tiles=1, seconds=2.0, stations=STATIONS, bottleneck="read")
    assert (
        str(one)
        == "1 tile of 1 slide in 2.0 s, 0.5 tiles/s; energy not measured; bottleneck: read (busy 100%)"
    )
    nothing = RunSummary(slides=0, failed=0, tiles=0, seconds=0.0, stations=(), bottleneck="encode")
    assert str(nothing) == "0 tiles of 0 slides in 0.0 s; energy not measured"


def test_the_bill_is_of_the_whole_of_a_slide_and_of_1000_tiles() -> None:
    bill = replace(SUMMARY, tiles=500, seconds=30.0, watt_hours=6.0, measured_by="RAPL (dram)").bill()
    assert (bill["slides"], bill["seconds"], bill["watt_hours"]) == (3, 30.0, 6.0)
    assert bill["per_slide"] == {"seconds": 10.0, "watt_hours": 2.0}
    assert bill["per_1000_tiles"] == {"seconds": 60.0, "watt_hours": 12.0}
    unmeasured = replace(SUMMARY, slides=0, tiles=0).bill()
    assert unmeasured["per_slide"] == unmeasured["per_1000_tiles"] == {"seconds": None, "watt_hours": None}
    assert unmeasured["watt_hours"] is None and unmeasured["measured_by"] == "not measured"


def test_runs_in_turn_add_up() -> None:
    one = replace(SUMMARY, seconds=10.0, watt_hours=1.0, measured_by="RAPL (dram)")
    both = in_turn([one, replace(one, slides=2, seconds=5.0, watt_hours=0.5)])
    assert (both.slides, both.tiles, both.seconds, both.watt_hours) == (3, 2 * SUMMARY.tiles, 15.0, 1.5)
    assert both.measured_by == "RAPL (dram)"
    assert in_turn([one, SUMMARY]).watt_hours is None, "a part of it was not measured"


# state and drawing ----------------------------------------------------------------------------


def test_drawing_before_during_and_at_the_end() -> None:
    clock = Clock()
    assert "scattering: finding tissue" in rendered(RunState(2, "scattering", clock))
    during = rendered(state_of(RUN[1:4], 2, clock))
    assert "0/2" in during and "40/400" in during and "40/400+" not in during
    assert "40 tiles/s, 0:00:09 left" in during
    assert "scattering: embedding first" in during
    end = rendered(state_of(RUN[1:7], 2, Clock()))
    assert "2/2" in end and "1 failed" in end and "finishing" in end


def test_tiles_of_slides_not_planned_yet_are_estimated() -> None:
    state = state_of([SlidePlanned("first", 100, "cucim"), TilesEncoded(50)], 3, Clock())
    assert not state.all_planned and "50/100+" in rendered(state)
    assert state.seconds_left() == pytest.approx((3 * 100 - 50) / 50)


def test_speed_is_that_of_late() -> None:
    clock = Clock()
    slow: list[ProgressEvent] = [TilesEncoded(1)] * 30
    fast: list[ProgressEvent] = [TilesEncoded(100)] * 30
    assert state_of(slow + fast, 1, clock).tiles_per_second() == 100


def test_a_slide_that_fails_before_planning_leaves_nothing_to_wait_for() -> None:
    state = state_of([SlideFailed("first", OSError()), SlidePlanned("second", 10, "cucim")], 2, Clock())
    assert state.all_planned and state.known_tiles == 10


def test_display_fits_80_columns() -> None:
    name = "a-slide-with-a-name-that-is-much-longer-than-any-terminal-is-wide-" * 2
    events: list[ProgressEvent] = [SlidePlanned(name, 12_345_678, "cucim"), TilesEncoded(1_234_567)]
    lines = rendered(state_of(events, 2, Clock(), step_s=100)).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert "1,234,567/12,345,678+" in lines[1] and "left" in lines[1]


def test_names_are_not_taken_for_markup() -> None:
    assert "[bold]x[/bold]" in rendered(state_of([SlidePlanned("[bold]x[/bold]", 1, "cucim")], 1, Clock()))


# reporters ------------------------------------------------------------------------------------


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Attach:
    """Makes a stream stderr. Not a fixture's set-up, because pytest replaces stderr after that."""

    def make_stderr(stream: io.StringIO, term: str) -> None:
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "stderr", stream)

    return make_stderr


def test_live_display_in_a_terminal_ends_with_the_summary() -> None:
    screen = io.StringIO()
    console = TakingTurns(file=screen, force_terminal=True, width=100)
    reporter = LiveReporter(TerminalDisplay(console))
    for event in RUN:
        reporter.emit(event)
    reporter.close()
    text = screen.getvalue()
    assert "slides" in text and "tiles" in text
    assert text.rstrip().endswith(str(SUMMARY))
    assert "\x1b[?25l" in text and text.count("\x1b[?25h") >= 1, "the cursor must come back"


def test_terminal_shows_live_progress(attach: Attach) -> None:
    attach(stderr := Terminal(), "xterm")
    with live_progress():
        assert isinstance(active_reporter(), LiveReporter)
        for event in RUN:
            active_reporter().emit(event)
    assert str(SUMMARY) in stderr.getvalue()
    assert isinstance(active_reporter(), NullReporter)


def test_an_interrupted_run_takes_the_display_away(attach: Attach) -> None:
    attach(stderr := Terminal(), "xterm")
    with pytest.raises(KeyboardInterrupt), live_progress():
        active_reporter().emit(RUN[0])
        raise KeyboardInterrupt
    assert stderr.getvalue().count("\x1b[?25h") >= 1


@pytest.mark.parametrize("term", ["dumb", "pipe"])
def test_silent_without_a_terminal(term: str, attach: Attach) -> None:
    attach(stream := Terminal() if term == "dumb" else io.StringIO(), term)
    with live_progress():
        assert isinstance(active_reporter(), NullReporter)
        for event in RUN:
            active_reporter().emit(event)
    assert stream.getvalue() == ""


def test_installed_reporter_stays(attach: Attach) -> None:
    attach(stderr := Terminal(), "xterm")
    mine = Collector()
    with activate_progress_reporter(mine):
        with live_progress():
            assert active_reporter() is mine
            active_reporter().emit(RUN[0])
        assert mine.closed == 0
    assert (mine.events, mine.closed) == ([RUN[0]], 1)
    assert stderr.getvalue() == ""


def test_what_is_printed_while_a_display_is_drawn_does_not_disturb_it() -> None:
    """The line below is rendered before the display is drawn for the first time, and written after it."""
    drawn = Event()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "the display" in text:
                drawn.set()
            return super().write(text)

    class Line:
        def __rich_console__(self, *_: object) -> Iterator[str]:
            drawn.wait(2 * TERMINAL_S)
            yield "a slide is odd"

    console = TakingTurns(file=(screen := Screen()), force_terminal=True, width=60)
    display = TerminalDisplay(console)
    display.start(lambda: Group("the display", "has", "three lines"))
    console.print(Line())
    assert drawn.wait(10)
    console.print("the end")
    display.stop()
    assert _seen(screen.getvalue()) == ["a slide is odd", "the end"]


def _seen(written: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(0, row - int(part[2:-1]))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return [line.rstrip() for line in lines if line]


def test_a_display_that_breaks_does_not_break_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("terminal is gone")

    reporter = LiveReporter(TerminalDisplay(TakingTurns(file=Broken(), force_terminal=True)))
    for event in RUN:
        reporter.emit(event)
    reporter.close()


def test_generator_closed_in_another_context() -> None:
    """As when a notebook goes on with an iterator in its next cell."""
    mine = Collector()

    def run() -> Iterator[int]:
        with activate_progress_reporter(mine):
            yield 1

    numbers = run()
    contextvars.copy_context().run(next, numbers)
    assert list(numbers) == [] and mine.closed == 1


# notebook -------------------------------------------------------------------------------------


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A kernel that keeps what each output cell showed."""
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, index: int) -> None:
            self.index = index

        def update(self, bundle: dict[str, str], *, raw: bool) -> None:
            assert raw
            shown[self.index].append(bundle["text/plain"])

    def display(bundle: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        shown.append([bundle["text/plain"]])
        return Handle(len(shown) - 1)

    shell = type("ZMQInteractiveShell", (), {})()
    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_notebook_updates_one_cell_per_run(cells: list[list[str]]) -> None:
    with live_progress():
        for event in RUN + RUN:
            active_reporter().emit(event)
    assert [cell[-1].splitlines()[-1] for cell in cells] == [str(SUMMARY)] * 2
    assert all(cell[-1].startswith("slide second failed: corrupt tile\n") for cell in cells)
    assert "finding tissue" in cells[0][0] and "1 failed" in cells[0][-2]


def test_an_interrupt_in_a_notebook_shows_three_lines(cells: list[list[str]]) -> None:
    """IPython shows what `_render_traceback_` gives in place of the traceback."""
    with pytest.raises(KeyboardInterrupt) as caught, live_progress():
        for event in RUN[:6]:
            active_reporter().emit(event)
        raise KeyboardInterrupt
    lines = caught.value._render_traceback_()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert lines[0].startswith("KeyboardInterrupt: 1 of 2 slides, 100 of 400 tiles") and "second" in lines[0]
    assert [cell[-1] for cell in cells] == ["interrupted"]


def test_an_interrupt_elsewhere_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.progress.reporters.in_terminal", lambda: True)
    with pytest.raises(KeyboardInterrupt) as caught, live_progress():
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "_render_traceback_")


def test_notebook_is_not_flooded(cells: list[list[str]]) -> None:
    clock = Clock()
    reporter = LiveReporter(NotebookDisplay(clock))
    reporter.emit(RunStarted(1, "scattering"))
    for _ in range(1000):
        clock.now += 0.01
        reporter.emit(TilesEncoded(1))
    assert 10 <= len(cells[0]) <= 25


def test_progress_without_a_display_does_not_import_rich() -> None:
    code = (
        "import sys; from slide2vec.progress import *\n"
        "with live_progress(): active_reporter().emit(RunStarted(1, 'x'))\n"
        "print('rich' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("False", "")


# lines ------------------------------------------------------------------------------------------------


def test_lines_every_half_minute_and_failures_at_once() -> None:
    clock, said = Clock(), []
    reporter = LineReporter(said.append, clock)
    reporter.emit(RunStarted(3, "uni"))
    reporter.emit(SlidePlanned("a", 1000, "tiff"))
    reporter.emit(TilesEncoded(10, "a"))
    assert said == []
    clock.now += 31
    reporter.emit(TilesEncoded(310, "a"))
    assert said == ["0 of 3 slides, 320 of 1,000+ tiles, 10 tiles/s, about 0:04:28 left: embedding a"]
    reporter.emit(SlideFailed("b", RuntimeError("slide b: a tile\ncannot be decoded")))
    assert said[1:] == ["slide b failed: a tile cannot be decoded"]
    clock.now += 29
    reporter.emit(TilesEncoded(1, "a"))
    assert len(said) == 2
    clock.now += 2
    reporter.emit(TilesEncoded(1, "a"))
    assert len(said) == 3 and said[2].startswith("1 of 3 slides (1 failed), 322 of 1,000+ tiles")
    reporter.emit(RunFinished(SUMMARY))
    clock.now += 60
    reporter.emit(TilesEncoded(1, "a"))
    assert len(said) == 3


def test_only_the_last_failed_slides_are_drawn() -> None:
    state = RunState(20, "uni", Clock())
    failed = [failure(SlideFailed(f"s{index}", ValueError("no spacing"))) for index in range(9)]
    console = Console(width=60, file=io.StringIO())
    console.print(draw(state, failed))
    text = console.file.getvalue()
    assert "… and 4 slides that failed before" in text and "slide s8 failed: no spacing" in text
    assert "slide s3 failed" not in text
