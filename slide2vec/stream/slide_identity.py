"""Fingerprints of the files of each slide of a run, taken when it is planned and recorded in its sidecars."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import SlideReadError
from slide2vec.readers.fingerprint import FileIdentity
from slide2vec.slides import Slide
from slide2vec.stream.staging import Staged
from slide2vec.tiling.archives import find_archive

__all__ = ["Identities", "SlideIdentity"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideIdentity:
    """What a slide's embeddings are made from: its image, or its tile archive, and its mask raster."""

    image: FileIdentity
    mask: FileIdentity | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What is recorded of them."""
        return {"image": self.image.content, "mask": None if self.mask is None else self.mask.content}

    def is_as_it_was(self) -> bool:
        """Whether no file looks changed. Reads nothing."""
        return self.image.is_as_it_was() and (self.mask is None or self.mask.is_as_it_was())

    def check(self, slide: Slide) -> None:
        """Refuse files that have changed since.

        Raises:
            SlideReadError: one has.
        """
        for each in (self.image, self.mask):
            change = None if each is None else each.change()
            if each is not None and change is not None:
                raise SlideReadError(
                    f"slide {slide.sample_id}: {each.path} changed while it was read: {change}; its "
                    "embeddings are dropped: run again (with resume, on disk) when it is in place"
                )


class Identities:
    """Looks at each slide's files once. Used from several threads.

    Args:
        config: its `fingerprint` says how closely, its read_tiles_from what is looked at.
        known: by sample_id; kept and changed.
    """

    def __init__(self, config: PreprocessingConfig, known: dict[str, SlideIdentity] | None = None) -> None:
        self._config = config
        self._known: dict[str, SlideIdentity] = {} if known is None else known
        self._lock, self._warned = threading.Lock(), False

    def of(self, slide: Slide, *, masked: bool = True, staged: Staged | None = None) -> SlideIdentity:
        """The identity of a slide: the one that is known, if its files are as they were, else a new one.

        Args:
            masked: its mask, if it has one, decides its tiles.
            staged: where it is read, if not in its own place.

        Raises:
            OSError: a file cannot be read, or is no plain file.
            TilingError: it has no tile archive where there should be one.
        """
        known = self._known.get(slide.sample_id)
        mask = slide.mask_path if masked else None
        if known is not None and (known.mask is None) == (mask is None) and known.is_as_it_was():
            return known
        image, copies = slide.image_path, staged
        if self._config.read_tiles_from is not None:
            image, copies = find_archive(self._config.read_tiles_from, slide.sample_id), None
        made = SlideIdentity(
            self._look(image, None if copies is None else copies.image_path, staged),
            None if mask is None else self._look(mask, None if staged is None else staged.mask_path, staged),
        )
        self._known[slide.sample_id] = made
        return made

    def _look(self, path: Path, copy: Path | None, staged: Staged | None) -> FileIdentity:
        how = self._config.fingerprint
        if staged is None or copy is None or copy == path:
            return FileIdentity.of(path, how)
        return FileIdentity.of(path, how, copy=copy, stamps=staged.stamps[path])

    def take_over(self, sample_id: str, identity: SlideIdentity) -> None:
        """The identity of a slide, taken by another stream of the run."""
        self._known[sample_id] = identity

    def known(self, sample_id: str) -> SlideIdentity | None:
        """The identity of a slide that was taken already; reads nothing."""
        return self._known.get(sample_id)

    def forget(self, sample_id: str) -> None:
        """The slide is complete."""
        self._known.pop(sample_id, None)

    def warn_of_older(self, directory: Path) -> None:
        """Warn, once per run, that coordinate files are matched with their slides by file times only."""
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            logger.warning(
                "coordinate files in %s were written by an earlier version, which did not record what the "
                "slides were: they are taken to be of the slides that have not changed since, by the files' "
                "times; remove the folder to tile all slides anew",
                directory,
            )
