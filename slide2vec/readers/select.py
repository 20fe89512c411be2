"""Which back end opens a slide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from slide2vec.choices import BACKENDS, Home
from slide2vec.errors import (
    BackendError,
    Contradiction,
    ExtraMissingError,
    Slide2VecError,
    SlideOpenError,
)
from slide2vec.readers.probe import Probe, probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.reader import SlideReader
from slide2vec.readers.refusal import CONVERT, EXPORT, Refusal
from slide2vec.readers.spacing import refuse_oblong_pixels
from slide2vec.readers.tiff_images import OPENSLIDE_VENDORS
from slide2vec.slides import Slide

__all__ = ["backends", "open_and_use", "open_slide"]

logger = logging.getLogger(__name__)

Used = TypeVar("Used")

#: By kind of file, back ends whose reason is reported where none reads it, the first that is installed; else
#: OpenSlide's.
_ANSWERING_FOR = {"tiff": ("tiff", "vips"), "dicom": ("dicom",)}
#: What OpenSlide's shortest reasons mean.
_MEANINGS = {
    "dissimilar main images": "it is a Leica SCN of areas that are too unlike to be put together",
    "Can't find main image": "it is a Leica SCN without a brightfield image (fluorescence?)",
    "ZISRAW": "it is damaged, or a Zeiss CZI of a kind that OpenSlide does not read",
    "Unsupported or missing image file": "it is of no kind that OpenSlide knows",
}


def backends() -> dict[str, str | None]:
    """Every back end in the order of "auto": None when available, else why not and what to install."""
    ours = {name: import_module(home.module).unavailable() for name, home in BACKENDS.ours.items()}
    return ours | {name: _unloadable(home) for name, home in BACKENDS.theirs.items()}


def _unloadable(home: Home) -> str | None:
    try:
        home.imported()
        return cast("str | None", getattr(import_module(home.module), "unavailable", lambda: None)())
    except (Exception, SystemExit) as error:  # whatever other packages do
        return str(error)


def open_slide(
    slide: Slide,
    backend: str = "auto",
    copy: Path | None = None,
    passed_over: Mapping[str, Exception] = MappingProxyType({}),
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
    BACKENDS.checked(backend)
    found = probe(slide, copy)
    reader = _open_first(found, passed_over) if backend == "auto" else _open_named(backend, found)
    if slide.spacing_at_level_0 is None:
        try:
            refuse_oblong_pixels(getattr(reader, "claims", ()))
        except Refusal as error:
            reader.close()
            raise SlideOpenError(f"slide {found.name}: {found.origin} cannot be read: {error}") from error
    return reader


def open_and_use(
    slide: Slide, backend: str, copy: Path | None, use: Callable[[SlideReader], Used]
) -> tuple[SlideReader, Used]:
    """An opened slide and what is made of it; by the next back end of "auto" where that raises Contradiction.

    Raises:
        BackendError: a second decoder contradicts the back end asked for.
        Others as `open_slide`, and as `use`.
    """
    passed_over: dict[str, Exception] = {}
    while True:
        with ExitStack() as undo:
            reader = undo.enter_context(open_slide(slide, backend, copy, passed_over))
            try:
                used = use(reader)
            except Contradiction as error:
                if backend != "auto":
                    raise _unusable(backend, slide.sample_id, slide.image_path, error) from error
                logger.warning("slide %s: not read with %s: %s", slide.sample_id, reader.backend, error)
                passed_over[reader.backend] = error
                continue
            undo.pop_all()
            return reader, used


def _open_named(backend: str, found: Probe) -> SlideReader:
    try:
        return _open(backend, found)
    except BackendError as error:
        raise _unusable(backend, found.name, found.origin, error) from error


def _unusable(backend: str, name: str, path: Path, error: BackendError) -> BackendError:
    return BackendError(
        f'slide {name}: backend "{backend}" cannot be used: {error} ({path}). '
        'Use backend="auto", or another one'
    )


def _open(backend: str, found: Probe) -> SlideReader:
    home = BACKENDS[backend]
    if found.refused and not home.brought_by:
        raise BackendError(f"it {found.refused}")
    if not home.brought_by:
        return cast(SlideReader, home.imported()(found))
    kind = home.imported()
    if not (isinstance(kind, type) and issubclass(kind, PyramidReader)):  # whose pixels are cross-checked
        raise BackendError(f"{home.brought_by} is no subclass of slide2vec.readers.PyramidReader")
    try:
        reader: PyramidReader = cast("Any", kind)(found)
    except Slide2VecError:
        raise
    except Exception as error:  # whatever other packages do
        raise BackendError(f"{home.brought_by}: {type(error).__name__}: {error}") from error
    reader.backend = backend
    return reader


def _open_first(found: Probe, passed_over: Mapping[str, Exception]) -> SlideReader:
    passed = dict(passed_over)
    for backend in BACKENDS:
        if backend in passed_over:
            continue
        try:
            reader = _open(backend, found)
        except (BackendError, ExtraMissingError) as error:
            passed[backend] = error
        else:
            logger.info(
                "slide %s: read with %s%s", found.name, backend, f" ({_all(passed)})" if passed else ""
            )
            return reader
    if found.refused:
        raise SlideOpenError(f"slide {found.name}: {found.origin} {found.refused}")
    logger.info("slide %s: no back end reads it (%s)", found.name, _all(passed))
    raise SlideOpenError(f"slide {found.name}: no back end reads {found.origin}: {_why(found, passed)}")


def _all(passed: Mapping[str, Exception]) -> str:
    return "; ".join(f"{backend}: {error}" for backend, error in passed.items())


def _why(found: Probe, passed: Mapping[str, Exception]) -> str:
    """The reason to report, and what to do. `passed` holds why every back end refused."""
    plain = found.kind == "tiff" and found.vendor not in OPENSLIDE_VENDORS
    experts = _ANSWERING_FOR.get(found.kind, ()) if plain or found.kind != "tiff" else ()
    contradicted = [backend for backend, error in passed.items() if isinstance(error, Contradiction)]
    order = (*contradicted, *experts, "openslide", *passed)
    asked = next(backend for backend in order if backend in passed)
    reason = str(passed[asked])
    meaning = next((meaning for text, meaning in _MEANINGS.items() if text in reason), None)
    return f"{f'{meaning} ({reason})' if meaning else reason}; {CONVERT if plain else EXPORT}"
