"""Files are written beside the encoder, not before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from slide2vec.cohort.results import Artifact

__all__ = ["OnPersisted", "Writer"]

#: Slides that may wait to be written while the next ones are encoded.
_UNWRITTEN = 2

OnPersisted = Callable[[Artifact], None]


class Writer:
    """Publishes in a thread of its own, so that the encoder waits neither for the disk nor for what comes
    after its tiles."""

    def __init__(self, on_persisted: OnPersisted | None) -> None:
        self._on_persisted = on_persisted
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._unwritten: deque[Future[None]] = deque()

    def put(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        """Hand over what writes files; waits while `_UNWRITTEN` others are not through yet.

        Raises what an earlier one has raised.
        """
        while len(self._unwritten) >= _UNWRITTEN:
            self._unwritten.popleft().result()
        self._unwritten.append(self._pool.submit(self._run, publish))

    def _run(self, publish: Callable[[], Iterable[Artifact]]) -> None:
        for artifact in publish():
            if self._on_persisted is not None:
                self._on_persisted(artifact)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._unwritten:
                future.result()
