"""Reporters: where the events of a run go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol

from slide2vec.progress.events import ProgressEvent
from slide2vec.progress.screen import in_notebook, in_terminal

__all__ = [
    "NullReporter",
    "ProgressReporter",
    "activate_progress_reporter",
    "active_reporter",
    "live_progress",
]


class ProgressReporter(Protocol):
    """Receives events, from one thread at a time."""

    def emit(self, event: ProgressEvent) -> None:
        """Take note of an event; must not raise and should return at once."""

    def close(self) -> None:
        """The reporter is no longer active."""


class NullReporter:
    """Drops every event."""

    def emit(self, event: ProgressEvent) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


_active: ContextVar[ProgressReporter | None] = ContextVar("slide2vec_progress_reporter", default=None)


def active_reporter() -> ProgressReporter:
    """The installed reporter, or one that drops everything."""
    return _active.get() or NullReporter()


@contextmanager
def activate_progress_reporter(reporter: ProgressReporter) -> Iterator[ProgressReporter]:
    """Send the events of every call made in the block to `reporter`, which is closed at its end."""
    token = _active.set(reporter)
    try:
        yield reporter
    finally:
        # A generator may be resumed in another context than it began in (the next cell of a
        # notebook, say); what it set ended with that context then.
        with suppress(ValueError):
            _active.reset(token)
        reporter.close()


@contextmanager
def live_progress() -> Iterator[None]:
    """Show the progress of the calls made in the block on stderr, if somebody is there to see it.

    That is in an interactive terminal or a notebook. A reporter that is installed already stays
    the only one.
    """
    if _active.get() is not None or not (in_notebook() or in_terminal()):
        yield
        return
    from slide2vec.progress.live import LiveReporter  # here, because only a display needs rich

    reporter = LiveReporter()
    with activate_progress_reporter(reporter):
        try:
            yield
        except KeyboardInterrupt as error:
            reporter.interrupt(error)
            raise
