"""What a pool of workers offers, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slide2vec.scale.messages import Command, Report

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WorkerPool"]


class WorkerPool(Protocol):
    """Workers that have loaded one model, or are about to. Used from one thread.

    Attributes:
        keeps_last_words: what a worker reported before it died arrives for certain.
    """

    keeps_last_words: bool

    @property
    def size(self) -> int:
        """How many workers there are to be."""
        ...

    @property
    def ready(self) -> Sequence[str]:
        """Workers that have loaded their model and do not know of a job yet."""
        ...

    def send(self, worker: str, command: Command) -> None:
        """Tell a worker what to do; nothing happens if it is lost meanwhile."""
        ...

    def receive(self) -> Sequence[tuple[str, Report]]:
        """What workers have reported since; waits for something, a second at most.

        `Lost` is the last report of a worker. Another takes its place, unless too many were lost
        before they began a job.
        """
        ...

    def load_features(self, features: Any) -> Tensor:
        """Tile embeddings that a worker has stored."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...
