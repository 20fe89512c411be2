"""A worker in a process of its own: `python -m slide2vec.scale.local_worker DESCRIPTOR FOLDER`.

Its device is in its environment before it imports anything, and it ends with the process that started it.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from slide2vec.scale.shared_tensors import store
from slide2vec.scale.worker import serve

__all__ = ["main"]


def main(descriptor: int, folder: Path) -> None:
    """Serve whoever holds the other end of a socket.

    Args:
        folder: for tile embeddings on their way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator
    logging.getLogger("slide2vec").addHandler(logging.NullHandler())
    connection = Connection(descriptor)
    telling = threading.Lock()

    def leave() -> NoReturn:
        """Whatever threads still compute, nobody wants it any more."""
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    def send_report(report: Any) -> None:
        message = pickle.dumps(report)  # by itself: connections pickle tensors into memory that they share
        with telling:
            try:
                connection.send_bytes(message)
            except OSError:
                leave()

    def receive() -> Any:
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            leave()

    serve(receive, send_report, partial(store, folder=folder))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
