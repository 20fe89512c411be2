"""Progress of a run: typed events, and where they go.

A run emits events to the active reporter. Without one installed, a live display is shown in an
interactive terminal or a notebook, and nothing elsewhere.
"""

from slide2vec.progress.events import (
    ProgressEvent,
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    StationTime,
    TilesEncoded,
    in_turn,
    merged,
    of_encoders,
)
from slide2vec.progress.metering import Metering, metered
from slide2vec.progress.reporters import (
    NullReporter,
    ProgressReporter,
    activate_progress_reporter,
    active_reporter,
    live_progress,
)

__all__ = [
    "Metering",
    "NullReporter",
    "ProgressEvent",
    "ProgressReporter",
    "RunFinished",
    "RunStarted",
    "RunSummary",
    "SlideFailed",
    "SlideFinished",
    "SlidePlanned",
    "StationTime",
    "TilesEncoded",
    "activate_progress_reporter",
    "active_reporter",
    "in_turn",
    "live_progress",
    "merged",
    "metered",
    "of_encoders",
]
