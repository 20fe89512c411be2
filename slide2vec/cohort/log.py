"""logs/: what happened in a run, line by line, with the warnings of the library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from slide2vec.cohort.lock import shard_stem
from slide2vec.errors import OutputError
from slide2vec.files import atomic_path, is_remote
from slide2vec.progress import (
    Metering,
    ProgressEvent,
    ProgressReporter,
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    in_turn,
)

__all__ = ["RunLog"]


logger = logging.getLogger(__name__)


class _File(logging.FileHandler):
    """Loses lines on a full disk, in silence: the run itself reports it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close, whether or not the last lines can be written."""
        with suppress(OSError):
            super().close()


class RunLog:
    """A log file in `logs/` of an output directory, and the reporter that feeds it.

    Behind a URL it appears at the end of the run, or with its failure; that of a killed run is lost.
    As a reporter it passes every event on, with the energy of the run in its summary, which it keeps.

    Args:
        shard: of the run ("3/16"); it is in the name of the file, as shards may begin in one second.
        devices: gives those of this machine that the run uses.

    Attributes:
        finished: tiles of each slide that was embedded, by sample_id.
    """

    def __init__(
        self,
        output_dir: Path,
        inner: ProgressReporter,
        shard: str | None = None,
        devices: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.output_dir, self.shard, self.started = output_dir, shard, datetime.now(UTC)
        self.finished: dict[str, int] = {}
        self._summaries: list[RunSummary] = []
        self._inner, self._metering = inner, Metering(devices)
        part = "" if shard is None else f".{shard_stem(shard)}"
        path = output_dir / "logs" / f"{self.started:%Y%m%d-%H%M%S}{part}.log"
        self._upload = ExitStack()
        try:
            if is_remote(path):
                path = self._upload.enter_context(atomic_path(path))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _File(path, encoding="utf-8")
        except OSError as error:
            raise OutputError.of(path, error) from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.Logger("slide2vec.run")
        self._logger.addHandler(self._handler)

    def __enter__(self) -> Self:
        logging.getLogger("slide2vec").addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metering.close()
        logging.getLogger("slide2vec").removeHandler(self._handler)
        if error is not None:
            self.write(f"the run ended early: {type(error).__name__}: {error}")
        self._handler.close()
        try:
            self._upload.close()
        except OutputError as lost:
            logger.warning("%s", lost)

    @property
    def summary(self) -> RunSummary | None:
        """Of all that was embedded so far; None: nothing was."""
        return in_turn(self._summaries) if len(self._summaries) > 1 else next(iter(self._summaries), None)

    def write(self, text: str) -> None:
        """A line of our own."""
        self._logger.info(text)

    def emit(self, event: ProgressEvent) -> None:
        """Log an event and pass it on."""
        event = self._metering.take(event)
        match event:
            case RunStarted(slides, preset):
                self.write(f"{slides} slides, {preset}")
            case SlidePlanned(name, tiles, backend):
                self.write(f"slide {name}: {tiles} tiles, read with {backend}")
            case SlideFinished(name, tiles):
                self.finished[name] = self.finished.get(name, 0) + tiles
                self.write(f"slide {name}: {tiles} tiles done")
            case SlideFailed(name, error):
                self.write(f"slide {name} failed: {type(error).__name__}: {error}")
            case RunFinished(summary):
                self._summaries.append(summary)
                self.write(str(summary))
        self._inner.emit(event)

    def close(self) -> None:
        """Do nothing: the inner reporter is closed by whoever installed it."""
