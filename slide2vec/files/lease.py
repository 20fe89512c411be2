"""The lock of an output directory behind a URL: an object that is renewed as long as its run lives."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from slide2vec.errors import OutputError, OutputLockedError
from slide2vec.files import as_os_errors, atomic_path, remove
from slide2vec.files.remote import create

__all__ = ["DEAD_AFTER_S", "RENEW_EVERY_S", "lease_holder", "leased", "signature"]

logger = logging.getLogger(__name__)

RENEW_EVERY_S = 30.0
#: Four renewals may fail, or come late.
DEAD_AFTER_S = 120.0


def signature() -> dict[str, Any]:
    """Who takes a lock, and when."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold the object `path`; a thread renews it every 30 s. One that is older than 2 min is taken over.

    Object stores have nothing better, and it is weaker than a lock of the operating system: a run that was
    killed blocks the next for up to 2 min; one that was stopped for longer, or cut off from the store,
    loses its place and is only warned; clocks of machines that differ by more than a minute mislead it;
    and where the store cannot create an object exclusively, two runs that start within the same second
    may both go on. What is written stays whole even then: each file is published at once, and those of
    two runs with the same settings are the same.

    Raises:
        OutputLockedError: another run has renewed it within the last 2 min.
        OutputError: the store cannot be read or written.
    """
    lease = _Lease(path)
    lease.take()
    try:
        with _renewed(lease):
            yield
    finally:
        lease.release()


@contextmanager
def _renewed(lease: _Lease) -> Iterator[None]:
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_EVERY_S) and lease.renew():
            pass

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def lease_holder(path: Path) -> Mapping[str, Any] | None:
    """Who holds the object now (host, pid, started); None when nobody does, or it cannot be read."""
    try:
        by = _read(path)
    except OSError:
        return None
    return by if by is not None and _age_s(by) < DEAD_AFTER_S else None


class _Lease:
    """The object while it is ours: its token says whose it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ours = {**signature(), "token": uuid4().hex}

    def take(self) -> None:
        """Raises OutputLockedError, OutputError."""
        try:
            by = _read(self._path)
            if by is None:
                if not create(self._path, self._text()):
                    raise self._locked(_read(self._path))
            elif _age_s(by) < DEAD_AFTER_S:
                raise self._locked(by)
            else:
                logger.warning(
                    "%s was left by process %s on %s, which has not renewed it for %.0f s: it is taken over",
                    *(self._path, by["pid"], by["host"], _age_s(by)),
                )
                self._write()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError.of(self._path, error) from error

    def renew(self) -> bool:
        """Whether it is still ours. A renewal that fails is only logged: writing files will fail, too."""
        try:
            by = _read(self._path)
            if by is not None and by.get("token") != self._ours["token"]:
                logger.error(
                    "process %s on %s has taken over %s, which was not renewed in time: stop one of the runs",
                    *(by["pid"], by["host"], self._path),
                )
                return False
            self._write()
        except OSError as error:
            logger.warning("%s cannot be renewed: %s", self._path, error)
        return True

    def release(self) -> None:
        """Remove it, if it is ours."""
        try:
            by = _read(self._path)
            if by is not None and by.get("token") == self._ours["token"]:
                remove(self._path)
        except OSError as error:
            logger.warning("%s cannot be removed (%s): it is void in 2 min", self._path, error)

    def _write(self) -> None:
        with atomic_path(self._path) as temporary:
            temporary.write_bytes(self._text())

    def _text(self) -> bytes:
        return json.dumps({**self._ours, "renewed": datetime.now(UTC).isoformat()}).encode()

    def _locked(self, by: Mapping[str, Any] | None) -> OutputLockedError:
        who = f"process {by['pid']} on {by['host']}, since {by['started']}," if by else "another process"
        return OutputLockedError(
            f"{who} is writing into {self._path.parent}: wait until it is done, stop it, or choose another "
            "output directory (`slide2vec status` shows how far it is); a run that was killed holds it for "
            f"{DEAD_AFTER_S:.0f} s more at most"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is none. An object that slide2vec has not written counts as expired.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with as_os_errors(path):
            content = path.read_bytes()
    except FileNotFoundError:
        return None
    unknown = {"host": "unknown", "pid": 0, "started": "unknown"}
    try:
        by = json.loads(content)
    except ValueError:
        return unknown
    return by if isinstance(by, dict) and by.keys() >= unknown.keys() else unknown


def _age_s(by: Mapping[str, Any]) -> float:
    """Seconds since it was renewed."""
    try:
        renewed = datetime.fromisoformat(str(by.get("renewed")))
        return (datetime.now(UTC) - renewed).total_seconds()
    except (ValueError, TypeError):
        return float("inf")
