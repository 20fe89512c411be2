"""One run at a time writes into an output directory, or several shards of one."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from slide2vec.errors import OutputError, OutputLockedError
from slide2vec.files import entries, is_remote, open_locked
from slide2vec.files.lease import lease_holder, leased, signature
from slide2vec.files.locks import try_lock, wait_for_lock

__all__ = [
    "LOCK_NAME",
    "PLACES_LOCK",
    "SHARD_LOCKS",
    "holder",
    "one_at_a_time",
    "output_lock",
    "shard_holders",
    "shard_stem",
]

logger = logging.getLogger(__name__)

LOCK_NAME = ".slide2vec.lock"
#: Matches the locks of shards.
SHARD_LOCKS = ".slide2vec.shard-*-of-*.lock"
#: Held by a shard while it looks for its folders.
PLACES_LOCK = ".slide2vec.places.lock"
_TRIES, _PAUSE_S = 4, 0.05
#: For a turn behind a URL, where who was killed holds it for 2 min; and between requests of the store.
_MOST_WAIT_S, _REQUEST_EVERY_S = 600.0, 0.5


def shard_stem(shard: str) -> str:
    """Of the names of a shard's files: "3/16" -> "shard-3-of-16"."""
    return f"shard-{shard.replace('/', '-of-')}"


@contextmanager
def output_lock(output_dir: Path, shard: str | None = None) -> Iterator[None]:
    """Hold an output directory; the operating system releases it when the process ends, however it ends.

    One behind a URL is held as well as can be: see `leased`.

    Args:
        shard: hold only this one: other shards may be held meanwhile, the whole directory may not.

    Raises:
        OutputLockedError: another process holds it.
        OutputError: the directory cannot be made or written to.
    """
    own = LOCK_NAME if shard is None else f".slide2vec.{shard_stem(shard)}.lock"
    with ExitStack() as held:
        if is_remote(output_dir):
            _refuse_others(output_dir, shard)
            held.enter_context(leased(output_dir / own))
        else:
            held.enter_context(_lock(output_dir, LOCK_NAME, shared=shard is not None))
            if shard is not None:
                held.enter_context(_lock(output_dir, own))
        yield


@contextmanager
def one_at_a_time(output_dir: Path) -> Iterator[None]:
    """Shards of an output directory, which are held, wait for each other here.

    Raises:
        OutputLockedError: behind a URL, others have had their turn for 10 min.
        OutputError: the lock cannot be made.
    """
    path = output_dir / PLACES_LOCK
    with ExitStack() as held:
        if is_remote(output_dir):
            _wait_for_lease(held, path)
        else:
            try:
                descriptor = open_locked(path)
            except OSError as error:
                raise OutputError.of(path, error) from error
            held.callback(os.close, descriptor)
            with suppress(OSError):  # no locks there, which `output_lock` has warned of
                wait_for_lock(descriptor)
        yield


def _wait_for_lease(held: ExitStack, path: Path) -> None:
    until = time.monotonic() + _MOST_WAIT_S
    while True:
        try:
            held.enter_context(leased(path))
        except OutputLockedError:
            if time.monotonic() > until:
                raise
            time.sleep(_REQUEST_EVERY_S)
        else:
            return


def _refuse_others(output_dir: Path, shard: str | None) -> None:
    """Behind a URL: a shard where the whole directory is held, or the other way round."""
    try:
        others = shard_holders(output_dir) if shard is None else {"all": holder(output_dir)}
    except OSError as error:
        raise OutputError.of(output_dir, error) from error
    for by in others.values():
        if by is not None:
            raise OutputLockedError(_locked_message(output_dir, by))


@contextmanager
def _lock(output_dir: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(output_dir / name)
    except OSError as error:
        raise OutputError.of(output_dir, error) from error
    try:
        _acquire(descriptor, output_dir / name, shared=shared)
        if not shared:
            _sign(descriptor, output_dir / name)
        yield
        if not shared:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, *, shared: bool) -> None:
    output_dir = path.parent
    try:
        if _patiently(descriptor, shared=shared):
            return
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): do not run twice into it", output_dir, error.strerror)
        return
    by: Mapping[str, Any] | None = _read(descriptor)
    if path.name == LOCK_NAME:  # shards in the way hold it together, unsigned
        by = next(iter(shard_holders(output_dir).values()), by)
    raise OutputLockedError(_locked_message(output_dir, by))


def _locked_message(output_dir: Path, by: Mapping[str, Any] | None) -> str:
    who = f"process {by['pid']} on {by['host']}, since {by['started']}" if by else "another process"
    return (
        f"{who} is writing into {output_dir}: wait until it is done, stop it, or choose another output "
        "directory (`slide2vec status` shows how far it is)"
    )


def _patiently(descriptor: int, *, shared: bool) -> bool:
    """Lock; asking who holds a lock takes it for a moment, so it is tried more than once."""
    for _ in range(_TRIES - 1):
        if try_lock(descriptor, shared=shared):
            return True
        time.sleep(_PAUSE_S)
    return try_lock(descriptor, shared=shared)


def _sign(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signature()).encode(), 0)
    except OSError as error:
        raise OutputError.of(path, error) from error


def holder(output_dir: Path) -> Mapping[str, Any] | None:
    """Who holds a whole output directory now (host, pid, started); None when nobody does."""
    return _holder(output_dir / LOCK_NAME)


def shard_holders(output_dir: Path) -> dict[str, Mapping[str, Any]]:
    """As `holder`, of the shards ("3/16") that are held now, by their number."""
    found = {}
    for path in (path for path in entries(output_dir) if fnmatch(path.name, SHARD_LOCKS)):
        number, _, count = path.name.removeprefix(".slide2vec.shard-").removesuffix(".lock").partition("-of-")
        if number.isdecimal() and count.isdecimal() and (by := _holder(path)) is not None:
            found[int(count), int(number)] = by
    return {f"{number}/{count}": by for (count, number), by in sorted(found.items())}


def _holder(path: Path) -> Mapping[str, Any] | None:
    if is_remote(path):
        return lease_holder(path)
    try:
        descriptor = open_locked(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if not try_lock(descriptor, shared=True):
            return _read(descriptor) or {"host": "unknown", "pid": 0, "started": "unknown"}
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        by = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return by if isinstance(by, dict) and by.keys() >= {"host", "pid", "started"} else None
