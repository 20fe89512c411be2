"""The lock of an output directory behind a URL."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from slide2vec.cohort.lock import LOCK_NAME, holder, output_lock, shard_holders
from slide2vec.errors import OutputError, OutputLockedError
from slide2vec.files import as_path
from slide2vec.files.lease import DEAD_AFTER_S


@pytest.fixture
def output_dir() -> Path:
    MemoryFileSystem.store.clear()
    return as_path("memory://bucket/run")


def leave(output_dir: Path, *, age_s: float) -> Path:
    """The lock of another process, last renewed a while ago."""
    path = output_dir / LOCK_NAME
    renewed = datetime.now(UTC) - timedelta(seconds=age_s)
    by = {"host": "elsewhere", "pid": 7, "started": "then", "token": "theirs", "renewed": renewed.isoformat()}
    path.write_text(json.dumps(by))
    return path


def on_disk(output_dir: Path) -> Mapping[str, Any]:
    """The lock's content. fsspec's memory store, unlike others, shows an object before its content."""
    waited = time.monotonic() + 30
    while not (text := (output_dir / LOCK_NAME).read_text()) and time.monotonic() < waited:
        time.sleep(0.001)
    return dict(json.loads(text))


def test_held_while_the_block_lasts(output_dir: Path) -> None:
    assert holder(output_dir) is None
    with output_lock(output_dir):
        found = holder(output_dir)
        assert found is not None and found["pid"] > 0
        with pytest.raises(OutputLockedError, match="memory://bucket/run"), output_lock(output_dir):
            raise AssertionError("not reached")
    assert holder(output_dir) is None and not (output_dir / LOCK_NAME).exists()


def test_a_living_run_is_told(output_dir: Path) -> None:
    leave(output_dir, age_s=DEAD_AFTER_S - 30)
    found = holder(output_dir)
    assert found is not None and found["host"] == "elsewhere"
    with (
        pytest.raises(OutputLockedError, match="process 7 on elsewhere, since then"),
        output_lock(output_dir),
    ):
        raise AssertionError("not reached")
    assert on_disk(output_dir)["token"] == "theirs"


def test_a_dead_run_is_replaced(output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(output_dir, age_s=DEAD_AFTER_S + 30)
    assert holder(output_dir) is None
    with caplog.at_level(logging.WARNING), output_lock(output_dir):
        assert on_disk(output_dir)["host"] != "elsewhere"
    assert "left by process 7 on elsewhere" in caplog.text and not (output_dir / LOCK_NAME).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}', "\x00", '{"host":"a","pid":1,"started":"b"}'])
def test_the_object_may_hold_anything(output_dir: Path, content: str) -> None:
    (output_dir / LOCK_NAME).write_text(content)
    assert holder(output_dir) is None
    with output_lock(output_dir):
        assert holder(output_dir) is not None


def test_it_is_renewed(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.files.lease.RENEW_EVERY_S", 0.01)
    with output_lock(output_dir):
        first = on_disk(output_dir)
        waited = time.monotonic() + 30
        while on_disk(output_dir)["renewed"] == first["renewed"] and time.monotonic() < waited:
            time.sleep(0.01)
        assert on_disk(output_dir)["renewed"] > first["renewed"]
        assert on_disk(output_dir)["token"] == first["token"]


def test_one_that_was_taken_over_is_left_alone(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slide2vec.files.lease.RENEW_EVERY_S", 0.01)
    with output_lock(output_dir):
        leave(output_dir, age_s=0)
        waited = time.monotonic() + 30
        while "stop one of the runs" not in caplog.text and time.monotonic() < waited:
            time.sleep(0.01)
    assert "process 7 on elsewhere has taken over" in caplog.text
    assert on_disk(output_dir)["token"] == "theirs"


def test_the_faster_of_two_wins(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other creates its object between our look and our creation."""
    create = MemoryFileSystem.pipe_file

    def late(fs: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create":
            monkeypatch.setattr(MemoryFileSystem, "pipe_file", create)
            leave(output_dir, age_s=0)
        create(fs, path, value, mode=mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", late)
    with pytest.raises(OutputLockedError, match="process 7 on elsewhere"), output_lock(output_dir):
        raise AssertionError("not reached")
    assert on_disk(output_dir)["token"] == "theirs"


def test_shards_and_the_whole_exclude_each_other(output_dir: Path) -> None:
    with output_lock(output_dir, "1/2"), output_lock(output_dir, "2/2"):
        assert list(shard_holders(output_dir)) == ["1/2", "2/2"] and holder(output_dir) is None
        for shard in (None, "1/2"):
            with pytest.raises(OutputLockedError), output_lock(output_dir, shard):
                raise AssertionError("not reached")
    assert not shard_holders(output_dir)
    with (
        output_lock(output_dir),
        pytest.raises(OutputLockedError),
        output_lock(output_dir, "1/2"),
    ):
        raise AssertionError("not reached")


def test_a_store_that_cannot_be_written(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(OutputError, match="no credentials"), output_lock(output_dir):
        raise AssertionError("not reached")
