"""What `slide2vec doctor` says of what installed packages add: encoders, readers, segmenters, formats."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from slide2vec.choices import BACKENDS, OUTPUT_FORMATS, SEGMENTATION_METHODS
from slide2vec.plugins import providers

__all__ = ["SEGMENTERS", "plugins", "problem_of"]

ENCODERS = "slide2vec.encoders"
SEGMENTERS = "slide2vec.segmenters"
#: Group of entry points -> names of ours there, and what a plug-in has.
_OTHERS: Mapping[str, tuple[Container[str], tuple[str, ...]]] = {
    "slide2vec.readers": (BACKENDS.ours, ("_read_box", "close")),
    SEGMENTERS: (SEGMENTATION_METHODS.ours, ("names", "spacing_um", "segment")),
    "slide2vec.formats": (OUTPUT_FORMATS.ours, ("write", "read")),
}


def plugins() -> list[dict[str, str | None]]:
    """Each plug-in: its kind and name, what it points to, the package it is of; and its problem, None where
    it can be used. All of them are loaded."""
    return [*_encoders(), *_of_other_kinds()]


def _encoders() -> Iterator[dict[str, str | None]]:
    from slide2vec.recipes import list_encoder_provider_diagnostics

    found = providers(ENCODERS)
    failed = {
        (each.provider_key, each.provider): each.concise()
        for each in (list_encoder_provider_diagnostics() if found else ())
    }
    for entry in found:
        yield _row(entry, failed.get((entry.name, entry.value)))


def _of_other_kinds() -> Iterator[dict[str, str | None]]:
    for group in _OTHERS:
        for entry in providers(group):
            yield _row(entry, problem_of(entry))


def problem_of(entry: EntryPoint) -> str | None:
    """Why a reader, segmenter or format of another package cannot be used; it is loaded."""
    ours, parts = _OTHERS[entry.group]
    if entry.name in ours:
        return f"{entry.name} is a name of slide2vec's own, which is used"
    try:
        loaded: Any = entry.load()
        missing = [name for name in parts if not hasattr(loaded, name)]
        if missing:
            return f"it has no {', '.join(missing)}"
        reason = getattr(import_module(entry.module), "unavailable", lambda: None)()
    except (Exception, SystemExit) as error:  # whatever other packages do
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return None if reason is None else str(reason)


def _row(entry: EntryPoint, problem: str | None) -> dict[str, str | None]:
    of = entry.dist
    return {
        "kind": entry.group.removeprefix("slide2vec.").removesuffix("s"),
        "name": entry.name,
        "provider": entry.value,
        "package": None if of is None else f"{of.name} {of.version}",
        "problem": problem,
    }
