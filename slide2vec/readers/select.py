"""Which back end opens a slide."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import cast

from slide2vec.errors import BackendError, ConfigError, ExtraMissingError, SlideOpenError, nearest_names
from slide2vec.readers.base import SlideReader
from slide2vec.readers.probe import Probe, probe
from slide2vec.slides import Slide

__all__ = ["AUTO_ORDER", "backends", "open_slide"]

logger = logging.getLogger(__name__)

#: back end -> (its module, its reader class), in the order "auto" tries them.
_READERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "tiff": ("slide2vec.readers.tiff", "TiffReader"),
        "dicom": ("slide2vec.readers.dicom", "DicomReader"),
        "cucim": ("slide2vec.readers.cucim", "CucimReader"),
        "vips": ("slide2vec.readers.vips", "VipsReader"),
        "openslide": ("slide2vec.readers.openslide", "OpenslideReader"),
        "asap": ("slide2vec.readers.asap", "AsapReader"),
    }
)
AUTO_ORDER = tuple(_READERS)


def backends() -> dict[str, str | None]:
    """Every back end in the order of "auto": None when available, else why not and what to install."""
    return {name: import_module(module).unavailable() for name, (module, _) in _READERS.items()}


def open_slide(slide: Slide, backend: str = "auto", copy: Path | None = None) -> SlideReader:
    """Open a slide with one back end, or with the first that reads it ("auto").

    Args:
        copy: of the slide, to be opened in its place; messages name the slide's own path.

    Raises:
        ConfigError: there is no such back end.
        SlideOpenError: the file is missing, empty, truncated or no slide, or no back end opens it.
        BackendError: the back end asked for does not read this file ("auto" may).
        ExtraMissingError: the back end asked for is not installed.
    """
    if backend != "auto" and backend not in _READERS:
        raise ConfigError(f"unknown backend {backend!r}. {nearest_names(backend, ('auto', *_READERS))}")
    found = probe(slide, copy)
    if backend == "auto":
        return _open_first(found)
    try:
        return _open(backend, found)
    except BackendError as error:
        raise BackendError(
            f'slide {slide.sample_id}: backend "{backend}" cannot be used: {error} ({found.origin}). '
            'Use backend="auto", or another one'
        ) from error


def _open(backend: str, found: Probe) -> SlideReader:
    module, reader = _READERS[backend]
    return cast(SlideReader, getattr(import_module(module), reader)(found))


def _open_first(found: Probe) -> SlideReader:
    passed: list[str] = []
    for backend in AUTO_ORDER:
        try:
            reader = _open(backend, found)
        except (BackendError, ExtraMissingError) as error:
            passed.append(f"{backend}: {error}")
        else:
            logger.info(
                "slide %s: read with %s%s", found.name, backend, f" ({'; '.join(passed)})" if passed else ""
            )
            return reader
    raise SlideOpenError(f"slide {found.name}: no back end reads {found.origin}: {'; '.join(passed)}")
