"""Adds to the summary of a run the electricity that it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from slide2vec.energy import EnergyMeter
from slide2vec.progress.events import ProgressEvent, RunFinished, RunStarted
from slide2vec.progress.reporters import (
    NullReporter,
    ProgressReporter,
    activate_progress_reporter,
    active_reporter,
)

__all__ = ["Metering", "metered"]


class Metering:
    """Measures from RunStarted to RunFinished.

    Args:
        devices: gives those that the run uses, once it has begun.
    """

    def __init__(self, devices: Callable[[], Sequence[str]]) -> None:
        self._devices = devices
        self._meter: EnergyMeter | None = None

    def take(self, event: ProgressEvent) -> ProgressEvent:
        """The event; the last one with the energy in its summary."""
        if isinstance(event, RunStarted):
            self.close()
            self._meter = EnergyMeter(self._devices())
        elif isinstance(event, RunFinished) and self._meter is not None:
            energy = self._meter.stop()
            self._meter = None
            return RunFinished(
                replace(event.summary, watt_hours=energy.watt_hours, measured_by=energy.measured_by)
            )
        return event

    def close(self) -> None:
        """Measure no longer."""
        if self._meter is not None:
            self._meter.stop()
            self._meter = None


class _MeteredReporter:
    """See `ProgressReporter`. The inner one is closed by whoever installed it."""

    def __init__(self, inner: ProgressReporter, metering: Metering) -> None:
        self._inner, self._metering = inner, metering

    def emit(self, event: ProgressEvent) -> None:
        self._inner.emit(self._metering.take(event))

    def close(self) -> None:
        self._metering.close()


@contextmanager
def metered(devices: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Summaries of the calls made in the block have their energy, if somebody sees them."""
    inner = active_reporter()
    if isinstance(inner, NullReporter):
        yield
        return
    with activate_progress_reporter(_MeteredReporter(inner, Metering(devices))):
        yield
