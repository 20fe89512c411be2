"""What a run will take before it begins: tiles and bytes of each slide, time here and on known hardware."""

from __future__ import annotations

from slide2vec.estimate.counts import COORDINATES_BYTES, Output, SlideEstimate, count_tiles, unevenness
from slide2vec.estimate.in_turns import InTurns, in_turns, read_together, reading_seconds
from slide2vec.estimate.trial import (
    HARDWARE,
    LEAST_GFLOPS,
    Hardware,
    Trial,
    on_hardware,
    seconds_for,
    tried,
    with_build,
)

__all__ = [
    "COORDINATES_BYTES",
    "HARDWARE",
    "LEAST_GFLOPS",
    "Hardware",
    "InTurns",
    "Output",
    "SlideEstimate",
    "Trial",
    "count_tiles",
    "in_turns",
    "on_hardware",
    "read_together",
    "reading_seconds",
    "seconds_for",
    "tried",
    "unevenness",
    "with_build",
]
