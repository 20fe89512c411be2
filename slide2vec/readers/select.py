"""Which back end opens a slide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, cast

from slide2vec.errors import (
    BackendError,
    ConfigError,
    Contradiction,
    ExtraMissingError,
    SlideOpenError,
    nearest_names,
)
from slide2vec.readers.base import SlideReader
from slide2vec.readers.probe import Probe, probe
from slide2vec.slides import Slide

__all__ = ["AUTO_ORDER", "backends", "open_and_use", "open_slide"]

logger = logging.getLogger(__name__)

Used = TypeVar("Used")

#: back end -> (its module, its reader class), in the order "auto" tries them.
_READERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
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


def open_slide(
    slide: Slide,
    backend: str = "auto",
    copy: Path | None = None,
    passed_over: Mapping[str, str] = MappingProxyType({}),
) -> SlideReader:
    """Open a slide with one back end, or with the first that reads it ("auto").

    Args:
        copy: of the slide, to be opened in its place; messages name the slide's own path.
        passed_over: back ends that "auto" leaves out, and why.

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
        return _open_first(found, passed_over)
    try:
        return _open(backend, found)
    except BackendError as error:
        raise _unusable(backend, slide.sample_id, found.origin, error) from error


def open_and_use(
    slide: Slide, backend: str, copy: Path | None, use: Callable[[SlideReader], Used]
) -> tuple[SlideReader, Used]:
    """An opened slide and what is made of it; by the next back end of "auto" where that raises Contradiction.

    Raises:
        BackendError: a second decoder contradicts the back end asked for.
        Others as `open_slide`, and as `use`.
    """
    passed_over: dict[str, str] = {}
    while True:
        with ExitStack() as undo:
            reader = undo.enter_context(open_slide(slide, backend, copy, passed_over))
            try:
                used = use(reader)
            except Contradiction as error:
                if backend != "auto":
                    raise _unusable(backend, slide.sample_id, slide.image_path, error) from error
                logger.warning("slide %s: not read with %s: %s", slide.sample_id, reader.backend, error)
                passed_over[reader.backend] = str(error)
                continue
            undo.pop_all()
            return reader, used


def _unusable(backend: str, name: str, path: Path, error: BackendError) -> BackendError:
    return BackendError(
        f'slide {name}: backend "{backend}" cannot be used: {error} ({path}). '
        'Use backend="auto", or another one'
    )


def _open(backend: str, found: Probe) -> SlideReader:
    module, reader = _READERS[backend]
    return cast(SlideReader, getattr(import_module(module), reader)(found))


def _open_first(found: Probe, passed_over: Mapping[str, str]) -> SlideReader:
    passed = [f"{backend}: {reason}" for backend, reason in passed_over.items()]
    for backend in AUTO_ORDER:
        if backend in passed_over:
            continue
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
