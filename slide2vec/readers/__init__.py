"""Open whole-slide images: one protocol, several back ends."""

from __future__ import annotations

from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.reader import SlideReader
from slide2vec.readers.select import backends, open_and_use, open_slide
from slide2vec.readers.spacing import resolve_spacing

__all__ = [
    "Probe",
    "PyramidReader",
    "SlideReader",
    "backends",
    "open_and_use",
    "open_slide",
    "resolve_spacing",
]
